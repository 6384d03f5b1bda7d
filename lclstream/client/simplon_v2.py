"""DECTRIS stream V2: CBOR messages `start`, `image`, `end`, and arrays by the tags of RFC 8746.

Every image says its own shape and dtype, so it can be read wherever it arrives; what its series' start message said is
added when that came before. See https://github.com/dectris/documentation/tree/main/stream_v2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from lclstream.client.batch import Array, Batch
from lclstream.client.cbor import Content, array_of, named, read_map, shown
from lclstream.client.compression import decompress

FORMAT = "simplon-v2"
#: Tag 55799, "this is CBOR", with which DECTRIS' own detectors begin their messages.
SELF_DESCRIBED = b"\xd9\xd9\xf7"
_ARRAY, _COMPRESSED = 40, 56500
_DTYPES = {
    **{64: "u1", 65: ">u2", 66: ">u4", 67: ">u8", 68: "u1", 69: "<u2", 70: "<u4", 71: "<u8"},
    **{72: "i1", 73: ">i2", 74: ">i4", 75: ">i8", 77: "<i2", 78: "<i4", 79: "<i8"},
    **{80: ">f2", 81: ">f4", 82: ">f8", 84: "<f2", 85: "<f4", 86: "<f8"},
}
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
#: Maps in maps; CBOR can say that a map holds itself.
_DEEPEST = 20
_NS = {"epoch": "1970-01-01T00:00:00Z", "units": "ns"}


class SimplonV2Reader:
    """Reads the messages of one stream, of any number of series at a time. Used by one thread."""

    def __init__(self) -> None:
        self._series: dict[str, dict[str, Any]] = {}

    def feed(self, message: bytes, name: str) -> list[Batch]:
        """The batch of an image message, with one event; nothing for start and end.

        Raises:
            MessageError: the message is damaged.
        """
        content = Content(read_map(message.removeprefix(SELF_DESCRIBED), name), name, "a stream V2 message")
        kind = content.text("type")
        if kind not in ("start", "image", "end"):
            raise content.error(f"has the type {shown(kind)}; known are start, image, end")
        content.kind = f"a stream V2 {kind} message"
        series = content.text("series_unique_id")
        if kind == "start":
            self._series[series] = _attributes(content)
        elif kind == "image":
            return [self._image(content, series)]
        # A series that has ended is remembered: images that took another way may still be coming.
        return []

    def _image(self, content: Content, series: str) -> Batch:
        arrays: dict[str, Array] = {}
        channels = content.part("data")
        for channel, image in channels.values.items():
            if not isinstance(channel, str):
                raise channels.error(f"has a channel named {shown(channel)}")
            arrays[f"/data/{channel}"] = _shaped(_array(image, channels, channel), content)
        if not arrays:
            raise content.error("has no channel in its data")
        arrays["/image_id"] = np.array([content.integer("image_id")], np.int64)
        time = _time(content)
        if time is not None:
            arrays["/timestamp_ns"] = np.array([time], np.int64)
        known = self._series.get(series, {"format": FORMAT})
        rest = {key: value for key, value in content.values.items() if key not in ("type", "data", "image_id")}
        attributes = {**known, "series_id": content.values.get("series_id"), "series_unique_id": series}
        return Batch(arrays, {**attributes, "image": rest}, {} if time is None else {"/timestamp_ns": dict(_NS)})


def _shaped(image: Array, content: Content) -> Array:
    """The image with the axes it had in the engine, which lays the modules of a detector one below the other.

    Raises:
        MessageError: the shape that the message's user data name cannot be that of this image.
    """
    user = content.values.get("user_data")
    shape = user.get("image_shape") if isinstance(user, Mapping) else None
    if shape is None:
        return image
    if (
        not isinstance(shape, list | tuple)
        or not 2 <= len(shape) <= 16
        or not all(type(length) is int and length >= 0 for length in shape)
        or image.shape[1:] != (math.prod(shape[:-1]), shape[-1])
    ):
        raise content.error(f"has the image_shape {shown(shape)} and an image of {image.shape[1:]}")
    return image.reshape(1, *shape)


def _attributes(content: Content) -> dict[str, Any]:
    """What a start message says, and what its user data say where they use other names."""
    more = content.values.get("user_data")
    attributes = {named(key): value for key, value in more.items()} if isinstance(more, Mapping) else {}
    for key, value in content.values.items():
        if key != "type":
            attributes[named(key)] = _resolved(value, content, named(key), _DEEPEST)
    attributes["format"] = FORMAT
    return attributes


def _resolved(value: Any, content: Content, key: str, deepest: int) -> Any:
    """A start message's value with its arrays (pixel masks, flat fields) as arrays."""
    tag = getattr(value, "tag", None)
    if tag == _ARRAY:
        return _array(value, content, key)[0]
    if tag in _DTYPES:
        data, dtype = _bytes(value, content, key)
        return array_of(data, dtype, (len(data) // dtype.itemsize,), content.name)[0]
    if isinstance(value, Mapping):
        if not deepest:
            raise content.error(f"has maps in maps without end at {key[:60]}...")
        return {
            named(name): _resolved(each, content, f"{key}.{named(name)}", deepest - 1) for name, each in value.items()
        }
    return value


def _array(value: Any, content: Content, key: str) -> Array:
    """A multi-dimensional array with a leading event axis."""
    if getattr(value, "tag", None) != _ARRAY:
        raise content.error(f"has {key} {shown(value)} where an array (tag {_ARRAY}) belongs")
    shape, typed = _items(value.value, 2, content, key)
    if not isinstance(shape, list | tuple) or not all(
        isinstance(length, int) and not isinstance(length, bool) and 0 <= length < 1 << 48 for length in shape
    ):
        raise content.error(f"has {key} of the shape {shown(shape)}")
    if len(shape) > 16:
        raise content.error(f"has {key} of {len(shape)} axes")
    data, dtype = _bytes(typed, content, key)
    return array_of(data, dtype, tuple(shape), f"{content.name}, {key}")


def _bytes(typed: Any, content: Content, key: str) -> tuple[bytes, np.dtype[Any]]:
    """The bytes of a typed array, decompressed, and their dtype."""
    tag = getattr(typed, "tag", None)
    if tag not in _DTYPES:
        raise content.error(f"has {key} {shown(typed)} where a typed array (tags 64 to 86) belongs")
    dtype: np.dtype[Any] = np.dtype(_DTYPES[tag])
    data = typed.value
    if getattr(data, "tag", None) == _COMPRESSED:
        algorithm, size, packed = _items(data.value, 3, content, key)
        if size != dtype.itemsize or not isinstance(packed, bytes):
            raise content.error(f"has {key} compressed as elements of {shown(size)} bytes, but it is {dtype}")
        data = decompress(packed, algorithm, dtype.itemsize, f"{content.name}, {key}")
    if not isinstance(data, bytes):
        raise content.error(f"has {key} {shown(data)} where bytes or compressed bytes (tag {_COMPRESSED}) belong")
    return data, dtype


def _items(value: Any, count: int, content: Content, key: str) -> Any:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise content.error(f"has {key} {shown(value)} where a list of {count} belongs")
    return value


def _time(content: Content) -> int | None:
    """Nanoseconds since 1970: the engine's own, exact; else when the series began and how long after it the image."""
    user = content.values.get("user_data")
    if isinstance(user, Mapping) and "timestamp_ns" in user:
        return None if user["timestamp_ns"] is None else content.part("user_data").integer("timestamp_ns")
    began, after = content.values.get("series_date"), content.values.get("start_time")
    if began is None or after is None:
        return None
    if not isinstance(began, datetime) or began.tzinfo is None:
        raise content.error(f"has series_date {shown(began)} where a date and time with its zone belongs")
    numerator, denominator = _items(after, 2, content, "start_time")
    if not (type(numerator) is type(denominator) is int and denominator > 0 and abs(numerator) < 1 << 63):
        raise content.error(f"has start_time {shown(after)} where [numerator, denominator] belong")
    since_1970 = (began - _1970) // timedelta(microseconds=1) * 1000 + numerator * 1_000_000_000 // denominator
    if not abs(since_1970) < 1 << 63:
        raise content.error(f"has the impossible start_time {shown(after)}")
    return since_1970
