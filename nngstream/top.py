"""A live view of running buffers in the terminal: where the data are, how fast, and what they wait for."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PATIENCE_S = 5
_COLOURS = {"waiting": "yellow", "streaming": "green", "draining": "cyan", "done": "green", "failed": "red"}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
#: Peers shown of each buffer: the busiest, and all that lost something.
_MOST_PEERS = 20


class Source:
    """One buffer's status, and the one before it.

    Args:
        url: of the status server, with or without ``/status``.
        context: for ``https``.
    """

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        self.url = url.rstrip("/").removesuffix("/status") + "/status"
        self._context = context
        self.status: dict[str, Any] | None = None
        self.before: dict[str, Any] | None = None
        self.error: str | None = None

    def fetch(self) -> bool:
        """Read the status; says whether the buffer answered."""
        try:
            with urllib.request.urlopen(self.url, timeout=_PATIENCE_S, context=self._context) as answer:  # noqa: S310
                status = json.load(answer)
        except (OSError, ValueError, http.client.HTTPException) as error:  # the last: it ended inside its answer
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            self.error = str(reason)
            return False
        self.before, self.status, self.error = self.status, status, None
        return True

    def rate(self, peer: dict[str, Any]) -> float | None:
        """Bytes a second of a peer between the last two answers."""
        if self.before is None or self.status is None or self.status["time"] <= self.before["time"]:
            return None
        for old in self.before["peers"]:
            if (old["side"], old["address"], old["connected"]) == (peer["side"], peer["address"], peer["connected"]):
                return float(peer["bytes"] - old["bytes"]) / float(self.status["time"] - self.before["time"])
        return None


def amount(number: float | None) -> str:
    """Bytes for people."""
    if number is None:
        return "-"
    for unit in _UNITS:
        if abs(number) < 1000 or unit == _UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError("the last unit takes everything")


def waits_for(status: dict[str, Any]) -> str:
    """One sentence: why data do not flow, or that they do."""
    if status["state"] in ("done", "failed"):
        return "nothing: it has ended"
    if status["state"] == "waiting":
        return "the first producer"
    if status["held"]["messages"] and not status["consumers"]:
        return "a consumer"
    lonely = [group["out"] for group in status["groups"] if group["queued"]["messages"] and not group["consumers"]]
    if lonely:
        return f"a consumer at {lonely[0]}"
    if status["producers_waiting"]:
        return "consumers, which are slower than the producers: the memory is full"
    if status["held"]["messages"] and status["oldest_age_s"] > 2:
        return "consumers, which take their time"
    if status["state"] == "streaming" and not status["producers"]:
        return "more producers, or the end of the grace"
    return "nothing: data flow" if status["rate_in_bytes_s"] or status["rate_out_bytes_s"] else "data"


def view(source: Source) -> RenderableType:
    """What is shown of one buffer."""
    status = source.status
    if status is None:
        return Text(f"{source.url}: {source.error}", style="red")
    state = status["state"]
    title = Text.assemble(
        (status["name"], "bold"),
        "  ",
        (state, _COLOURS.get(state, "")),
        f"  in {amount(status['rate_in_bytes_s'])}/s  out {amount(status['rate_out_bytes_s'])}/s",
        f"  {status['producers']} producers  {status['consumers']} consumers",
    )
    held, capacity = status["held"]["bytes"], status["capacity_bytes"]
    bar = Table.grid(padding=(0, 1))
    disk = f", {amount(status['disk_bytes'])} on disk" if status["disk_bytes"] else ""
    bar.add_row(
        ProgressBar(total=capacity, completed=min(held, capacity), width=30),
        f"{amount(held)} held of {amount(capacity)}{disk}, most {amount(status['high_water_bytes'])}, "
        f"oldest {status['oldest_age_s']:.1f} s",
    )
    counts = "   ".join(
        f"{key} {status[key]['messages']:,} ({amount(status[key]['bytes'])})"
        for key in ("received", "sent", "held", "lost")
    )
    lines: list[RenderableType] = [
        title,
        bar,
        Text(counts, style="red" if status["lost"]["messages"] else ""),
        Text(f"waits for: {waits_for(status)}", style="italic"),
        _peers(source, status),
    ]
    if status["refused"]:
        lines.append(Text(f"refused {status['refused']}: {status['last_refusal']}", style="yellow"))
    if source.error is not None:
        lines.append(Text(f"does not answer any more: {source.error}", style="red"))
    return Group(*lines, "")


def _peers(source: Source, status: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("side", "left"), ("protocol", "left"), ("peer", "left"), ("messages", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("bytes", "rate", "lost"):
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    shown = [peer for peer in status["peers"] if peer["ended"] is None or peer["lost_messages"]]
    shown.sort(key=lambda peer: (peer["side"], peer["ended"] is not None, -peer["bytes"]))
    for peer in shown[:_MOST_PEERS]:
        rate = source.rate(peer) if peer["ended"] is None else None
        table.add_row(
            peer["side"],
            peer["protocol"],
            peer["subject"] or peer["buffer"] or peer["address"],
            f"{peer['messages']:,}",
            amount(peer["bytes"]),
            "-" if rate is None else f"{amount(rate)}/s",
            str(peer["lost_messages"] or ""),
            peer["ended"] or "",
        )
    if len(shown) > _MOST_PEERS:
        table.add_row("", "", f"and {len(shown) - _MOST_PEERS} more")
    return table


def show(sources: list[Source], interval_s: float, *, once: bool) -> int:
    """Show buffers until the last one has gone, or Ctrl-C.

    Returns:
        Exit code: 0, or 3 when none answered at the beginning.
    """
    console = Console()
    answered = [source.fetch() for source in sources]
    if once or not any(answered):
        for source in sources:
            console.print(view(source))
        return 0 if any(answered) else 3
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(Group(*map(view, sources)), console=console, auto_refresh=False, screen=True) as live:
                _follow(sources, interval_s, lambda shown: live.update(shown, refresh=True))
        else:  # a log file: one view after the other
            _follow(sources, interval_s, console.print)
    console.print(Group(*map(view, sources)))
    return 0


def _follow(sources: list[Source], interval_s: float, update: Callable[[Group], None]) -> None:
    while any(source.error is None for source in sources):
        update(Group(*map(view, sources)))
        time.sleep(interval_s)
        for source in sources:
            source.fetch()
