"""Ending a program by SIGINT or SIGTERM at a place of its choice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class StoppedBySignal(BaseException):
    """SIGINT or SIGTERM came.

    Attributes:
        number: signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def name(self) -> str:
        """``SIGINT`` or ``SIGTERM``."""
        return signal.Signals(self.number).name


class Stopping:
    """While in its ``with``, signals end the program at the next :meth:`interruptible` or :meth:`check`.

    A second signal ends it wherever it is. Only the main thread may use this.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._open = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        again, self._number = self._number is not None, number
        if self._open or again:
            self._open = False
            raise StoppedBySignal(number)

    def check(self) -> None:
        """Raise StoppedBySignal when a signal has come."""
        if self._number is not None:
            raise StoppedBySignal(self._number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which a signal raises at once: for waiting, not for work that must not be half done."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False
