"""DECTRIS Simplon 1.8 messages, as CrystFEL reads them: a letter and a CBOR map.

``c`` is a control message (`start`, `stop`), ``m`` an image. The shape of the images is said by the start message
alone, which only one of the engine's ranks sends: images that are there before it wait for it.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import numpy as np

from lclstream.client.batch import Array, Batch
from lclstream.client.cbor import Content, array_of, named, read_map, shown
from lclstream.client.compression import decompress
from lclstream.client.errors import MessageError

FORMAT = "simplon-1.8"
IMAGE = "/data/image"
#: Images that wait for the start message, at most.
WAITING_MESSAGES = 10_000
WAITING_BYTES = 1 << 30
_BLOCK = 4096
_DTYPE = re.compile(r"u?int(8|16|32|64)|float(16|32|64)|[<>|=]?([iu][1248]|f[248])")
_SHAPE = re.compile(r"[0-9]{1,9}(x[0-9]{1,9}){0,7}")
#: 1990-01-01 in seconds since 1970: where the psana2 time begins that the engine sends.
_PSANA2_EPOCH_S = 631_152_000
#: Seconds since 1970 are smaller, psana2 times, ``seconds << 32 | nanoseconds``, are larger.
_PSANA2_FROM = 1e15


class SimplonReader:
    """Reads the messages of one stream in their order. Used by one thread."""

    def __init__(self) -> None:
        self._attributes: dict[str, Any] | None = None
        self._shape: tuple[int, ...] = ()
        self._waiting: list[tuple[Content, str]] = []
        self._waiting_bytes = 0

    def feed(self, message: bytes, name: str) -> list[Batch]:
        """The images that can be read now: a batch of one event each.

        Raises:
            MessageError: the message is damaged, or too many images wait for a start message.
        """
        content = Content(read_map(message[1:], name), name, "a Simplon 1.8 message")
        kind = content.text("type")
        letter = message[:1].decode("ascii")
        content.kind = f"a Simplon 1.8 {kind} message" if kind in ("start", "stop", "image") else content.kind
        if (letter, kind) == ("c", "stop"):
            return []
        if (letter, kind) == ("c", "start"):
            self._begin(content)
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
            return [self._image(*one) for one in waiting]
        if (letter, kind) != ("m", "image"):
            raise content.error(f"of letter {letter!r} has the type {shown(kind)}; known are c start, c stop, m image")
        if self._attributes is not None:
            return [self._image(content, name)]
        self._waiting.append((content, name))
        self._waiting_bytes += len(message)
        if len(self._waiting) > WAITING_MESSAGES or self._waiting_bytes > WAITING_BYTES:
            raise self._without_start()
        return []

    def end(self) -> None:
        """The stream is over.

        Raises:
            MessageError: images still wait for a start message.
        """
        if self._waiting:
            raise self._without_start()

    def _without_start(self) -> MessageError:
        return MessageError(
            f"{self._waiting[0][1]} and {len(self._waiting) - 1} more Simplon 1.8 images have no start message, which "
            "says their shape: did another consumer of the same stream get it? With SimplonV2Serializer every image "
            "says its own"
        )

    def _begin(self, content: Content) -> None:
        shape = content.text("shape")
        if _SHAPE.fullmatch(shape) is None:
            raise content.error(f"has the shape {shown(shape)}; it looks like 1x512x1024")
        self._shape = tuple(int(length) for length in shape.split("x"))
        algorithm = content.values.get("algorithm", "bitshuffle-lz4")
        if algorithm != "bitshuffle-lz4":
            raise content.error(f"has the algorithm {shown(algorithm)}; only bitshuffle-lz4 is known")
        self._attributes = {named(key): value for key, value in content.values.items() if key != "type"}
        self._attributes["format"] = FORMAT
        number = content.values.get("run_number")
        if isinstance(number, str) and re.fullmatch("[0-9]{1,18}", number):
            self._attributes["run"] = int(number)

    def _image(self, content: Content, name: str) -> Batch:
        assert self._attributes is not None
        stated = content.text("dtype")
        if _DTYPE.fullmatch(stated) is None:
            raise content.error(f"has the dtype {shown(stated)}, which is no integer or floating type")
        dtype = np.dtype(stated)
        packed = content.data("compressed_data")
        size = math.prod(self._shape) * dtype.itemsize
        if size >= 1 << 63:
            raise content.error(f"would be of shape {self._shape}, which is too large")
        header = struct.pack(">QI", size, _BLOCK * dtype.itemsize)
        image = array_of(decompress(header + packed, "bslz4", dtype.itemsize, name), dtype, self._shape, name)
        arrays: dict[str, Array] = {IMAGE: image, "/message_id": _one(content.integer("message_id"), np.int64)}
        units: dict[str, dict[str, Any]] = {}
        used = {"type", "dtype", "compressed_data", "message_id"}
        if content.values.get("timestamp") is not None:
            used.add("timestamp")
            stamp = content.number("timestamp")
            arrays["/timestamp"] = _one(stamp, np.int64 if isinstance(stamp, int) else np.float64)
            since_1970, resolution = _nanoseconds(stamp, content)
            arrays["/timestamp_ns"] = _one(since_1970, np.int64)
            units["/timestamp_ns"] = {"epoch": "1970-01-01T00:00:00Z", "units": "ns", "resolution_ns": resolution}
        if "photon_energy" in content.values:
            used.add("photon_energy")
            arrays["/photon_energy"] = _one(content.number("photon_energy"), np.float64)
            units["/photon_energy"] = {"units": "eV"}
        if "beam_direction" in content.values:
            used.add("beam_direction")
            beam = content.part("beam_direction")
            for key in beam.values:
                arrays[f"/beam_direction/{named(key)}"] = _one(beam.number(key), np.float64)
        rest = {key: value for key, value in content.values.items() if key not in used}
        return Batch(arrays, {**self._attributes, "image": rest}, units)


def _one(value: float | int, dtype: type[np.generic]) -> Array:
    """The value of one event."""
    return np.array([value], dtype)


def _nanoseconds(stamp: float | int, content: Content) -> tuple[int, int]:
    """Nanoseconds since 1970 of a psana2 time or of seconds, and how many nanoseconds apart two times can be told."""
    if not math.isfinite(stamp) or not abs(stamp) < 2**63:
        raise content.error(f"has the timestamp {stamp}")
    apart = 0.0 if isinstance(stamp, int) else float(np.spacing(abs(stamp)))
    if stamp >= _PSANA2_FROM:
        since_1990 = int(stamp)
        time = ((since_1990 >> 32) + _PSANA2_EPOCH_S) * 1_000_000_000 + (since_1990 & 0xFFFFFFFF)
        return time, max(1, math.ceil(apart))
    time = stamp * 1_000_000_000 if isinstance(stamp, int) else round(stamp * 1e9)
    if not abs(time) < 2**63:
        raise content.error(f"has the timestamp {stamp}, which is neither seconds nor a time of psana2")
    return time, max(1, math.ceil(apart * 1e9)) if apart else 1_000_000_000
