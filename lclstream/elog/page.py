"""The logbook for people: experiments, and an experiment's runs with parameters, files and jobs, as plain HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any
from urllib.parse import quote

from lclstream.elog.models import unescape_name

Document = Mapping[str, Any]

#: Runs one page shows; the page says so when there are more.
MAX_RUNS = 200
_LONG_VALUE = 120

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --open: #1a7f37; --wrong: #c62828; --head: #8c1515; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0 1rem; color: var(--head); } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
@media (prefers-color-scheme: dark) { h1 { color: #e88; } }
nav { color: var(--faint); } a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } .many { min-width: 62rem; }
time, .state { white-space: nowrap; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: .85rem; }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .8rem; margin: 0; font-size: .88rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.open { color: var(--open); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
.faint { color: var(--faint); } code { font-size: .88em; overflow-wrap: anywhere; }
"""


def _page(title: str, body: str) -> str:
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # Somebody who watches a run wants its parameters as they come.
        "<meta http-equiv='refresh' content='10'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _time(text: str | None) -> str:
    if text is None:
        return ""
    moment = datetime.fromisoformat(text)
    return f"<time datetime='{escape(text)}'>{moment:%Y-%m-%d %H:%M:%S}</time>"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if text.startswith(("https://", "http://")):
        return f"<a href='{escape(text)}' rel='noreferrer'>{escape(text)}</a>"
    return escape(text if len(text) <= _LONG_VALUE else text[:_LONG_VALUE] + " …")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    kind = "many" if len(heads) > 4 else "few"
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<div class='wide'><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(html: str, kind: str = "") -> str:
    return f"<td class='{kind}'>{html}</td>" if kind else f"<td>{html}</td>"


def _state(run: Document) -> str:
    if run["end_time"] is None:
        return "<span class='open'>running</span>"
    begin, end = datetime.fromisoformat(run["begin_time"]), datetime.fromisoformat(run["end_time"])
    return f"<span class='state'>ended after {_duration((end - begin).total_seconds())}</span>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def experiments(latest: Mapping[str, Document | None], *, waiting: int, trouble: str | None) -> str:
    """All experiments, each with its latest run."""
    rows = []
    for name, run in latest.items():
        link = f"<a href='/experiments/{quote(name, safe='')}'>{escape(name)}</a>"
        if run is None:
            rows.append([_cell(link), _cell("<span class='faint'>no run yet</span>"), _cell(""), _cell("")])
        else:
            number = _cell(escape(str(run["num"])), "number")
            rows.append([_cell(link), number, _cell(_time(run["begin_time"])), _cell(_state(run))])
    outbox = (
        f"<p class='wrong'>{waiting} messages wait for Kafka: {escape(trouble)}</p>"
        if trouble
        else f"<p class='faint'>{waiting} messages on their way to Kafka. Times are UTC.</p>"
    )
    table = _table(["Experiment", "Latest run", "Begin", "State"], rows) if rows else "<p>No experiment yet.</p>"
    return _page("Logbook", f"<h1>Logbook</h1>{table}{outbox}")


def _parameters(run: Document) -> str:
    editable = {name: entry.get("value") for name, entry in run["editable_params"].items()}
    entries = {unescape_name(name): value for name, value in {**run["params"], **editable}.items()}
    if not entries:
        return "<span class='faint'>&ndash;</span>"
    lines = (f"<dt>{escape(name)}</dt><dd>{_value(value)}</dd>" for name, value in sorted(entries.items()))
    return f"<dl>{''.join(lines)}</dl>"


def _files(files: Sequence[Document]) -> str:
    lines = []
    for file in files:
        where = ", ".join(sorted(file.get("locations", {}))) or "no location yet"
        lines.append(f"<div><code>{escape(file['path'])}</code> <span class='faint'>{escape(where)}</span></div>")
    return "".join(lines) or "<span class='faint'>&ndash;</span>"


def _jobs(jobs: Sequence[Document]) -> str:
    lines = []
    for job in jobs:
        counters = "; ".join(f"{entry['key']}: {entry['value']}" for entry in job.get("counters", []))
        lines.append(
            f"<div>{escape(job['def']['name'])} <b>{escape(str(job['status']))}</b> "
            f"<span class='faint'>{escape(counters)}</span></div>"
        )
    return "".join(lines) or "<span class='faint'>&ndash;</span>"


def experiment(
    name: str,
    *,
    runs: Sequence[Document],
    files: Mapping[Any, Sequence[Document]],
    jobs: Sequence[Document],
    definitions: Sequence[Document],
    entries: Sequence[Document],
) -> str:
    """One experiment: runs with parameters, files and jobs, then its workflow definitions and texts."""
    shown = runs[:MAX_RUNS]
    rows = [
        [
            _cell(escape(str(run["num"])), "number"),
            _cell(escape(str(run["type"]))),
            _cell(_time(run["begin_time"]) + "<br>" + _state(run)),
            _cell(_parameters(run)),
            _cell(_files(files.get(run["num"], []))),
            _cell(_jobs([job for job in jobs if job["run_num"] == run["num"]])),
        ]
        for run in shown
    ]
    parts = [f"<nav><a href='/'>Logbook</a></nav><h1>{escape(name)}</h1>"]
    parts.append(
        _table(["Run", "Type", "Time (UTC)", "Parameters", "Files", "Jobs"], rows) if rows else "<p>No run yet.</p>"
    )
    if len(runs) > len(shown):
        parts.append(f"<p class='faint'>The latest {len(shown)} of {len(runs)} runs.</p>")
    if definitions:
        table = _table(
            ["Workflow", "Executable", "Trigger", "Location", "As user", "Parameters"],
            [
                [
                    _cell(escape(entry["name"])),
                    _cell(f"<code>{escape(entry['executable'])}</code>"),
                    _cell(_trigger(entry)),
                    _cell(escape(entry["location"])),
                    _cell(escape(str(entry.get("run_as_user", "")))),
                    _cell(f"<code>{_value(entry['parameters'])}</code>"),
                ]
                for entry in definitions
            ],
        )
        parts.append(f"<h2>Workflows</h2>{table}")
    if entries:
        texts = [
            [
                _cell(_time(entry["insert_time"])),
                _cell(escape(entry["author"])),
                _cell(escape(str(entry.get("run_num", "")))),
                _cell(_text(entry)),
            ]
            for entry in reversed(entries)
        ]
        parts.append(f"<h2>Texts</h2>{_table(['Time (UTC)', 'Author', 'Run', 'Text'], texts)}")
    return _page(f"{name} - logbook", "".join(parts))


def _trigger(definition: Document) -> str:
    text = escape(definition["trigger"])
    if definition.get("run_param_name"):
        text += f"<br><code>{escape(definition['run_param_name'])} = {_value(definition.get('run_param_value'))}</code>"
    return text


def _text(entry: Document) -> str:
    title = f"<b>{escape(entry['title'])}</b><br>" if entry.get("title") else ""
    tags = " ".join(escape(tag) for tag in entry.get("tags", []))
    return f"{title}{escape(entry['content'])} <span class='faint'>{tags}</span>"
