"""The cache for training: streamed once, resumed when interrupted, complete or not at all."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lclstream.client import BrokenStream, NoPeerError, StreamError, push
from lclstream.client.batch import Batch
from lclstream.dataset import CacheError, StreamDataset, configuration_key
from lclstreamer import models
from lclstreamer.events import Event, RunInfo
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.simplon import SimplonBinarySerializer
from lclstreamer.serializers.simplon_v2 import SimplonV2Serializer


def message(first: int, count: int, *, times: bool = True) -> bytes:
    numbers = np.arange(first, first + count)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["/number"] = numbers
        file["/image"] = numbers[:, None, None] * np.ones((1, 8, 8), np.float32)
        if times:
            file["/timestamp_ns"] = 1_700_000_000_000_000_000 + numbers
    return buffer.getvalue()


@contextmanager
def streamed(url: str, messages: list[bytes], tls: ssl.SSLContext | None = None) -> Iterator[None]:
    def send() -> None:
        try:
            with push(url, listen=True, timeout_s=10, tls=tls) as pusher:
                for each in messages:
                    pusher.send(each)
        except StreamError:
            pass  # the reader left early: that is what the test is about

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def make(tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., tuple[StreamDataset, str]]:
    def made(**options: object) -> tuple[StreamDataset, str]:
        url = f"tcp://127.0.0.1:{free_port()}"
        return StreamDataset(url, tmp_path, key="run7", timeout_s=30, **options), url

    return made


def numbers(batches) -> list[int]:
    return [int(number) for batch in batches for number in batch["/number"]]


def test_the_first_epoch_streams_and_later_ones_read_the_cache(make):
    dataset, url = make()
    with streamed(url, [message(first, 5) for first in range(0, 20, 5)]):
        first = numbers(dataset)
    assert first == list(range(20))
    assert dataset.complete
    assert numbers(dataset) == first  # nobody listens at the URL any more
    assert dataset.cached_events == 20
    batch = next(iter(dataset))
    np.testing.assert_array_equal(batch["/image"][3], np.full((8, 8), 3, np.float32))


@pytest.mark.parametrize("times", [True, False])
def test_an_interrupted_epoch_is_resumed_without_losing_or_repeating_an_event(make, times):
    dataset, url = make()
    messages = [message(first, 5, times=times) for first in range(0, 20, 5)]
    with streamed(url, messages):
        assert numbers(itertools.islice(dataset, 2)) == list(range(10))
    assert not dataset.complete
    with streamed(url, messages):
        assert numbers(dataset) == list(range(20))
    assert dataset.complete
    assert numbers(dataset) == list(range(20))


def test_events_that_come_in_other_batches_the_second_time_are_still_stored_once(make):
    dataset, url = make()
    with streamed(url, [message(first, 4) for first in range(0, 20, 4)]):
        assert numbers(itertools.islice(dataset, 2)) == list(range(8))
    with streamed(url, [message(15, 5), message(5, 10), message(0, 5)]):
        assert sorted(numbers(dataset)) == list(range(20))
    assert sorted(numbers(dataset)) == list(range(20))


def test_a_broken_stream_leaves_an_incomplete_cache_that_a_restart_completes(make, monkeypatch):
    dataset, url = make()

    def broken() -> Iterator[bytes]:
        yield message(0, 5)
        raise BrokenStream("cut")

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "_stream", broken)
        with pytest.raises(BrokenStream):
            dataset.fill()
    assert not dataset.complete
    assert dataset.cached_events == 5
    with streamed(url, [message(0, 5), message(5, 5)]):
        assert dataset.fill() == 10
    assert dataset.complete


def test_a_line_cut_by_a_crash_is_written_again(make):
    dataset, url = make()
    messages = [message(0, 5), message(5, 5)]
    with streamed(url, messages):
        next(iter(dataset))
    with (dataset.folder / "index.jsonl").open("a") as index:
        index.write('{"file": "000001.h5", "by')
    with streamed(url, messages):
        assert numbers(dataset) == list(range(10))


def test_a_damaged_cache_is_told_with_the_remedy(make):
    dataset, url = make()
    with streamed(url, [message(0, 5)]):
        dataset.fill()
    (dataset.folder / "000000.h5").write_bytes(b"short")
    with pytest.raises(CacheError, match=r"delete .*run7"):
        numbers(dataset)


def test_shuffled_epochs_differ_are_complete_and_can_be_repeated(make, tmp_path):
    dataset, url = make(shuffle_seed=3)
    with streamed(url, [message(first, 2) for first in range(0, 40, 2)]):
        dataset.fill()
    one, two = numbers(dataset), numbers(dataset)
    assert one != two
    assert sorted(one) == sorted(two) == list(range(40))
    again = StreamDataset(url, tmp_path, key="run7", shuffle_seed=3)
    assert numbers(again) != list(range(40))
    fresh = [StreamDataset(url, tmp_path, key="run7", shuffle_seed=3) for _ in range(2)]
    assert numbers(fresh[0]) == numbers(fresh[1])


def test_workers_that_live_for_an_epoch_are_told_which_it_is(make):
    dataset, url = make(shuffle_seed=3)
    with streamed(url, [message(first, 2) for first in range(0, 40, 2)]):
        dataset.fill()

    def epoch(number: int) -> list[list[int]]:
        dataset.set_epoch(number)
        copies = [pickle.loads(pickle.dumps(dataset)) for _ in range(2)]  # as torch starts its workers
        return [numbers(copy.batches(shard=(which, 2))) for which, copy in enumerate(copies)]

    orders = [epoch(number) for number in range(3)]
    assert all(sorted(one + two) == list(range(40)) for one, two in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch(1) == orders[1]


def test_an_epoch_that_is_set_is_the_next_and_others_follow_it(make):
    dataset, url = make(shuffle_seed=3)
    with streamed(url, [message(first, 2) for first in range(0, 40, 2)]):
        dataset.fill()
    dataset.set_epoch(5)
    fifth, sixth = numbers(dataset), numbers(dataset)
    dataset.set_epoch(6)
    assert numbers(dataset) == sixth != fifth


def test_workers_share_a_complete_cache_and_are_refused_an_incomplete_one(make):
    dataset, url = make()
    with pytest.raises(CacheError, match=r"fill\(\)"):
        next(dataset.batches(shard=(0, 2)))
    with streamed(url, [message(first, 2) for first in range(0, 10, 2)]):
        dataset.fill()
    shares = [numbers(dataset.batches(shard=(worker, 2))) for worker in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(10))
    assert not set(shares[0]) & set(shares[1])


def test_only_one_process_fills_a_cache(make, tmp_path):
    dataset, url = make()
    other = StreamDataset(url, tmp_path, key="run7", timeout_s=30)
    with streamed(url, [message(0, 5), message(5, 5)]):
        filling = iter(dataset)
        next(filling)
        with pytest.raises(CacheError, match="being filled by process"):
            next(iter(other))
        assert numbers(filling) == list(range(5, 10))


def test_the_key_depends_on_what_the_data_are_not_on_where_they_go(tmp_path):
    config = {"event_source": {"type": "X"}, "data_handlers": [1]}
    assert configuration_key(config) == configuration_key({"data_handlers": [2], "event_source": {"type": "X"}})
    assert configuration_key(config) != configuration_key({"event_source": {"type": "Y"}})
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    options = {"server": "https://127.0.0.1:1", "credentials": tmp_path}
    from_file = StreamDataset(tmp_path / "c.yaml", tmp_path, **options)
    assert from_file.key == StreamDataset(config, tmp_path, **options).key == configuration_key(config)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("tcp://127.0.0.1:1", {}, "a key"),
        ({"a": 1}, {}, "server= and credentials="),
        ("/nowhere/config.yaml", {}, "/nowhere/config.yaml"),
        ("tcp://127.0.0.1:1", {"key": "../x"}, "no name of a folder"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tmp_path, source, options, words):
    with pytest.raises(CacheError, match=words):
        StreamDataset(source, tmp_path, **options)


def test_nobody_at_the_url_is_told_and_leaves_no_complete_cache(make, monkeypatch):
    monkeypatch.setattr("lclstream.dataset.pull", _impatient)
    dataset, _ = make()
    with pytest.raises(NoPeerError):
        dataset.fill()
    assert not dataset.complete


def _impatient(url: str, **options):
    from lclstream.client import pull

    return pull(url, **options, connect_timeout_s=0.2)


def simplon(version: str, events: int) -> list[bytes]:
    """The messages of two ranks, as they may arrive: those of the rank that begins the series not first."""
    ranks = []
    for rank in (0, 1):
        context = SerializerContext("exp=mfx", "ab" * 32, "1.0", rank=rank, size=2)
        common: dict[str, Any] = {
            "data_source_to_serialize": "image",
            "detector_name": "jungfrau",
            "detector_type": "x",
        }
        serializer: Any
        if version == "v2":
            options = models.SimplonV2Serializer(type="SimplonV2Serializer", **common)
            serializer = SimplonV2Serializer(options, context)
        else:
            old = models.SimplonBinarySerializer(
                type="SimplonBinarySerializer",
                polarization_fraction=0,
                polarization_axis=[1.0, 0.0, 0.0],
                data_collection_rate="120Hz",
                **common,
            )
            serializer = SimplonBinarySerializer(old, context)
        messages = []
        for index in range(rank, events, 2):
            values = {
                "timestamp": np.array(float((1_112_090_400 << 32) + 8_333_333 * index)),
                "image": np.full((2, 8, 8), index, np.uint16),
                "detector_geometry": np.array(["jungfrau_1", "geometry text"]),
                "run_info": np.array(["mfx100852324", "123", "51", "exp=mfx100852324,run=51"]),
            }
            event = Event(values, index, RunInfo("mfx100852324", 51), 1_743_242_400_000_000_000 + 8_333_333 * index)
            messages += [bytes(one) for one in serializer.add(event)]
        ranks.append(messages + [bytes(one) for one in serializer.end()])
    # Two images of rank 0, then both ranks in turn; rank 0 ends before the other.
    return [
        *ranks[0][:2],
        *(one for pair in itertools.zip_longest(ranks[1], ranks[0][2:]) for one in pair if one is not None),
    ]


def contents(batches: Iterable[Batch]) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """Value of an image to all that its batch says."""
    found = {}
    for batch in batches:
        (image,) = (path for path in batch if path.startswith("/data/"))
        assert batch[image].dtype == np.uint16
        number = int(batch[image].flat[0])
        assert (batch[image] == number).all()
        assert number not in found
        found[number] = ({path: batch[path].tolist() for path in batch}, batch.attributes)
    return found


@pytest.mark.parametrize("version", ["1.8", "v2"])
def test_simplon_streams_are_stored_with_what_their_start_messages_say(make, version):
    dataset, url = make(shuffle_seed=3)
    with streamed(url, simplon(version, 20)):
        first = contents(dataset)
    assert sorted(first) == list(range(20))
    assert dataset.cached_events == 20
    later = contents(dataset)
    assert later.keys() == first.keys()
    for number, (arrays, about) in first.items():
        assert later[number][0] == arrays
        assert later[number][1] == about
        assert about["experiment"] == "mfx100852324"
    dataset, _ = make()  # each worker has a data set of its own
    shares = [contents(dataset.batches(shard=(which, 3))) for which in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(20))


@pytest.mark.parametrize("version", ["1.8", "v2"])
def test_an_interrupted_simplon_stream_is_resumed_without_losing_or_repeating_an_event(make, version):
    dataset, url = make()
    with streamed(url, simplon(version, 20)):
        begun = contents(itertools.islice(dataset, 7))
    assert len(begun) == 7
    assert not dataset.complete
    with streamed(url, simplon(version, 20)):
        assert sorted(contents(dataset)) == list(range(20))
    assert dataset.complete
    assert sorted(contents(dataset)) == list(range(20))


def test_simplon_images_without_their_start_message_leave_the_cache_incomplete(make):
    dataset, url = make()
    images = [one for one in simplon("1.8", 6) if one[:1] == b"m"]
    with streamed(url, images), pytest.raises(StreamError, match="no start message"):
        dataset.fill()
    assert not dataset.complete
    assert dataset.cached_events == 0


@pytest.mark.parametrize("begun", ["never", "afterwards"])
def test_simplon_images_whose_series_is_stopped_before_it_was_started_wait_for_its_start(make, begun):
    dataset, url = make()
    messages = simplon("1.8", 6)
    images = [one for one in messages if one[:1] == b"m"]
    start, stop = (one for one in messages if one[:1] == b"c")
    # The last rank of the engine sends its stop message even when it had no event, and then it has sent no start.
    with streamed(url, [*images, stop, *([start] if begun == "afterwards" else [])]):
        if begun == "afterwards":
            assert sorted(contents(dataset)) == list(range(6))
        else:
            with pytest.raises(StreamError, match="no start message"):
                dataset.fill()
    assert dataset.complete is (begun == "afterwards")


@pytest.mark.parametrize("named", ["by the caller", "by the environment"])
def test_an_encrypted_stream_is_read_with_our_certificate(named, sites, tmp_path, free_port, monkeypatch):
    url = f"tls+tcp://127.0.0.1:{free_port()}"
    alice = sites["s3df"].member("alice").folder
    if named == "by the environment":
        monkeypatch.setenv("LCLSTREAM_CREDENTIALS", str(alice))
    dataset = StreamDataset(
        url, tmp_path, key="run7", timeout_s=10, credentials=alice if named == "by the caller" else None
    )
    with streamed(url, [message(0, 5), message(5, 5)], sites["s3df"].member("buffer").server_context()):
        assert dataset.fill() == 10
