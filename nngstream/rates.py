"""How fast something grows: bytes a second over the last few seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 5.0


class Rate:
    """Average growth of a counter over the last :data:`WINDOW_S` seconds; one thread uses it."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, value: int) -> None:
        """Note the counter's value, at most about once a second."""
        self._samples.append((now, value))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """Growth a second; 0 before two samples are there."""
        if len(self._samples) < 2:
            return 0.0
        (before, low), (now, high) = self._samples[0], self._samples[-1]
        return max(0.0, (high - low) / (now - before)) if now > before else 0.0
