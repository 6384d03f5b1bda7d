"""Whether a file has changed since it was read, without watching it."""

from __future__ import annotations

import time
from pathlib import Path

Stamp = tuple[int, ...]

#: A file changed less than this long ago, in nanoseconds, may change again with the same time stamp.
_TICK_NS = 100_000_000


def stamp(path: Path) -> Stamp | None:
    """What identifies a file's present content and mode; None when it cannot be looked at.

    Take it before reading: a change in between is then seen the next time. A file that was changed this very moment
    has a stamp that equals no other, because file systems' clocks are too coarse to tell two quick changes apart.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    known = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
    if abs(time.time_ns() - status.st_ctime_ns) < _TICK_NS:
        return (*known, time.monotonic_ns())
    return known
