"""Leases: a job that somebody promised to look after is ended when he does no longer.

How long a lease is lies in the job's folder; when it ends is known only here. After a restart of the service every
lease begins anew, because nobody could renew it while the service was away.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable


class Leases:
    """When each lease ends. The event loop owns it.

    Args:
        expired: called with the job's id when its lease was not renewed in time; the lease is gone then.
        clock: a monotonic clock, seconds.
    """

    def __init__(self, expired: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._expired = expired
        self._clock = clock
        self._ends: dict[str, float] = {}
        self._earlier = asyncio.Event()
        self._looks_at = math.inf

    def __len__(self) -> int:
        return len(self._ends)

    def renew(self, stamp: str, lease_s: float) -> None:
        """Let a job's lease end `lease_s` seconds from now; it gets one if it had none."""
        end = self._ends[stamp] = self._clock() + lease_s
        if end < self._looks_at:
            self._earlier.set()

    def drop(self, stamp: str) -> None:
        """Forget a job's lease, if it has one."""
        self._ends.pop(stamp, None)

    def end_due(self) -> None:
        """Tell of every lease whose time is over."""
        now = self._clock()
        for stamp in [stamp for stamp, end in self._ends.items() if end <= now]:
            self.drop(stamp)
            self._expired(stamp)

    async def watch(self) -> None:
        """Tell of leases as they end, until cancelled."""
        while True:
            self._earlier.clear()
            self.end_due()
            self._looks_at = min(self._ends.values(), default=math.inf)
            pause = None if math.isinf(self._looks_at) else max(0.0, self._looks_at - self._clock())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._earlier.wait(), pause)
