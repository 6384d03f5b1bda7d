"""How a stream that is analysed ends."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from lclstream.client import Statistics
from lclstream.client.pulling import Puller
from lclstream.consumers.following import follow


class Source:
    """A puller of these messages."""

    urls = ("tcp://127.0.0.1:1",)

    def __init__(self, *messages: bytes) -> None:
        self.statistics = Statistics()
        self._messages = list(messages)
        self.closed = False

    def open(self) -> Source:
        return self

    def receive(self) -> bytes | None:
        return self._messages.pop(0) if self._messages else None

    def close(self) -> None:
        self.closed = True


class Counting:
    def __init__(self, error: Exception | None = None) -> None:
        self.events = 0
        self._error = error

    def add(self, batch: Any, received_unix_s: float) -> None:
        if self._error is not None and self.events:
            raise self._error
        self.events += batch.events


def test_a_stream_that_ends_is_complete(message):
    analysis = Counting()
    outcome = follow(cast(Puller, Source(*(message(first, np.zeros((2, 4, 4))) for first in (0, 2)))), analysis)
    assert (outcome.complete, outcome.exit_code, analysis.events) == (True, 0, 4)


@pytest.mark.parametrize("error", [ValueError("no"), IndexError("boolean index did not match"), KeyError("/data/x")])
def test_an_analysis_that_fails_ends_the_run_so_that_its_results_can_be_kept(message, error):
    source, analysis = Source(*(message(first, np.zeros((2, 4, 4))) for first in (0, 2))), Counting(error)
    outcome = follow(cast(Puller, source), analysis)
    assert (outcome.complete, outcome.exit_code, analysis.events) == (False, 1, 2)
    assert str(error) in (outcome.reason or "")
    assert source.closed
