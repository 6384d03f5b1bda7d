"""How long a failing call is repeated, and when it is given up: one rule for all operators, sensors and triggers.

A failed query means UNKNOWN, never "finished": the remote work goes on while we cannot see it. So transient errors are
repeated with growing pauses until they have lasted for `limit_s` without one success in between.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from lclstream.security.errors import AuthenticationError, CredentialsError, PeerError, ServiceError, UnreachableError

__all__ = [
    "AuthenticationError",
    "CredentialsError",
    "Patience",
    "PeerError",
    "ServiceError",
    "UnreachableError",
    "insist",
]

Answer = TypeVar("Answer")


class Patience:
    """Decides after a failed call whether to try again, and when.

    :param limit_s: give up when calls have failed for that long without a success, in seconds
    :param first_s: the first pause, in seconds; each further one is twice as long
    :param longest_s: no pause is longer than that, in seconds
    :param clock: a monotonic clock in seconds
    """

    def __init__(
        self,
        limit_s: float,
        *,
        first_s: float = 0.5,
        longest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_s = limit_s
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._since: float | None = None
        self._failures = 0
        self._proven = False

    def succeeded(self) -> None:
        """A call was answered: count from the beginning again."""
        self._since = None
        self._failures = 0
        self._proven = True

    def pause_after(self, error: Exception) -> float | None:
        """Seconds to wait before the next try, or None: give up. What is no `PeerError` may always pass.

        A refused certificate is given up at once, unless an earlier call was accepted: a service that is being
        restarted drops connections in the same way as one that does not like our certificate.
        """
        if isinstance(error, PeerError):
            transient = error.retry or (self._proven and isinstance(error, AuthenticationError))
            if not transient:
                return None
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since >= self.limit_s:
            return None
        pause = min(self._first_s * 2.0 ** min(self._failures, 16), self._longest_s)
        self._failures += 1
        # Many tasks that lost the same service must not come back in the same instant.
        return min(pause * random.uniform(0.75, 1.25), max(0.0, self.limit_s - (now - self._since)))  # noqa: S311


def insist(call: Callable[[], Answer], *, limit_s: float, sleep: Callable[[float], None] = time.sleep) -> Answer:
    """The answer of a call that may safely be repeated, after transient errors for at most `limit_s` seconds.

    Raises:
        PeerError: the last error, when it is not transient or has lasted too long.
    """
    patience = Patience(limit_s)
    while True:
        try:
            return call()
        except PeerError as error:
            pause = patience.pause_after(error)
            if pause is None:
                raise
            sleep(pause)
