"""Messages of the engine as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - registers the codecs of compressed messages
import numpy as np
import numpy.typing as npt

from lclstream.client.errors import MessageError

Array = npt.NDArray[Any]
#: Endings of the datasets that the engine writes beside another one.
_OFFSETS, _MISSING, _NANOSECONDS = "_offsets", "_missing", "_ns"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class Batch(Mapping[str, Array]):
    """The events of one message: dataset path → array whose first axis is the event.

    Ragged data have the elements of all events one after the other, and ``<path>_offsets`` beside them:
    :meth:`value` and :meth:`pieces` give those of an event.

    Attributes:
        attributes: the message's root attributes (experiment, run, rank, sequence, …).
        field_attributes: dataset path → that dataset's own attributes (units, epoch, …); only datasets that have any.
    """

    def __init__(
        self,
        arrays: dict[str, Array],
        attributes: dict[str, Any],
        field_attributes: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self._arrays = arrays
        self.attributes = attributes
        self.field_attributes = field_attributes or {}

    def __getitem__(self, path: str) -> Array:
        try:
            return self._arrays[path if path.startswith("/") else f"/{path}"]
        except KeyError:
            raise KeyError(
                f"{path!r} is not in this message; it has {', '.join(self._arrays) or 'no dataset'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def events(self) -> int:
        """Number of events: the common length of the first axes.

        Raises:
            MessageError: the datasets do not agree.
        """
        ragged = [path for path in self._arrays if self.is_ragged(path)]
        beside = {path for name in ragged for path in (name, f"{name}{_OFFSETS}")}
        lengths = {len(array) for path, array in self._arrays.items() if array.ndim and path not in beside}
        lengths |= {len(self._arrays[f"{path}{_OFFSETS}"]) - 1 for path in ragged}
        if len(lengths) > 1:
            shapes = ", ".join(f"{path} {array.shape}" for path, array in self._arrays.items())
            raise MessageError(f"the datasets of a message have different numbers of events: {shapes}")
        return lengths.pop() if lengths else 0

    def is_ragged(self, path: str) -> bool:
        """Whether events have different numbers of elements in this dataset.

        Raises:
            KeyError: there is no such dataset.
            MessageError: the offsets beside it cannot be right.
        """
        data = self[path]
        offsets = self.get(f"{path}{_OFFSETS}")
        if offsets is None or data.ndim != 1 or offsets.ndim != 1 or offsets.dtype != np.uint64 or not len(offsets):
            return False
        if offsets[0] == 0 and offsets[-1] == len(data) and bool((offsets[1:] >= offsets[:-1]).all()):
            return True
        if len(offsets) == len(data):
            return False  # a dataset of its own that happens to have this name
        raise MessageError(
            f"{path}{_OFFSETS} does not divide the {len(data)} elements of {path}: it goes from {offsets[0]} to "
            f"{offsets[-1]}, and must never fall"
        )

    def pieces(self, path: str) -> list[Array]:
        """The elements of each event of a ragged dataset; of another one its rows. Views, nothing is copied.

        Raises:
            KeyError, MessageError: as :meth:`is_ragged`.
        """
        data = self[path]
        if not self.is_ragged(path):
            return [np.asarray(row) for row in data]
        offsets = [int(offset) for offset in self[f"{path}{_OFFSETS}"]]
        return [data[begin:end] for begin, end in pairwise(offsets)]

    def missing(self, path: str) -> npt.NDArray[np.bool_]:
        """For each event whether its value is missing, by ``<path>_missing``; all False without that dataset.

        Raises:
            KeyError, MessageError: as :meth:`is_ragged`.
        """
        flags = self.get(f"{path}{_MISSING}")
        if flags is not None:
            return np.asarray(flags != 0)
        offsets = self[f"{path}{_OFFSETS}"] if self.is_ragged(path) else None
        return np.zeros(len(self[path]) if offsets is None else len(offsets) - 1, np.bool_)

    def value(self, path: str, event: int) -> Any:
        """The value of one event: a row, or the elements of a ragged dataset; None where it is missing.

        Raises:
            KeyError, MessageError: as :meth:`is_ragged`.
            IndexError: the message has no such event.
        """
        if self.missing(path)[event]:
            return None
        if not self.is_ragged(path):
            return self[path][event]
        offsets = self[f"{path}{_OFFSETS}"]
        event = event if event >= 0 else event + len(offsets) - 1
        return self[path][int(offsets[event]) : int(offsets[event + 1])]

    def nanoseconds(self, path: str) -> npt.NDArray[np.int64] | None:
        """Times as integer nanoseconds since 1970, from ``<path>_ns``; None where the stream has none."""
        times = self.get(f"{path}{_NANOSECONDS}")
        return None if times is None else times.astype(np.int64)

    def only(self, events: npt.NDArray[np.int64]) -> Batch:
        """A batch of some events, in the order given; ragged data keep their pieces.

        Args:
            events: their numbers in this batch.

        Raises:
            MessageError: as :meth:`is_ragged`.
        """
        arrays: dict[str, Array] = {}
        for path in sorted(self, key=len):  # data before the offsets that are made with them
            if path in arrays:
                continue
            if not self.is_ragged(path):
                arrays[path] = self[path][events] if self[path].ndim else self[path]
                continue
            pieces = self.pieces(path)
            kept = [pieces[int(event)] for event in events]
            arrays[path] = np.concatenate(kept) if kept else self[path][:0]
            lengths = [0, *(len(piece) for piece in kept)]
            arrays[f"{path}{_OFFSETS}"] = np.cumsum(lengths, dtype=np.uint64)
        return Batch({path: arrays[path] for path in self}, self.attributes, self.field_attributes)


def decode(message: bytes, *, name: str = "message") -> Batch:
    """The arrays of one HDF5 message, of any dtype (strings as arrays of ``str`` objects).

    Args:
        message: an HDF5 file image as the engine's ``HDF5BinarySerializer`` sends it, compressed or not.
        name: what to call the message in errors.

    Raises:
        MessageError: it is not HDF5, is damaged, or needs a codec that is not installed.
    """
    if not message.startswith(HDF5_SIGNATURE):
        begin = message[:16]
        raise MessageError(
            f"{name} ({len(message)} bytes, beginning {begin!r}) is not HDF5: "
            "does the stream's data_serializer say HDF5BinarySerializer? (lclstream.client.decoding reads the others)"
        )
    arrays: dict[str, Array] = {}
    field_attributes: dict[str, dict[str, Any]] = {}

    def take(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        is_text = h5py.check_string_dtype(item.dtype) is not None
        arrays[f"/{path}"] = np.asarray(item.asstr(errors="surrogateescape")[...] if is_text else item[...])
        if item.attrs:
            field_attributes[f"/{path}"] = {key: _plain(value) for key, value in item.attrs.items()}

    try:
        with h5py.File(io.BytesIO(message), "r") as file:
            attributes = {key: _plain(value) for key, value in file.attrs.items()}
            file.visititems(take)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise MessageError(f"{name} ({len(message)} bytes) cannot be read as HDF5: {error}") from error
    return Batch(arrays, attributes, field_attributes)


def _plain(value: Any) -> Any:
    """Attribute values as Python's own types where they are scalars."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value
