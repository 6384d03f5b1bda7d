"""LCLS-II data while they are taken: shared memory of a monitoring server, and the data acquisition itself."""

from __future__ import annotations

import ctypes
import os
import types
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from lclstreamer import models
from lclstreamer.errors import SourceError
from lclstreamer.events import Event
from lclstreamer.sources import _psana
from lclstreamer.sources.base import SourceContext
from lclstreamer.sources.detector import call_of
from lclstreamer.sources.psana2 import Psana2EventSource
from lclstreamer.sources.psana2_data import timestamp_ns

pytestmark = pytest.mark.skipif(find_spec("psana") is None, reason="psana (LCLS-II) is not installed")
QUEUES = ctypes.CDLL(None, use_errno=True)


class Server:
    """What psana's DataSource is for shared memory: the server gives each of its clients events of its own."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.asked: list[dict[str, Any]] = []

    def data_source(self, **options: Any) -> Any:
        self.asked.append(options)
        run = types.SimpleNamespace(expt="tmo100", runnum=12, timestamp=1, detnames=set(), epicsinfo={})
        run.events = lambda: iter(
            [types.SimpleNamespace(timestamp=(1_112_090_400 << 32) + number) for number in range(self.events)]
        )
        return types.SimpleNamespace(runs=lambda: iter([run]))


@pytest.fixture
def tag() -> Iterator[str]:
    """A tag that a monitoring server has announced."""
    name = f"lclstream-{uuid.uuid4().hex}"
    queue = QUEUES.mq_open(_psana._QUEUE.format(name).encode(), os.O_CREAT | os.O_RDWR, 0o600, None)
    if queue < 0:
        pytest.skip(f"this system gives no message queues: {os.strerror(ctypes.get_errno())}")
    QUEUES.mq_close(queue)
    yield name
    QUEUES.mq_unlink(_psana._QUEUE.format(name).encode())


def source(identifier: str, rank: int = 0, size: int = 1, limit: int | None = None) -> Psana2EventSource:
    return Psana2EventSource(
        models.Psana2EventSource(type="Psana2EventSource"), SourceContext(identifier, {}, rank, size, limit)
    )


def read(opened: Psana2EventSource) -> list[Event]:
    opened.open()
    try:
        return list(opened.events())
    finally:
        opened.close()


def test_the_server_of_shared_memory_divides_the_events(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(events=10)
    monkeypatch.setattr(_psana.psana2(), "DataSource", server.data_source)
    events = [read(source(f"shmem={tag}", rank, 2)) for rank in (0, 1)]
    assert [len(one) for one in events] == [10, 10], "each rank keeps all that it is given"
    assert len({event.index for one in events for event in one}) == 20
    assert events[0][3].timestamp_ns == timestamp_ns((1_112_090_400 << 32) + 3)
    assert (events[0][0].run.experiment, events[0][0].run.run) == ("tmo100", 12)
    assert server.asked[0] == {"shmem": tag, "log_level": "WARNING", "skip_calib_load": "all"}


def test_a_limit_is_over_all_ranks_of_shared_memory(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_psana.psana2(), "DataSource", Server(events=10).data_source)
    assert sum(len(read(source(f"shmem={tag}", rank, 3, limit=8))) for rank in range(3)) == 8
    assert len(read(source(f"shmem={tag},max_events=4"))) == 4


def test_shared_memory_that_nobody_offers_is_told_after_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_psana, "MONITOR_S", 0.3)
    with pytest.raises(SourceError, match=r"no monitoring server offers the shared memory 'nobody-is-there'"):
        source("shmem=nobody-is-there").open()


def test_the_data_acquisition_is_read_only_from_within_it() -> None:
    with pytest.raises(SourceError, match=r"drp=tag cannot be opened: .* only in a process that the data acquisition"):
        source("drp=tag").open()


def test_a_compiled_field_that_tells_no_arguments_is_called_with_or_without_the_event() -> None:
    # Compiled classes that have no signature; dict takes no such thing as an event.
    found = types.SimpleNamespace(per_event=str, fixed=dict)
    assert call_of("place", found, "detector", "per_event")(7) == "7"
    assert call_of("place", found, "detector", "fixed")(7) == {}
