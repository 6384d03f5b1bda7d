"""End a measurement's own processes also when it is told to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the program like Ctrl-C, so that it ends the servers it has started.

    Processes forked from it do not unwind: what they hold of their parent's is not theirs to end.
    """
    owner = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
