"""The states of a buffer. Pure: facts in, state out.

========= ================================================================= =========
state     what happens                                                      next
========= ================================================================= =========
waiting   a producer has come, or none is needed                            streaming
waiting   a stop signal                                                     draining
streaming enough producers came, none is left, and the grace has passed     draining
streaming a stop signal                                                     draining
draining  no producer's connection is left, and everything has been sent    done
draining  the time after the stop signal has passed, or a second one came   failed
========= ================================================================= =========

Entering `draining` closes the side of the producers for good. `failed` means that a stop signal came before everything
had been given away: what was left is dropped (`lost`), or kept on disk for the next start (`held`). It is no `done` in
either case, since whoever started the buffer would take the consumers to have everything.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """See the module's table."""

    WAITING = "waiting"
    STREAMING = "streaming"
    DRAINING = "draining"
    DONE = "done"
    FAILED = "failed"


class Lifecycle:
    """See the module.

    Args:
        producers: how many must have come.
        grace: seconds without any of them.
    """

    def __init__(self, producers: int, grace: float) -> None:
        self.state = State.WAITING
        self._producers = producers
        self._grace = grace
        self._alone_since: float | None = None
        self._deadline: float | None = None

    def stop(self, now: float, drain_s: float) -> None:
        """A stop signal: messages are given away until ``now + drain_s``."""
        if self.state in (State.WAITING, State.STREAMING):
            self.state = State.DRAINING
        self._deadline = min(now + drain_s, self._deadline if self._deadline is not None else now + drain_s)

    def observe(self, now: float, *, connected: int, seen: int, empty: bool) -> State:
        """Look at the facts.

        Args:
            now: monotonic seconds.
            connected: producers there now.
            seen: producers that ever came.
            empty: nothing is queued and nothing is being sent.
        """
        if self.state is State.WAITING and (seen or not self._producers):
            self.state = State.STREAMING
        if self.state is State.STREAMING:
            if connected or seen < self._producers:
                self._alone_since = None
            elif self._alone_since is None:
                self._alone_since = now
            if self._alone_since is not None and now - self._alone_since >= self._grace:
                self.state = State.DRAINING
        elif self.state is State.DRAINING:
            if empty and not connected:
                self.state = State.DONE
            elif self._deadline is not None and now >= self._deadline:
                self.state = State.FAILED
        return self.state
