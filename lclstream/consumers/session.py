"""`lclstream session`: a job that stays on its nodes for a shift and analyses one stream after the other.

The job's own folder is its letter box, because that is what a job service lets us write from afar::

    inbox/NAME.json    what to analyse: {"url", "experiment", "run", …}; each becomes LCLSTREAM_<KEY> for the command
    inbox/NAME.cancel  end that analysis
    inbox/end          take nothing new, finish what is there, and end
    NAME/              where the command for NAME runs; it may write result.json there
    outbox/NAME.json   how it ended: {"state": "done"|"failed"|"cancelled", "exit_code", "result"}
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

app = typer.Typer(name="session", add_completion=False)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LOOK_S = 0.2
#: After the polite signal, before the other one, in seconds.
_GRACE_S = 10.0
#: As long as a result file may be that becomes facts in Airflow.
_LONGEST_RESULT = 48_000


@dataclass
class _Work:
    name: str
    process: subprocess.Popen[bytes]
    cancelled: bool = False


class Session:
    """Runs a command for each letter.

    Args:
        folder: the job's folder.
        command: what is run; its words.
        at_once: how many at a time; the others wait.
    """

    def __init__(self, folder: Path, command: Sequence[str], at_once: int) -> None:
        self._folder = folder
        self._inbox, self._outbox = folder / "inbox", folder / "outbox"
        self._command = list(command)
        self._at_once = at_once
        self._running: list[_Work] = []
        self._seen: set[str] = set()
        self.ended = {"done": 0, "failed": 0, "cancelled": 0}
        self.stop = False

    def run(self) -> None:
        """Work until the end is asked for, or `stop` is set."""
        self._inbox.mkdir(exist_ok=True)
        self._outbox.mkdir(exist_ok=True)
        try:
            while not self.stop:
                self._reap()
                waiting = self._waiting()
                if not waiting and not self._running and (self._inbox / "end").exists():
                    return
                for name in waiting[: self._at_once - len(self._running)]:
                    self._begin(name)
                time.sleep(_LOOK_S)
        finally:
            for work in self._running:
                self._end(work)
            self._reap()
            _write(self._folder / "result.json", {"acquisitions": sum(self.ended.values()), **self.ended})

    def _waiting(self) -> list[str]:
        """Letters not yet answered, the earliest first."""
        letters = [path for path in self._inbox.glob("*.json") if _NAME.fullmatch(path.stem)]
        letters = [path for path in letters if path.stem not in self._seen]
        return [path.stem for path in sorted(letters, key=lambda path: path.stat().st_mtime_ns)]

    def _begin(self, name: str) -> None:
        try:
            letter = json.loads((self._inbox / f"{name}.json").read_bytes())
        except ValueError as error:
            # Half written: the rest comes soon, unless everything has come.
            if (self._inbox / "end").exists():
                self._seen.add(name)
                print(f"{name}: cannot be read: {error}", flush=True)
                self.ended["failed"] += 1
                _write(self._outbox / f"{name}.json", {"state": "failed", "exit_code": None, "result": {}})
            return
        self._seen.add(name)
        if (self._outbox / f"{name}.json").exists():
            # Answered before the job was requeued.
            return
        known = letter if isinstance(letter, dict) else {}
        environment = {f"LCLSTREAM_{key.upper()}": str(value) for key, value in known.items() if _KEY.fullmatch(key)}
        place = self._folder / name
        place.mkdir(exist_ok=True)
        print(f"{name}: begins", flush=True)
        process = subprocess.Popen(
            self._command,
            cwd=place,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._running.append(_Work(name, process))

    def _reap(self) -> None:
        for work in list(self._running):
            if (self._inbox / f"{work.name}.cancel").exists() and work.process.poll() is None:
                self._end(work)
            code = work.process.poll()
            if code is None:
                continue
            self._running.remove(work)
            state = "cancelled" if work.cancelled else "failed" if code else "done"
            self.ended[state] += 1
            result = _read_result(self._folder / work.name / "result.json")
            _write(self._outbox / f"{work.name}.json", {"state": state, "exit_code": code, "result": result})
            print(f"{work.name}: {state} (exit code {code})", flush=True)

    def _end(self, work: _Work) -> None:
        work.cancelled = True
        for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            try:
                os.killpg(work.process.pid, number)
                work.process.wait(patience_s)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def _read_result(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LONGEST_RESULT:
            print(f"{path}: longer than {_LONGEST_RESULT} bytes: facts belong there, not data", flush=True)
            return {}
        result = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _write(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(document))
    partial.replace(path)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def command(
    words: Annotated[list[str], typer.Argument(help="The command for each stream, and its arguments.")],
    at_once: Annotated[int, typer.Option(min=1, help="How many streams are analysed at a time.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where the letter box is.", file_okay=False)] = Path(),
) -> None:
    """Stay, and run a command for each stream that is put into the letter box, until the end is asked for.

    Example: lclstream session -- sh -c 'lclstream consume run-summary --url "$LCLSTREAM_URL"'

    Exit codes: 0 the end was asked for and everything is done, 2 the command is not there, 130 and 143 ended by a
    signal; analyses under way are ended, too.
    """
    session = Session(folder.absolute(), words, at_once)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        session.stop = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        session.run()
    except OSError as error:
        typer.echo(f"{words[0]}: cannot be started: {error}", err=True)
        raise typer.Exit(2) from error
    if received:
        sys.exit(128 + received[0])
