"""Counting what a rank does, and telling about it while it works."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

log = logging.getLogger("lclstreamer")


@dataclass
class Counters:
    """What a rank has done. Written by the main thread, read by others.

    Attributes:
        events: sent or about to be sent.
        skipped: events left out because a data source gave nothing (`skip_incomplete_events`).
        dropped: events a pipeline left out.
        messages: made.
        nbytes: bytes of all messages.
        missing: data source to how many events it gave nothing for.
        waited_s: seconds the main thread waited for data handlers.
        read_s: seconds it waited for the event source and data sources.
        delivered: handler to messages delivered.
        pipelines: what the pipelines counted.
    """

    rank: int = 0
    events: int = 0
    skipped: int = 0
    dropped: int = 0
    messages: int = 0
    nbytes: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    waited_s: float = 0.0
    read_s: float = 0.0
    seconds: float = 0.0
    delivered: dict[str, int] = field(default_factory=dict)
    pipelines: dict[str, int] = field(default_factory=dict)
    finished: bool = False

    def __post_init__(self) -> None:
        #: Brings waiting times up to date before they are told.
        self.refresh: Callable[[], None] = lambda: None

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for people."""
        seconds = max(self.seconds, 1e-9)
        text = (
            f"{self.events} events, {self.messages} messages, {size(self.nbytes)} in {seconds:.1f} s "
            f"({self.events / seconds:.0f} events/s, {size(self.nbytes / seconds)}/s; "
            f"waiting for sinks {100 * self.waited_s / seconds:.0f} %, for data {100 * self.read_s / seconds:.0f} %)"
        )
        if self.skipped:
            text += f", {self.skipped} incomplete events left out"
        if self.dropped:
            text += f", {self.dropped} events dropped by pipelines"
        if self.missing:
            text += ", missing values: " + ", ".join(f"{name} {count}" for name, count in self.missing.items())
        return text


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def total(counters: list[Counters]) -> Counters:
    """All ranks together; the times are those of the slowest."""
    whole = Counters()
    for one in counters:
        for name in ("events", "skipped", "dropped", "messages", "nbytes"):
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
        for name in ("seconds", "waited_s", "read_s"):
            setattr(whole, name, max(getattr(whole, name), getattr(one, name)))
        for name in ("missing", "delivered", "pipelines"):
            mine = getattr(whole, name)
            for key, count in getattr(one, name).items():
                mine[key] = mine.get(key, 0) + count
    whole.finished = all(one.finished for one in counters)
    return whole


class Reporter:
    """A thread that logs the counters every few seconds."""

    def __init__(self, counters: Counters, interval_s: float = 5.0) -> None:
        self._counters = counters
        self._interval = interval_s
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._counters.seconds = time.monotonic() - self._started

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._counters.seconds = time.monotonic() - self._started
            self._counters.refresh()
            log.info("%s", self._counters.sentence())
