"""What both Simplon formats are made of: one CBOR item a message, and images as bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lclstream.client.errors import MessageError

_INT64 = np.iinfo(np.int64)


class Content:
    """The map of one message; whatever is missing or of another kind is told by its name.

    Args:
        values: the decoded map.
        name: what to call the message in errors.
        kind: which message it is, for errors.
    """

    def __init__(self, values: Mapping[Any, Any], name: str, kind: str) -> None:
        self.values = values
        self.name = name
        self.kind = kind

    def error(self, words: str) -> MessageError:
        """An error about this message."""
        return MessageError(f"{self.name}: {self.kind} {words}")

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self.error(f"has {key} {shown(value)} where a string belongs")
        return value

    def data(self, key: str) -> bytes:
        """A byte string that must be there."""
        value = self._get(key)
        if not isinstance(value, bytes):
            raise self.error(f"has {key} {shown(value)} where bytes belong")
        return value

    def integer(self, key: str) -> int:
        """An integer of 64 bits that must be there."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not _INT64.min <= value <= _INT64.max:
            raise self.error(f"has {key} {shown(value)} where an integer of 64 bits belongs")
        return value

    def number(self, key: str) -> float | int:
        """A number of at most 64 bits that must be there."""
        value = self._get(key)
        return value if isinstance(value, float) else self.integer(key)

    def part(self, key: str) -> Content:
        """A map in this map."""
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise self.error(f"has {key} {shown(value)} where a map belongs")
        return Content(value, self.name, f"{self.kind}, {key},")

    def _get(self, key: str) -> Any:
        try:
            return self.values[key]
        except KeyError:
            raise self.error(f"has no {key}; it has {', '.join(map(named, self.values)) or 'nothing'}") from None


def shown(value: Any) -> str:
    """A value for an error: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(key: Any) -> str:
    """The key of a map as text."""
    return key if isinstance(key, str) else shown(key)


def read_map(data: bytes, name: str) -> dict[Any, Any]:
    """The map that is the whole of `data`.

    Raises:
        MessageError: it is damaged, something follows it, or cbor2 is not installed.
    """
    try:
        import cbor2
    except ImportError as error:
        raise MessageError(f"{name} is CBOR, and reading it needs cbor2: pip install 'lclstream[stream]'") from error

    decoder = cbor2.CBORDecoder(io.BytesIO(data))
    try:
        values = decoder.decode()
    except Exception as error:  # tags are decoded by other libraries, which raise what they like
        raise MessageError(f"{name} ({len(data)} bytes) cannot be read as CBOR: {error}") from error
    try:
        decoder.read(1)
    except cbor2.CBORDecodeEOF:
        pass
    else:
        raise MessageError(f"{name} ({len(data)} bytes) has more bytes behind the end of its CBOR map")
    if not isinstance(values, dict):
        raise MessageError(f"{name} is CBOR, but {type(values).__name__} and not a map")
    return values


def array_of(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> npt.NDArray[Any]:
    """One image with a leading event axis, in memory of its own that may be written to.

    Raises:
        MessageError: `data` have another size.
    """
    wanted = dtype.itemsize
    for length in shape:
        wanted *= length
    if len(data) != wanted:
        words = "x".join(map(str, shape))
        raise MessageError(f"{name}: an image of {words} {dtype} has {wanted} bytes, not {len(data)}")
    try:
        return np.frombuffer(bytearray(data), dtype).reshape((1, *shape)) if data else np.empty((1, *shape), dtype)
    except ValueError as error:
        raise MessageError(f"{name}: an image of the shape {shape}: {error}") from error
