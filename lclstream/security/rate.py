"""Token buckets: how often somebody may ask, on average and at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from pydantic import BaseModel, ConfigDict, Field

#: Callers remembered before the idle ones are forgotten.
_MOST = 10_000


class Rate(BaseModel):
    """A rate with bursts.

    Attributes:
        per_s: requests a second in the long run.
        burst: requests at once after a pause.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_s: float = Field(gt=0, allow_inf_nan=False)
    burst: int = Field(ge=1)


class TokenBuckets:
    """One bucket a caller. It fills with `per_s` tokens a second up to `burst`; each request takes one.

    Args:
        rate: how fast, and how many at once.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, rate: Rate, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: dict[Hashable, tuple[float, float]] = {}  # caller: (tokens, when counted)

    def take(self, caller: Hashable) -> float:
        """Take one token. Returns 0 when there was one, else the seconds until there is one; then none is taken."""
        now = self._clock()
        tokens = self._tokens(caller, now)
        if tokens < 1:
            # Kept as it was, so that asking again and again does not postpone the next token.
            return (1 - tokens) / self._rate.per_s
        self._buckets[caller] = (tokens - 1, now)
        if len(self._buckets) > _MOST:
            self._forget_full(now)
        return 0.0

    def __len__(self) -> int:
        return len(self._buckets)

    def _tokens(self, caller: Hashable, now: float) -> float:
        tokens, counted = self._buckets.get(caller, (float(self._rate.burst), now))
        return min(float(self._rate.burst), tokens + (now - counted) * self._rate.per_s)

    def _forget_full(self, now: float) -> None:
        # A full bucket is the same as none.
        self._buckets = {
            caller: bucket for caller, bucket in self._buckets.items() if self._tokens(caller, now) < self._rate.burst
        }
