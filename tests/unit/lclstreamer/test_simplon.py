"""Simplon messages, read back by DECTRIS' own decompression and a CBOR library."""

from __future__ import annotations

import struct
from typing import Any

import cbor2
import numpy as np
import pytest

from lclstream.client.decoding import Decoder
from lclstream.consumers.gain import GainBits, decide, split
from lclstreamer import models
from lclstreamer.errors import ComponentError
from lclstreamer.events import Event, RunInfo
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.simplon import SimplonBinarySerializer
from lclstreamer.serializers.simplon_v2 import TAGS, SimplonV2Serializer

decompress = pytest.importorskip("dectris.compression").decompress

RUN = RunInfo("mfx100852324", 51)


def values(image: Any, **more: Any) -> dict[str, Any]:
    return {
        "timestamp": np.array(4.5e18),
        "detector_data": image,
        "detector_geometry": np.array(["jungfrau_1", "geometry text"]),
        "run_info": np.array(["mfx100852324", "123", "51", "exp=mfx100852324,run=51"]),
        **more,
    }


def simplon(rank: int = 0, size: int = 1) -> SimplonBinarySerializer:
    settings = models.SimplonBinarySerializer(
        type="SimplonBinarySerializer",
        data_source_to_serialize="detector_data",
        polarization_fraction=0,
        polarization_axis=[1.0, 0.0, 0.0],
        data_collection_rate="120Hz",
        detector_name="jungfrau",
        detector_type="AreaDetector",
    )
    return SimplonBinarySerializer(settings, SerializerContext(rank=rank, size=size))


def all_messages(writer: Any, images: list[Any], **more: Any) -> list[bytes]:
    made = [
        bytes(message)
        for index, image in enumerate(images)
        for message in writer.add(Event(values(image, **more), index, RUN, 1_743_242_400_000_000_000 + index))
    ]
    assert not list(writer.end_batch())
    return made + [bytes(message) for message in writer.end()]


def frames(dtype: str, count: int = 3) -> list[Any]:
    random = np.random.default_rng(3)
    return [(random.random((1, 64, 100)) * 100).astype(dtype) for _ in range(count)]


def unpacked(message: dict[str, Any], dtype: str, shape: tuple[int, ...]) -> Any:
    """With the header that DECTRIS' function wants."""
    kind = np.dtype(dtype)
    header = struct.pack(">QI", int(np.prod(shape)) * kind.itemsize, 4096 * kind.itemsize)
    data = decompress(header + message["compressed_data"], "bslz4", elem_size=kind.itemsize)
    return np.frombuffer(data, kind).reshape(shape)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint64", "int64", "float32", "float64"])
def test_every_event_is_an_image_message_of_any_dtype(dtype: str) -> None:
    sent = frames(dtype)
    messages = all_messages(simplon(), sent)
    assert [chr(message[0]) for message in messages] == ["c", "m", "m", "m", "c"]
    contents = [cbor2.loads(message[1:]) for message in messages]
    assert [one["type"] for one in contents] == ["start", "image", "image", "image", "stop"]
    start = contents[0]
    assert (start["datatype"], start["shape"], start["beamline"]) == (dtype, "1x64x100", "MFX")
    assert start["detector"]["geometry"] == "geometry text"
    assert (start["run_number"], start["experiment"]) == ("51", "mfx100852324")
    for content, image in zip(contents[1:4], sent, strict=True):
        assert content["dtype"] == dtype
        assert content["sum"] == pytest.approx(image.sum())
        assert np.array_equal(unpacked(content, dtype, image.shape), image)
    assert len({content["message_id"] for content in contents[1:4]}) == 3


def test_only_the_last_rank_starts_and_stops() -> None:
    assert [chr(one[0]) for one in all_messages(simplon(0, 2), frames("uint16"))] == ["m", "m", "m"]
    assert [chr(one[0]) for one in all_messages(simplon(1, 2), frames("uint16"))] == ["c", "m", "m", "m", "c"]


def test_beam_data_are_sent_when_there_are_some() -> None:
    beam = np.array([0.1, 0.2, 0.3, 0.4, 9500.0])
    image = cbor2.loads(all_messages(simplon(), frames("uint16", 1), beam_data=beam)[1][1:])
    assert image["beam_direction"] == {"angle_x": 0.1, "angle_y": 0.2, "position_x": 0.3, "position_y": 0.4}
    assert image["photon_energy"] == 9500.0


def version_2(**options: Any) -> SimplonV2Serializer:
    settings = models.SimplonV2Serializer(
        type="SimplonV2Serializer", data_source_to_serialize="detector_data", detector_name="jungfrau", **options
    )
    return SimplonV2Serializer(settings, SerializerContext("exp=mfx", "ab" * 32, "1.0", rank=1, size=2))


def decoded(content: dict[str, Any]) -> Any:
    """The image of a stream V2 message, as the format's documentation says."""
    outer = content["data"]["threshold_1"]
    assert outer.tag == 40
    shape, typed = outer.value
    kind = np.dtype(next(name for name, tag in TAGS.items() if tag == typed.tag)).newbyteorder("<")
    data = typed.value
    if isinstance(data, cbor2.CBORTag):
        assert data.tag == 56500
        algorithm, size, packed = data.value
        data = decompress(packed, algorithm, elem_size=size)
    return np.frombuffer(data, kind).reshape(shape)


@pytest.mark.parametrize("compression", ["bslz4", None])
@pytest.mark.parametrize("dtype", list(TAGS))
def test_stream_v2_gives_every_image_back(dtype: str, compression: str | None) -> None:
    sent = frames(dtype)
    contents = [cbor2.loads(message) for message in all_messages(version_2(compression=compression), sent)]
    assert [one["type"] for one in contents] == ["start", "image", "image", "image", "end"]
    start = contents[0]
    assert (start["image_size_x"], start["image_size_y"], start["image_dtype"]) == (100, 64, dtype)
    assert start["user_data"]["experiment"] == "mfx100852324"
    assert {one["series_unique_id"] for one in contents} == {"mfx100852324-r0051-rank1"}
    for index, (content, image) in enumerate(zip(contents[1:4], sent, strict=True)):
        assert content["image_id"] == index
        assert content["user_data"]["timestamp_ns"] == 1_743_242_400_000_000_000 + index
        assert np.array_equal(decoded(content), image[0])


def test_stream_v2_starts_again_for_another_run() -> None:
    writer = version_2()
    kinds = []
    for run in (RUN, RUN, RunInfo("mfx100852324", 52)):
        kinds += [
            cbor2.loads(bytes(one))["type"] for one in writer.add(Event(values(frames("uint16", 1)[0]), 0, run, 1))
        ]
    assert kinds == ["start", "image", "image", "end", "start", "image"]


@pytest.mark.parametrize("writer", [simplon(), version_2()])
def test_an_image_that_is_none_is_refused(writer: Any) -> None:
    with pytest.raises(ComponentError, match="must be an"):
        writer.add(Event(values(np.array(["text"])), 0, RUN))
    assert list(writer.add(Event(values(None), 0, RUN))) == []


def raw_jungfrau(modules: int, count: int = 3) -> list[Any]:
    """Raw frames of several modules, with pixels in all three gain stages and at both ends of each one's range."""
    random = np.random.default_rng(8)
    shape = (modules, 512, 1024)
    stages = np.array([0, 1, 3], np.uint16) << 14
    frames = [random.integers(0, 1 << 14, shape).astype(np.uint16) | random.choice(stages, shape) for _ in range(count)]
    for row, value in enumerate((0x0000, 0x3FFF, 0x4000, 0x7FFF, 0xC000, 0xFFFF)):
        for frame in frames:
            frame[row % modules, row, 0] = value
    return frames


@pytest.mark.parametrize("writer", [simplon, version_2])
def test_gain_bits_of_a_raw_jungfrau_of_three_modules_arrive_bit_by_bit(writer: Any) -> None:
    sent = raw_jungfrau(3)
    messages = all_messages(writer(), sent)
    decoder = Decoder()
    batches = [batch for number, one in enumerate(messages) for batch in decoder.feed(one, name=f"message {number}")]
    for batch, image in zip(batches, sent, strict=True):
        (path,) = (name for name in batch if name.startswith("/data/"))
        got = batch[path][0]
        assert (got.shape, got.dtype) == ((3, 512, 1024), np.uint16)
        assert np.array_equal(got, image)
        assert np.array_equal(np.unique(got >> 14), [0, 1, 3])
        decision = decide(GainBits.AUTO, path, batch[path])
        assert decision.masked
        values, switched = split(got)
        assert np.array_equal(values, image % (1 << 14))
        assert switched == np.count_nonzero(image >> 14)
    # What the messages themselves say, for readers that are not ours.
    contents = [cbor2.loads(one[1:] if writer is simplon else one) for one in messages]
    if writer is simplon:
        assert (contents[0]["datatype"], contents[0]["shape"]) == ("uint16", "3x512x1024")
        for content, image in zip(contents[1:4], sent, strict=True):
            assert content["dtype"] == "uint16"
            assert np.array_equal(unpacked(content, "uint16", image.shape), image)
            assert content["sum"] == int(image.astype(np.uint64).sum())
    else:
        start = contents[0]
        assert (start["image_dtype"], start["image_size_x"], start["image_size_y"]) == ("uint16", 1024, 3 * 512)
        for content, image in zip(contents[1:4], sent, strict=True):
            assert content["user_data"]["image_shape"] == [3, 512, 1024]
            assert np.array_equal(decoded(content), image.reshape(3 * 512, 1024))
