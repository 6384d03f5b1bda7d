"""The engine of one rank, in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclstreamer import config
from lclstreamer.engine import Engine
from lclstreamer.errors import HandlerError
from lclstreamer.events import Event, Message
from lclstreamer.handlers.base import Handler
from lclstreamer.progress import Counters, size, total
from lclstreamer.serializers.codecs import BitshuffleCodec
from lclstreamer.sources.base import EventSource


def run(internal: dict[str, Any], folder: Path, **options: Any) -> tuple[Engine, list[bytes]]:
    internal["data_handlers"][0]["write_directory"] = str(folder)
    engine = Engine(config.from_mapping(internal), **options)
    engine.open()
    engine.run()
    rank = options.get("rank", 0)
    count = len(list(folder.glob(f"r{rank}_*.h5")))
    return engine, [(folder / f"r{rank}_{number}.h5").read_bytes() for number in range(count)]


def test_a_last_partial_batch_is_sent(internal: dict[str, Any], tmp_path: Path, datasets: Any) -> None:
    engine, messages = run(internal, tmp_path)
    found = [datasets(message) for message in messages]
    assert [one["/data/random"].shape for one in found] == [(10, 4, 3), (10, 4, 3), (5, 4, 3)]
    assert [one[""]["sequence"] for one in found] == [0, 1, 2]
    assert (engine.counters.events, engine.counters.messages, engine.counters.finished) == (25, 3, True)
    assert engine.counters.nbytes == sum(map(len, messages))


def test_ranks_send_every_event_once_and_say_who_they_are(
    internal: dict[str, Any], tmp_path: Path, datasets: Any
) -> None:
    events = 0
    for rank in range(3):
        _, messages = run(internal, tmp_path, rank=rank, size=3)
        for message in messages:
            found = datasets(message)
            assert found[""]["rank"] == rank
            events += len(found["/data/number"])
    assert events == 25


def test_num_events_limits_all_ranks_together(internal: dict[str, Any], tmp_path: Path) -> None:
    counts = [run(internal, tmp_path, rank=rank, size=2, limit=7)[0].counters.events for rank in (0, 1)]
    assert counts == [4, 3]


class _Sometimes(EventSource):
    """Ten events; every third has no `random`."""

    def open(self) -> None:
        pass

    def events(self) -> Iterator[Event]:
        for index in range(10):
            value = None if index % 3 == 0 else np.full((2,), index, np.float32)
            yield Event({"random": value, "number": np.array(index)}, index)


@pytest.mark.parametrize("skip", [True, False])
def test_missing_values_are_skipped_or_marked_and_always_counted(
    internal: dict[str, Any], tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    monkeypatch.setattr("lclstreamer.sources.internal.InternalEventSource", _Sometimes)
    internal["skip_incomplete_events"] = skip
    engine, (message,) = run(internal, tmp_path)
    found = datasets(message)
    assert engine.counters.missing == {"random": 4}
    if skip:
        assert found["/data/number"].tolist() == [1, 2, 4, 5, 7, 8]
        assert engine.counters.skipped == 4
    else:
        assert found["/data/number"].tolist() == list(range(10))
        assert found["/data/random_missing"].tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]
        assert np.isnan(found["/data/random"][3]).all()


def test_a_stop_request_sends_what_was_made(
    internal: dict[str, Any], tmp_path: Path, datasets: Any, wait_until: Any
) -> None:
    internal["event_source"]["number_of_events_to_generate"] = 10**9
    internal["data_handlers"][0]["write_directory"] = str(tmp_path)
    engine = Engine(config.from_mapping(internal))
    engine.open()

    def stop_in_the_middle() -> None:
        wait_until(lambda: engine.counters.messages > 0, 60, "the first message")
        engine.stop.set()

    stopper = threading.Thread(target=stop_in_the_middle)
    stopper.start()
    counters = engine.run()
    stopper.join()
    assert not counters.finished
    assert counters.events > 0
    assert counters.delivered["BinaryFileWritingDataHandler"] == counters.messages
    written = [datasets(path.read_bytes()) for path in tmp_path.iterdir()]
    assert sum(len(one["/data/number"]) for one in written) == counters.events


class _Broken(Handler):
    """Fails at the second message."""

    def handle(self, message: Message) -> None:
        message.release()
        self.messages += 1
        if self.messages > 1:
            raise HandlerError("the broken handler is broken")

    def close(self, *, drain: bool, timeout: float | None = None) -> None:
        pass


def test_when_one_handler_fails_the_others_go_on_and_the_run_ends_with_the_error(
    internal: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lclstreamer.handlers.streaming.BinaryDataStreamingDataHandler", _Broken)
    internal["data_handlers"].append({"type": "BinaryDataStreamingDataHandler", "urls": ["tcp://127.0.0.1:1"]})
    with pytest.raises(HandlerError, match="the broken handler is broken"):
        run(internal, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_when_the_only_handler_fails_the_run_ends_at_once(
    internal: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lclstreamer.handlers.files.BinaryFileWritingDataHandler", _Broken)
    internal["event_source"]["number_of_events_to_generate"] = 10**9
    with pytest.raises(HandlerError, match="broken"):
        run(internal, tmp_path)


def test_no_thread_is_left_after_a_run(internal: dict[str, Any], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    run(internal, tmp_path)
    assert set(threading.enumerate()) <= before


def test_the_plan_says_what_a_rank_would_do(internal: dict[str, Any], tmp_path: Path) -> None:
    internal["data_handlers"][0]["write_directory"] = str(tmp_path / "not-made")
    text = "\n".join(Engine(config.from_mapping(internal), rank=1, size=2).plan())
    for expected in ("makes 12 of 25 events", "10 events a message", "random at /data/random"):
        assert expected in text
    assert not (tmp_path / "not-made").exists()


def test_counters_of_ranks_add_up() -> None:
    whole = total(
        [
            Counters(events=3, nbytes=10, missing={"a": 1}, seconds=2.0, finished=True),
            Counters(events=4, nbytes=20, missing={"a": 2, "b": 1}, seconds=3.0, finished=True),
        ]
    )
    assert (whole.events, whole.nbytes, whole.missing, whole.seconds) == (7, 30, {"a": 3, "b": 1}, 3.0)
    assert whole.finished


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (1500, "1.50 kB"), (2.5e6, "2.50 MB"), (3e12, "3.00 TB")])
def test_sizes_are_written_for_people(count: float, text: str) -> None:
    assert size(count) == text


def test_a_codec_that_fails_ends_the_run_with_its_error(
    internal: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("bitshuffle failed with code -80")

    monkeypatch.setattr(BitshuffleCodec, "encode", fail)
    internal["data_sources"]["random"]["array_shape"] = "100,100"
    internal["data_serializer"]["compression"] = "bitshuffle_with_lz4"
    with pytest.raises(HandlerError, match="compressing /data/random failed: bitshuffle failed"):
        run(internal, tmp_path)
    assert not list(tmp_path.glob("*.h5"))
