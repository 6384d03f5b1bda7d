"""Simplon messages and the engine's HDF5 messages, from the engine's own serializers to the client's batches."""

from __future__ import annotations

import builtins
import random
from collections.abc import Iterator
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from lclstream.client import MessageError, Statistics, pull, push, simplon
from lclstream.client.decoding import Decoder
from lclstream.client.pulling import Puller
from lclstream.consumers.following import follow
from lclstream.consumers.run_summary import RunSummary, Settings
from lclstreamer import models
from lclstreamer.events import Event, Ragged, RunInfo
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.hdf5 import HDF5BinarySerializer
from lclstreamer.serializers.simplon import SimplonBinarySerializer
from lclstreamer.serializers.simplon_v2 import TAGS, SimplonV2Serializer

RUN = RunInfo("mfx100852324", 51)
START_NS = 1_743_242_400_000_000_007
#: The same time as psana2 counts: seconds since 1990 above the nanoseconds.
PSANA2 = ((START_NS // 10**9 - 631_152_000) << 32) + START_NS % 10**9
DTYPES = list(TAGS)


def writer(version: str, rank: int = 0, size: int = 1, **options: Any) -> Any:
    context = SerializerContext("exp=mfx", "ab" * 32, "1.0", rank=rank, size=size)
    if version == "v2":
        return SimplonV2Serializer(
            models.SimplonV2Serializer(
                type="SimplonV2Serializer", data_source_to_serialize="image", detector_name="jungfrau", **options
            ),
            context,
        )
    chosen = models.SimplonBinarySerializer(
        type="SimplonBinarySerializer",
        data_source_to_serialize="image",
        polarization_fraction=0,
        polarization_axis=[1.0, 0.0, 0.0],
        data_collection_rate="120Hz",
        detector_name="jungfrau",
        detector_type="AreaDetector",
    )
    return SimplonBinarySerializer(chosen, context)


def event(image: Any, index: int = 0, **more: Any) -> Event:
    values = {
        "timestamp": np.array(float(PSANA2 + index)),
        "image": image,
        "detector_geometry": np.array(["jungfrau_1", "geometry text"]),
        "run_info": np.array(["mfx100852324", "123", "51", "exp=mfx100852324,run=51"]),
        **more,
    }
    return Event(values, index, RUN, START_NS + index)


def written(serializer: Any, events: list[Event]) -> list[bytes]:
    with np.errstate(all="ignore"):  # the sum of an image that Simplon 1.8 has may overflow
        messages = [bytes(message) for one in events for message in serializer.add(one)]
    messages += [bytes(message) for message in serializer.end_batch()]
    return messages + [bytes(message) for message in serializer.end()]


def read(messages: list[bytes]) -> list[Any]:
    decoder = Decoder()
    batches = [batch for number, one in enumerate(messages) for batch in decoder.feed(one, name=f"message {number}")]
    decoder.end()
    return batches


IMAGES = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.lists(st.integers(1, 70), min_size=2, max_size=3).flatmap(
        lambda shape: st.lists(
            arrays_of.arrays(np.dtype(dtype), tuple(shape), fill=st.integers(0, 9).map(np.dtype(dtype).type)),
            min_size=1,
            max_size=4,
        )
    )
)


def same_bits(got: Any, sent: Any) -> bool:
    return got.dtype == sent.dtype and got.shape == sent.shape and got.tobytes() == sent.tobytes()


@settings(max_examples=60, deadline=None)
@given(images=IMAGES, version=st.sampled_from(["1.8", "bslz4", "plain"]), ranks=st.integers(1, 3), data=st.data())
def test_every_image_of_every_rank_comes_back_bit_by_bit(images: Any, version: str, ranks: int, data: Any) -> None:
    options = {} if version == "1.8" else {"compression": "bslz4" if version == "bslz4" else None}
    streams = []
    for rank in range(ranks):
        made = writer("1.8" if version == "1.8" else "v2", rank, ranks, **options)
        streams.append(written(made, [event(image, 10 * index + rank) for index, image in enumerate(images)]))
    messages = []
    while left := [stream for stream in streams if stream]:
        messages.append(data.draw(st.sampled_from(left)).pop(0))
    batches = read(messages)
    assert len(batches) == ranks * len(images)
    if version == "1.8":
        seen = {int(batch["/message_id"][0]): batch for batch in batches}
        expected = {10000 * rank + 1 + index: image for rank in range(ranks) for index, image in enumerate(images)}
        path = "/data/image"
    else:
        seen = {int(batch["/image_id"][0]): batch for batch in batches}
        expected = {10 * i + rank: image for rank in range(ranks) for i, image in enumerate(images)}
        path = "/data/threshold_1"
        for index, batch in seen.items():
            assert batch["/timestamp_ns"].tolist() == [START_NS + index]
            assert (batch.attributes["rank"], batch.attributes["ranks"]) == (index % 10, ranks)
    assert seen.keys() == expected.keys()
    for number, image in expected.items():
        assert same_bits(seen[number][path], image[None])
        assert seen[number].events == 1
        assert (seen[number].attributes["experiment"], seen[number].attributes["run"]) == ("mfx100852324", 51)


def test_simplon_keeps_what_the_start_message_says_and_the_values_of_the_image() -> None:
    image = np.arange(24, dtype=">i2").reshape(1, 4, 6)
    geometry = np.array(["id", "geometry text", "pixels"])
    beam = np.array([0.1, 0.2, 0.3, 0.4, 9500.0])
    (batch,) = read(written(writer("1.8"), [event(image, beam_data=beam, detector_geometry=geometry)]))
    said = batch.attributes
    assert (said["format"], said["shape"], said["datatype"]) == ("simplon-1.8", "1x4x6", ">i2")
    assert (said["detector"]["name"], said["detector"]["geometry"]) == ("jungfrau", "geometry text")
    assert said["image"]["sum"] == image.sum()
    assert same_bits(batch["/data/image"], image[None])
    batch["/data/image"][0] = 0  # arrays may be written to, as those of HDF5 messages
    assert batch["/photon_energy"].tolist() == [9500.0]
    assert batch["/beam_direction/position_x"].tolist() == [0.3]
    assert batch["/timestamp"].tolist() == [float(PSANA2)]
    apart = batch.field_attributes["/timestamp_ns"]["resolution_ns"]
    assert abs(int(batch["/timestamp_ns"][0]) - START_NS) <= apart <= 1024


@pytest.mark.parametrize(("stamp", "expected"), [(1.5, 1_500_000_000), (PSANA2, START_NS), (3, 3_000_000_000)])
def test_simplon_times_are_nanoseconds_since_1970(stamp: float, expected: int) -> None:
    start, image = written(writer("1.8"), [event(np.ones((2, 2), np.uint8))])[:2]
    changed = b"m" + cbor2.dumps({**cbor2.loads(image[1:]), "timestamp": stamp})
    (batch,) = read([start, changed])
    assert batch["/timestamp_ns"].tolist() == [expected]
    assert batch.nanoseconds("/timestamp").tolist() == [expected]
    (batch,) = read([start, b"m" + cbor2.dumps({**cbor2.loads(image[1:]), "timestamp": None})])
    assert "/timestamp_ns" not in batch


def test_a_stream_v2_start_message_is_kept_with_its_arrays() -> None:
    start, image = written(writer("v2", incident_energy=9500.0), [event(np.ones((4, 6), np.uint16))])[:2]
    mask = cbor2.CBORTag(40, [[2, 3], cbor2.CBORTag(70, np.arange(6, dtype="<u4").tobytes())])
    table = cbor2.CBORTag(86, np.array([1.5, 2.5]).tobytes())
    content = {**cbor2.loads(start), "pixel_mask": {"threshold_1": mask}, "countrate_correction_lookup_table": table}
    (batch,) = read([b"\xd9\xd9\xf7" + cbor2.dumps(content), b"\xd9\xd9\xf7" + image])
    said = batch.attributes
    assert (said["format"], said["image_size_x"], said["image_size_y"]) == ("simplon-v2", 6, 4)
    assert (said["incident_energy"], said["detector_serial_number"]) == (9500.0, "jungfrau")
    assert (said["source_identifier"], said["configuration_sha256"]) == ("exp=mfx", "ab" * 32)
    assert said["pixel_mask"]["threshold_1"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert said["countrate_correction_lookup_table"].tolist() == [1.5, 2.5]
    assert said["image"]["start_time"] == [0, 10**9]


def test_stream_v2_of_another_detector_is_read_with_all_channels_and_its_own_time() -> None:
    def values(tag: int, dtype: str) -> Any:
        return cbor2.CBORTag(40, [[2, 2], cbor2.CBORTag(tag, np.arange(4, dtype=dtype).tobytes())])

    image = {
        "type": "image",
        "series_id": 1,
        "series_unique_id": "x",
        "image_id": 4,
        "series_date": cbor2.CBORTag(0, "2025-03-29T10:00:00.000001Z"),
        "start_time": [3, 2],
        "data": {"threshold_1": values(65, ">u2"), "difference": values(78, "<i4")},
    }
    (batch,) = read([cbor2.dumps(image)])
    assert batch["/timestamp_ns"].tolist() == [1_743_242_400_000_001_000 + 1_500_000_000]
    assert batch["/data/threshold_1"].tolist() == batch["/data/difference"].tolist() == [[[0, 1], [2, 3]]]
    assert (batch["/data/threshold_1"].dtype, batch["/data/difference"].dtype) == (">u2", "<i4")


def test_images_before_the_start_message_wait_and_are_told_when_it_never_comes(monkeypatch: Any) -> None:
    made = [event(np.full((2, 3), index, np.uint16), index) for index in range(3)]
    start, *images, _ = written(writer("1.8"), made)
    assert [batch["/data/image"][0, 0, 0] for batch in read([*images[:2], start, images[2]])] == [0, 1, 2]
    with pytest.raises(MessageError, match=r"message 0 and 2 more .* no start message.*another consumer"):
        read(images)
    monkeypatch.setattr(simplon, "WAITING_MESSAGES", 1)
    with pytest.raises(MessageError, match="message 0 and 1 more"):
        read([*images, start])


def changed(message: bytes, letter: bytes = b"", **values: Any) -> bytes:
    content = {**cbor2.loads(message[len(letter) :]), **values}
    return letter + cbor2.dumps({key: value for key, value in content.items() if value is not Ellipsis})


@pytest.mark.parametrize(
    ("which", "values", "words"),
    [
        ("start", {"shape": "2 by 3"}, "1.8 start message has the shape '2 by 3'"),
        ("start", {"shape": ...}, "has no shape; it has type, run_number"),
        ("start", {"algorithm": "lz4"}, "algorithm 'lz4'"),
        ("image", {"dtype": "object"}, "1.8 image message has the dtype 'object'"),
        ("image", {"dtype": "uint32"}, "damaged"),
        ("image", {"type": "picture"}, "type 'picture'"),
        ("image", {"compressed_data": ...}, "has no compressed_data"),
        ("image", {"compressed_data": b"1234"}, "damaged"),
        ("image", {"message_id": 1 << 70}, "message_id 1180591620717411303424 where an integer"),
        ("image", {"timestamp": float("nan")}, "timestamp nan"),
        ("image", {"beam_direction": 3}, "beam_direction 3 where a map"),
        ("start", {"shape": "99999x99999"}, "cannot hold the 19999600002 they claim"),
    ],
)
def test_a_simplon_message_says_what_is_wrong_with_it(which: str, values: Any, words: str) -> None:
    start, image, _ = written(writer("1.8"), [event(np.ones((2, 3), np.uint16))])
    if which == "start":
        start = changed(start, b"c", **values)
    else:
        image = changed(image, b"m", **values)
    with pytest.raises(MessageError, match=r"^message [01]") as told:
        read([start, image])
    assert words in str(told.value)


def typed(shape: Any, tag: int = 69, data: Any = b"\0" * 12) -> Any:
    return {"threshold_1": cbor2.CBORTag(40, [shape, cbor2.CBORTag(tag, data)])}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "picture"}, "type 'picture'; known are start, image, end"),
        ({"series_unique_id": ...}, "stream V2 image message has no series_unique_id"),
        ({"data": {}}, "no channel"),
        ({"data": {"threshold_1": 3}}, "threshold_1 3 where an array (tag 40) belongs"),
        ({"data": typed([2, 3], 68 + 8)}, "where a typed array"),
        ({"data": typed([2, 4])}, "an image of 2x4 uint16 has 16 bytes, not 12"),
        ({"data": typed([-2, -3])}, "of the shape (-2, -3)"),
        ({"data": typed([2, 3], data="text")}, "'text' where bytes"),
        ({"data": typed([2, 3], data=cbor2.CBORTag(56500, ["zip", 2, b"1234"]))}, "compressed with 'zip'"),
        ({"data": typed([2, 3], data=cbor2.CBORTag(56500, ["bslz4", 4, b"1234"]))}, "elements of 4 bytes"),
        ({"data": typed([2, 3], data=cbor2.CBORTag(56500, ["bslz4", 2, b"1234"]))}, "less than their header"),
        ({"data": typed([2, 3], data=cbor2.CBORTag(56500, ["lz4", 2, b"\x0f" * 20]))}, "cannot hold"),
        ({"user_data": {"timestamp_ns": "now"}}, "timestamp_ns 'now' where an integer"),
        ({"user_data": None, "start_time": [1, 0]}, "start_time [1, 0]"),
        ({"image_id": ...}, "has no image_id"),
    ],
)
def test_a_stream_v2_message_says_what_is_wrong_with_it(values: Any, words: str) -> None:
    start, image, _ = written(writer("v2"), [event(np.ones((2, 3), np.uint16))])
    with pytest.raises(MessageError, match=r"^message 1") as told:
        read([start, changed(image, **values)])
    assert words in str(told.value)


@pytest.mark.parametrize("message", [b"", b"c", b"m\x01", b"hello", b"\x89HDX", b"\xd9\xd9\xf7\x01", b"\xa1a"])
def test_what_is_no_message_is_told_with_its_number(message: bytes) -> None:
    with pytest.raises(MessageError, match="message 17"):
        Decoder().feed(message, name="message 17")


@pytest.mark.parametrize("version", ["1.8", "v2"])
def test_every_cut_of_a_message_and_every_byte_behind_it_is_told(version: str) -> None:
    whole = written(writer(version), [event(np.arange(600, dtype=np.uint16).reshape(20, 30))])
    for number, message in enumerate(whole):
        for damaged in [*(message[:length] for length in range(0, len(message), 7)), message + b"\0"]:
            with pytest.raises(MessageError, match=r"^message"):
                read([*whole[:number], damaged])


def mutations(message: bytes, chance: random.Random) -> Iterator[bytes]:
    for _ in range(400):
        damaged = bytearray(message)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            how = chance.randrange(3)
            if how == 0:
                damaged[place] = chance.randrange(256)
            elif how == 1:
                del damaged[place : place + chance.randint(1, 9)]
            else:
                damaged[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 9)))
            if not damaged:
                break
        yield bytes(damaged)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("version", ["1.8", "v2"])
def test_damaged_messages_raise_nothing_but_our_error(version: str, seed: int) -> None:
    beam = np.array([0.1, 0.2, 0.3, 0.4, 9500.0])
    image = np.arange(600, dtype=np.uint16).reshape(20, 30)
    whole = written(writer(version), [event(image, beam_data=beam)])
    chance = random.Random(seed)
    refused = 0
    for number, message in enumerate(whole):
        for damaged in mutations(message, chance):
            refused += refuses([*whole[:number], damaged, *whole[number + 1 :]])
    assert refused > 200


def refuses(messages: list[bytes]) -> bool:
    """Whether a message is refused; any other error than ours goes on."""
    try:
        read(messages)
    except MessageError as error:
        told = str(error)
    else:
        return False
    assert told.startswith("message ")
    return True


KEYS = ["type", "shape", "dtype", "compressed_data", "data", "timestamp", "message_id", "image_id", "user_data"]
KEYS += ["series_unique_id", "series_date", "start_time", "beam_direction", "photon_energy", "run_number"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=30)
TAGGED = st.sampled_from([0, 1, 2, 4, 30, 40, 64, 69, 86, 56500, 258])
CBOR = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=9), inner, max_size=3)
        | st.builds(cbor2.CBORTag, TAGGED, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    version=st.sampled_from(["1.8", "v2"]), which=st.integers(0, 2), values=st.dictionaries(st.sampled_from(KEYS), CBOR)
)
def test_values_of_the_wrong_kind_raise_nothing_but_our_error(version: str, which: int, values: Any) -> None:
    whole = written(writer(version), [event(np.ones((2, 3), np.uint16))])
    letter = whole[which][:1] if version == "1.8" else b""
    whole[which] = letter + cbor2.dumps({**cbor2.loads(whole[which][len(letter) :]), **values})
    refuses(whole)


@pytest.mark.parametrize("version", ["1.8", "v2"])
@pytest.mark.parametrize(
    "value",
    [
        cbor2.CBORTag(2, b"\xff" * 5000),
        {cbor2.CBORTag(2, b"\xff" * 5000): 1.5},
        cbor2.CBORTag(28, {"own": cbor2.CBORTag(29, 0)}),
        "0x999999999x999999999x999999999",
        {"threshold_1": cbor2.CBORTag(40, [[0, 1 << 47, 1 << 47], cbor2.CBORTag(69, b"")])},
    ],
)
def test_monstrous_values_raise_nothing_but_our_error(version: str, value: Any) -> None:
    whole = written(writer(version), [event(np.ones((2, 3), np.uint16))])
    for which, message in enumerate(whole):
        letter = message[:1] if version == "1.8" else b""
        for key in KEYS:
            refuses([*whole[:which], changed(message, letter, **{key: value}), *whole[which + 1 :]])


@pytest.mark.parametrize(("package", "needs"), [("cbor2", "cbor2"), ("hdf5plugin", "hdf5plugin")])
def test_a_package_that_is_not_installed_is_told(monkeypatch: Any, package: str, needs: str) -> None:
    whole = written(writer("v2"), [event(np.ones((2, 3), np.uint16))])
    really = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name, name=package)
        return really(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MessageError, match=rf"needs {needs}: pip install 'lclstream\[stream\]'"):
        read(whole)


# ------------------------------------------------------------------------------------------- through real connections


@pytest.mark.parametrize("version", ["1.8", "v2"])
def test_batches_reads_the_stream_of_several_ranks_and_goes_on_after_an_end_message(version: str) -> None:
    images = [np.full((2, 3), index, np.uint16) for index in range(3)]
    first, second = ([event(image, 10 * i + rank) for i, image in enumerate(images)] for rank in range(2))
    messages = written(writer(version, 1, 2), second) + written(writer(version, 0, 2), first)
    with push("tcp://127.0.0.1:0", listen=True) as out:
        stream = pull(out.urls[0], timeout_s=20)
        stream.open()
        for message in messages:
            out.send(message)
        out.close()
        assert len(list(stream.batches())) == 6
    assert stream.statistics.messages == len(messages)


class Recorded:
    """Messages that have come already, as a receiver."""

    urls = ("memory",)

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = list(messages)

    def open(self) -> None: ...

    def close(self) -> None: ...

    def receive(self, timeout_s: float) -> bytes | None:
        return self._messages.pop(0) if self._messages else None


class Rows:
    def append(self, rows: Any) -> None: ...


@pytest.mark.parametrize("version", ["1.8", "v2"])
def test_the_run_summary_works_on_a_simplon_stream(version: str) -> None:
    chance = np.random.default_rng(1)
    images = [chance.poisson(30, (64, 96)).astype(np.uint16) for _ in range(5)]
    messages = written(writer(version), [event(image, 8_333_333 * number) for number, image in enumerate(images)])
    summary = RunSummary(Settings(), Rows())
    outcome = follow(Puller(Recorded(messages), Statistics(), 5.0), summary)
    assert outcome.complete, outcome.reason
    assert (summary.events, summary.events_unique, summary.image_events) == (5, 5, 5)
    assert (summary.experiment, summary.run) == ("mfx100852324", 51)
    np.testing.assert_array_equal(summary.sum_image, np.sum(images, axis=0, dtype=float))


def test_the_run_summary_says_that_a_start_message_is_missing() -> None:
    messages = written(writer("1.8"), [event(np.ones((64, 96), np.uint16))])[1:]
    outcome = follow(Puller(Recorded(messages), Statistics(), 5.0), RunSummary(Settings(), Rows()))
    assert not outcome.complete
    assert "start message" in (outcome.reason or "")


# ---------------------------------------------------------------------------------------- what HDF5 has beside arrays


def hdf5(events: list[dict[str, Any]]) -> Any:
    parameters = models.HDF5BinarySerializer(
        type="HDF5BinarySerializer",
        compression="bitshuffle_with_lz4",
        fields={name: f"/data/{name}" for name in events[0]},
    )
    context = SerializerContext("exp=mfx", "ab" * 32, "1.0", batch_size=len(events), timestamps=("time",))
    made = HDF5BinarySerializer(parameters, context)
    try:
        (message,) = written(made, [Event(one, i, RUN, START_NS + i) for i, one in enumerate(events)])
    finally:
        made.close()
    (batch,) = read([message])
    return batch


def test_hdf5_ragged_data_missing_values_times_and_strings_are_at_hand() -> None:
    hits = [np.array([1.5, 2.5]), np.array([]), np.array([3.5, 4.5, 5.5])]
    batch = hdf5(
        [
            {
                "time": np.array(1.5),
                "hits": Ragged(hits[number]),
                "image": None if number == 1 else np.full((20, 30), number, np.uint16),
                "word": np.array("\u03b2eta" if number else "a"),
            }
            for number in range(3)
        ]
    )
    assert batch.events == 3
    assert batch.is_ragged("/data/hits")
    assert not batch.is_ragged("/data/image")
    assert [piece.tolist() for piece in batch.pieces("data/hits")] == [piece.tolist() for piece in hits]
    assert [batch.value("/data/hits", number).tolist() for number in (0, 1, -1)] == [[1.5, 2.5], [], [3.5, 4.5, 5.5]]
    assert batch.missing("/data/image").tolist() == [False, True, False]
    assert batch.missing("/data/hits").tolist() == [False] * 3
    assert batch.value("/data/image", 1) is None
    assert batch.value("/data/image", 2).tolist() == np.full((20, 30), 2).tolist()
    assert batch.nanoseconds("/data/time").tolist() == [START_NS, START_NS + 1, START_NS + 2]
    assert batch.nanoseconds("/data/image") is None
    assert batch["/data/word"].tolist() == ["a", "\u03b2eta", "\u03b2eta"]
    with pytest.raises(IndexError):
        batch.value("/data/hits", 3)
    some = batch.only(np.array([2, 0]))
    assert some.events == 2
    assert [piece.tolist() for piece in some.pieces("/data/hits")] == [[3.5, 4.5, 5.5], [1.5, 2.5]]
    assert some.nanoseconds("/data/time").tolist() == [START_NS + 2, START_NS]
    assert batch.only(np.array([], np.int64)).pieces("/data/hits") == []


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9), dtype=st.sampled_from(["float64", "int16"]))
def test_ragged_pieces_come_back_whatever_their_lengths(lengths: list[int], dtype: str) -> None:
    pieces = [np.arange(length).astype(dtype) for length in lengths]
    batch = hdf5([{"hits": Ragged(piece)} for piece in pieces])
    assert batch.events == len(lengths)
    for got, sent in zip(batch.pieces("/data/hits"), pieces, strict=True):
        assert same_bits(got, sent)


def test_offsets_that_cannot_be_right_are_told_and_datasets_that_only_sound_like_them_are_not_touched() -> None:
    from lclstream.client.batch import Batch

    wrong = Batch({"/x": np.arange(5), "/x_offsets": np.array([0, 3, 2, 5], np.uint64)}, {})
    with pytest.raises(MessageError, match="/x_offsets does not divide the 5 elements of /x"):
        wrong.pieces("/x")
    plain = Batch({"/x": np.arange(3), "/x_offsets": np.array([7, 7, 7], np.uint64)}, {})
    assert plain.events == 3
    assert plain.value("/x", 2) == 2


@pytest.mark.parametrize("shape", ["1x4x6", [4], [2, 3, 4], [1, 4, -6], [True, 4, 6], [1] * 17])
def test_a_stream_v2_image_whose_own_shape_cannot_be_is_told(shape: Any) -> None:
    message = cbor2.loads(written(writer("v2"), [event(np.zeros((1, 4, 6), np.uint16))])[1])
    message["user_data"]["image_shape"] = shape
    with pytest.raises(MessageError, match="has the image_shape"):
        read([cbor2.dumps(message)])
