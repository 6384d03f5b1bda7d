"""HDF5 files laid out once: where in the file each value goes, so that messages are made without HDF5.

HDF5 writes one file with the wanted groups, datasets and attributes; from then on only bytes at known places change:

* *plain* datasets are contiguous: an event's value is copied to its row;
* *packed* datasets have a compressed chunk an event: the chunks follow the image, and each chunk's size, filter mask
  and address are written into the index (a version 1 B-tree, whose entries are found by their first contents);
* *ragged* datasets have a length of their own in every message: the values follow the image, and length and address are
  written into the dataset's header;
* the root attribute `sequence` and the end-of-file address are numbers at known places.

Format: https://docs.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html (superblock 0, layout message 3).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import h5py
import numpy as np

#: A number that occurs nowhere else in a file, in the place of one that changes.
_MARK = 0x1EC0_5EED_FACE_0D1E
#: A length no dataset has, in the place of a ragged dataset's; nothing is allocated for it.
_MARK_LENGTH = 0x5EED_1001
#: HDF5's address of what is not stored.
NO_ADDRESS = 0xFFFF_FFFF_FFFF_FFFF
_END_OF_FILE_AT = 40
#: Rows of larger datasets begin at multiples of this, for the speed of copying.
_ALIGNED = 64


@dataclass(frozen=True)
class Column:
    """One dataset.

    Attributes:
        path: in the file.
        kind: how its values are stored, see the module.
        shape: of one event's value; for ragged datasets of one element.
        dtype: of the values; strings are `S` types.
        attributes: of the dataset.
        extra: rows it has more than the file has events (the offsets of ragged data have one).
    """

    path: str
    kind: Literal["plain", "packed", "ragged"]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: tuple[tuple[str, Any], ...] = ()
    extra: int = 0


class Layout:
    """A file of `rows` events with these columns.

    Args:
        columns: the datasets.
        rows: events in the file.
        attributes: of the root; `sequence` is added.
        filters: h5py's options for packed columns.

    Attributes:
        size: bytes of the image.
        fixed: pieces of the image that never change, with their places.
        plain: path to the place of the first row.
        packed: path to the places of size (which the filter mask follows) and address of every chunk.
        ragged: path to the places of length and address.
        sequence_at: place of the message's number.
    """

    def __init__(
        self, columns: tuple[Column, ...], rows: int, attributes: Mapping[str, Any], filters: Mapping[str, Any]
    ) -> None:
        self.columns, self.rows = columns, rows
        self.plain: dict[str, int] = {}
        self.packed: dict[str, list[tuple[int, int]]] = {}
        self.ragged: dict[str, tuple[int, int, int]] = {}
        chunks: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        lengths: dict[str, int] = {}
        file = BytesIO()
        with h5py.File(file, "w", libver="earliest", alignment_threshold=256, alignment_interval=_ALIGNED) as made:
            made.attrs.update(attributes)
            made.attrs["sequence"] = np.int64(_MARK)
            for column in columns:
                if column.kind == "plain":
                    self.plain[column.path] = _contiguous(made, column, rows + column.extra)
                elif column.kind == "packed":
                    chunks[column.path] = _chunked(made, column, rows, filters)
                else:
                    lengths[column.path] = _MARK_LENGTH + 2 * len(lengths)
                    _contiguous(made, column, lengths[column.path], early=False)
        image = bytearray(file.getvalue())
        self.size = _end(image)
        self.sequence_at = _find(image, struct.pack("<q", _MARK), "the attribute sequence")
        for path, index in chunks.items():
            self.packed[path] = [_index_entry(image, path, *entry) for entry in index]
        for column in columns:
            if column.kind == "ragged":
                self.ragged[column.path] = _length_places(image, column, lengths[column.path])
        self.fixed = self._pieces(image)

    def _pieces(self, image: bytearray) -> list[tuple[int, bytes]]:
        """The image without the rows of plain datasets, which are written anew for every message."""
        pieces: list[tuple[int, bytes]] = []
        place = 0
        for column in sorted(
            (one for one in self.columns if one.kind == "plain"), key=lambda one: self.plain[one.path]
        ):
            start = self.plain[column.path]
            pieces.append((place, bytes(image[place:start])))
            place = start + (self.rows + column.extra) * row_size(column)
        pieces.append((place, bytes(image[place:])))
        return [piece for piece in pieces if piece[1]]


def row_size(column: Column) -> int:
    """Bytes of one event's value."""
    return int(np.prod(column.shape, dtype=np.int64)) * column.dtype.itemsize


def _stored_type(column: Column) -> np.dtype[Any]:
    if column.dtype.kind != "S":
        return column.dtype
    text: np.dtype[Any] = h5py.string_dtype("utf-8", max(1, column.dtype.itemsize))
    return text


def _length_places(image: bytearray, column: Column, length: int) -> tuple[int, int, int]:
    """Places of the length, the largest length, and the address, which the size follows."""
    length_at = _find(image, struct.pack("<QQ", length, length), f"the length of {column.path}")
    size = length * column.dtype.itemsize
    return length_at, length_at + 8, _find(image, struct.pack("<QQ", NO_ADDRESS, size), f"the address of {column.path}")


def _contiguous(file: Any, column: Column, rows: int, *, early: bool = True) -> int:
    """Make a contiguous dataset without writing it; the place of its first byte, if it has one."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY if early else h5py.h5d.ALLOC_TIME_LATE)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    made = _create(file, column, rows, settings)
    place = made.id.get_offset()
    return 0 if place is None else int(place)


def _chunked(file: Any, column: Column, rows: int, filters: Mapping[str, Any]) -> list[tuple[int, tuple[int, ...]]]:
    """Make a chunked dataset with a chunk of one byte for every event; address and origin of each."""
    shape = (rows, *column.shape)
    made = file.create_dataset(
        column.path, shape=shape, dtype=column.dtype, chunks=(1, *column.shape), fillvalue=None, **filters
    )
    made.attrs.update(column.attributes)
    for row in range(rows):
        made.id.write_direct_chunk((row, *(0 for _ in column.shape)), b"\0")
    found = [made.id.get_chunk_info(number) for number in range(rows)]
    return [(int(one.byte_offset), tuple(int(part) for part in one.chunk_offset)) for one in sorted(found)]


def _create(file: Any, column: Column, rows: int, settings: Any) -> Any:
    space = h5py.h5s.create_simple((rows, *column.shape), (rows, *column.shape))
    kind = h5py.h5t.py_create(_stored_type(column), logical=True)
    parent, _, name = column.path.rstrip("/").rpartition("/")
    where = file.require_group(parent) if parent.strip("/") else file
    made = h5py.Dataset(h5py.h5d.create(where.id, name.encode(), kind, space, settings))
    made.attrs.update(column.attributes)
    return made


def _find(image: bytearray, content: bytes, what: str) -> int:
    place = image.find(content)
    if place < 0 or image.find(content, place + 1) >= 0:
        raise RuntimeError(
            f"{what} is not found exactly once in the HDF5 image: this HDF5 library writes another format"
        )
    return place


def _index_entry(image: bytearray, path: str, address: int, origin: tuple[int, ...]) -> tuple[int, int]:
    """Places of size and address of a chunk in the index: size, filter mask, origin, element offset, address."""
    entry = struct.pack(f"<II{len(origin) + 1}QQ", 1, 0, *origin, 0, address)
    place = _find(image, entry, f"a chunk of {path}")
    return place, place + len(entry) - 8


def _end(image: bytearray) -> int:
    """The file's length: rows that were never written may lie behind what HDF5 wrote."""
    (end,) = struct.unpack_from("<Q", image, _END_OF_FILE_AT)
    if image[8] != 0 or end < len(image):
        raise RuntimeError("the HDF5 image has no superblock of version 0: this HDF5 library writes another format")
    return int(end)


def write_end(image: memoryview, size: int) -> None:
    """Write the end-of-file address."""
    struct.pack_into("<Q", image, _END_OF_FILE_AT, size)
