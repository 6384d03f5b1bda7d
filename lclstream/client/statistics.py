"""What went through a stream's end, and how fast."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field


@dataclass
class Statistics:
    """Counts of one puller or pusher; written by the thread that reads or sends, readable from any.

    Attributes:
        messages: whole messages handed to the caller (pull) or taken from him (push).
        bytes: their payload, without protocol overhead.
        first_unix_s: wall clock (seconds since 1970, UTC) when the first message was there; None before it.
        last_unix_s: the same of the latest message.
        wait_s: seconds the caller waited for messages (pull) or for somebody to take them (push).
        connections: connections made.
        reconnects: connections made again after one broke.
        lost: messages known to be lost: cut off half way by a connection that broke.
    """

    messages: int = 0
    bytes: int = 0
    first_unix_s: float | None = None
    last_unix_s: float | None = None
    wait_s: float = 0.0
    connections: int = 0
    reconnects: int = 0
    lost: int = 0
    _first: float = field(default=0.0, repr=False)
    _last: float = field(default=0.0, repr=False)

    def count(self, size: int) -> None:
        """One more message of `size` bytes."""
        # Rates use the monotonic clock: an NTP step must not make them negative.
        self._last, self.last_unix_s = time.monotonic(), time.time()
        if self.first_unix_s is None:
            self._first, self.first_unix_s = self._last, self.last_unix_s
        self.messages += 1
        self.bytes += size

    @property
    def seconds(self) -> float:
        """Time between the first and the latest message."""
        return self._last - self._first

    @property
    def rate_bytes_s(self) -> float:
        """Bytes per second between the first and the latest message; 0 with fewer than two messages."""
        return self.bytes / self.seconds if self.messages > 1 and self.seconds > 0 else 0.0

    @property
    def rate_messages_s(self) -> float:
        """Messages per second, likewise."""
        return self.messages / self.seconds if self.messages > 1 and self.seconds > 0 else 0.0

    def document(self) -> dict[str, float | int | None]:
        """The public numbers as a JSON-able mapping."""
        numbers = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return {
            **numbers,
            "seconds": self.seconds,
            "rate_bytes_s": self.rate_bytes_s,
            "rate_messages_s": self.rate_messages_s,
        }

    def __str__(self) -> str:
        return (
            f"{self.messages} messages, {in_units(self.bytes)}B in {self.seconds:.1f} s "
            f"({self.rate_messages_s:.1f} messages/s, {in_units(self.rate_bytes_s)}B/s)"
        )


def in_units(number: float) -> str:
    """A number with a decimal prefix: 1234567 → ``1.23 M`` (put the unit's letter behind it)."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
