"""The events of one HDF5 message while they come: each is copied to its row of a file laid out before."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError
from lclstreamer.events import Buffer, Event, Message, Ragged, RunInfo
from lclstreamer.serializers.codecs import AsItIs, ChunkCodec
from lclstreamer.serializers.layout import NO_ADDRESS, Layout, row_size, write_end
from lclstreamer.serializers.slots import Slot, SlotRing

_MISSING_INTEGER = -999
#: Compressing less than this in another thread costs more than it gains.
_THREAD_FROM = 16_384

#: Shape and dtype of one event's value.
Kind = tuple[tuple[int, ...], np.dtype[Any]]


class Owner(Protocol):
    """What a batch needs of its serializer.

    Attributes:
        paths: data source name to dataset path.
        incomplete: data sources that have missed a value.
        stamps: data source name to the path of the dataset with its times in nanoseconds.
        ring: where memory comes from.
    """

    paths: dict[str, str]
    incomplete: frozenset[str]
    stamps: dict[str, str]
    ring: SlotRing

    def codec(self, name: str, kind: Kind) -> ChunkCodec | None:
        """How values of this kind are compressed."""

    def submit(self, work: Callable[[], Buffer]) -> Future[Buffer]:
        """Run in another thread."""


class Batch:
    """The events of one message while they come.

    Args:
        owner: its serializer.
        layout: of the file.
        kinds: shape and dtype by data source name.
        ragged: names of those with values of another length in every event.
        run: of all its events.
        timed: names of the data sources that have exact times in it.
    """

    def __init__(
        self,
        owner: Owner,
        layout: Layout,
        kinds: dict[str, Kind],
        ragged: set[str],
        run: RunInfo,
        timed: frozenset[str],
    ) -> None:
        self.layout, self.kinds, self.ragged, self.run, self.timed = layout, kinds, ragged, run, timed
        self.count = 0
        self._owner = owner
        places, size = _places(owner, layout)
        self.ring = owner.ring
        self.slot: Slot = self.ring.take(size, layout)
        memory = self.slot.memory
        if self.slot.content is not layout:
            for place, piece in layout.fixed:
                memory[place : place + len(piece)] = piece
            self.slot.content = layout
        self.rows = {
            column.path: np.ndarray(
                (layout.rows + column.extra, *column.shape), column.dtype, memory, places[column.path][0]
            )
            for column in layout.columns
            if column.kind != "ragged"
        }
        self._rooms = {path: (place[1], place[2]) for path, place in places.items() if len(place) == 3}
        self.chunks: dict[str, list[Buffer | Future[Buffer]]] = {path: [] for path in layout.packed}
        self.pieces: dict[str, list[NDArray[Any]]] = {path: [] for path in layout.ragged}
        self._plain: list[tuple[str, tuple[int, ...], np.dtype[Any], NDArray[Any]]] = []
        self._packed: list[tuple[str, tuple[int, ...], np.dtype[Any], str, ChunkCodec]] = []
        self._text: list[tuple[str, NDArray[Any]]] = []
        self._masks: list[tuple[str, NDArray[Any]]] = []
        self._absent: list[str] = []
        self._sort_fields()
        numbers = [one[0] for one in self._plain] + [one[0] for one in self._packed]
        self._numbers = [(name, *self.kinds[name]) for name in numbers]
        self._stamps = [(name, self.rows[path]) for name, path in owner.stamps.items() if name in timed]

    def _sort_fields(self) -> None:
        owner = self._owner
        for name, path in owner.paths.items():
            if f"{path}_missing" in self.rows:
                self._masks.append((name, self.rows[f"{path}_missing"]))
            if name not in self.kinds:
                self._absent.append(name)
            elif name in self.ragged:
                continue
            elif path in self.chunks:
                codec = owner.codec(name, self.kinds[name])
                assert codec is not None
                self._packed.append((name, *self.kinds[name], path, codec))
            elif self.kinds[name][1].kind == "S":
                self._text.append((name, self.rows[path]))
            else:
                self._plain.append((name, *self.kinds[name], self.rows[path]))

    def add(self, event: Event) -> bool:
        """Copy an event to its row; false, with nothing changed, when it does not fit this layout."""
        row = self.count
        if row == self.layout.rows or (event.run is not self.run and event.run != self.run):
            return False
        values = event.values
        try:
            fits = self._fits(values)
        except (KeyError, AttributeError):
            return False
        if not fits or not self.fits_times(event):
            return False
        for name, _, dtype, rows in self._plain:
            value = values[name]
            rows[row] = filler(dtype) if value is None else value
        for name, rows in self._text:
            value = values[name]
            rows[row] = b"" if value is None else value
        for name, _, dtype, path, codec in self._packed:
            value = values[name]
            rows = self.rows[path]
            rows[row] = filler(dtype) if value is None else value
            self._compress(path, row, rows[row], codec)
        for name in self.ragged:
            self._add_ragged(name, row, values[name])
        for name, rows in self._masks:
            rows[row] = values[name] is None
        for name, rows in self._stamps:
            stamp = event.time_of(name)
            rows[row] = _MISSING_INTEGER if stamp is None else stamp
        self.count += 1
        return True

    def fits_times(self, event: Event) -> bool:
        """Whether it has those times, and no others, of which this batch keeps nanoseconds; one may be missing."""
        for name in self._owner.stamps:
            if event.time_of(name) is None:
                if name in self.timed and event.values[name] is not None:
                    return False
            elif name not in self.timed:
                return False
        return True

    def _fits(self, values: Mapping[str, Any]) -> bool:
        masked = self._owner.incomplete
        for name, shape, dtype in self._numbers:
            value = values[name]
            if value is None:
                if name not in masked or not any(name == one for one, _ in self._masks):
                    return False
            elif value.shape != shape or value.dtype != dtype:
                return False
        for name, rows in self._text:
            value = values[name]
            if value is None:
                if name not in masked:
                    return False
            elif value.dtype.kind != "S" or value.shape != rows.shape[1:] or value.dtype.itemsize > rows.dtype.itemsize:
                return False
        for name in self.ragged:
            value = values[name]
            if value is None:
                if name not in masked:
                    return False
            elif not isinstance(value, Ragged) or value.values.dtype != self.kinds[name][1]:
                return False
        return all(values[name] is None for name in self._absent)

    def _add_ragged(self, name: str, row: int, value: Ragged | None) -> None:
        path = self._owner.paths[name]
        pieces, offsets = self.pieces[path], self.rows[f"{path}_offsets"]
        if value is not None:
            pieces.append(np.array(value.values).reshape(-1))
        offsets[row + 1] = offsets[row] + np.uint64(0 if value is None else pieces[-1].size)

    def _compress(self, path: str, row: int, values: NDArray[Any], codec: ChunkCodec) -> None:
        start, room = self._rooms[path]
        into = self.slot.memory[start + row * room : start + (row + 1) * room]
        if values.nbytes >= _THREAD_FROM:
            self.chunks[path].append(self._owner.submit(lambda: codec.encode(values, into)))
        else:
            self.chunks[path].append(codec.encode(values, into))

    def take_over(self, other: Batch) -> None:
        """Copy the rows of a batch that another layout holds, and give its slot back."""
        for chunks in other.chunks.values():
            for chunk in chunks:
                if isinstance(chunk, Future):
                    chunk.exception()
        before: dict[str, Any] = {}
        for row in range(other.count):
            for name, path in self._owner.paths.items():
                before[name] = other.value(name, path, row)
            times = {name: other.time(name, rows, row, before[name]) for name, rows in other._stamps}
            if not self.add(Event(before, row, self.run, None, times)):
                raise AssertionError("a new layout must fit the events of the one before")
        self.ring.giver(other.slot)()

    def value(self, name: str, path: str, row: int) -> Any:
        """The value of an event, as it was added."""
        if name not in self.kinds or (f"{path}_missing" in self.rows and self.rows[f"{path}_missing"][row]):
            return None
        if name in self.ragged:
            offsets = self.rows[f"{path}_offsets"]
            whole = np.concatenate(self.pieces[path]) if self.pieces[path] else np.empty(0, self.kinds[name][1])
            return Ragged(whole[int(offsets[row]) : int(offsets[row + 1])])
        return self.rows[path][row]

    @staticmethod
    def time(name: str, rows: NDArray[Any], row: int, value: Any) -> int | None:
        """The time of an event, as it was added."""
        stamp = int(rows[row])
        return None if value is None and stamp == _MISSING_INTEGER else stamp

    def message(self, sequence: int) -> Message:
        """The message; its parts are ready when all chunks are compressed, the slot comes back when it is released."""
        running = [chunk for chunks in self.chunks.values() for chunk in chunks if isinstance(chunk, Future)]
        give_back = self.ring.giver(self.slot)
        if not running:
            return Message(self._parts(sequence), events=self.count, sequence=sequence, on_release=give_back)

        def release() -> None:
            # A message nobody wanted any more: its memory must not be used again while chunks are written to it.
            wait(running)
            give_back()

        return Message(lambda: self._parts(sequence), events=self.count, sequence=sequence, on_release=release)

    def _parts(self, sequence: int) -> list[Buffer]:
        """The buffers of the message, with the places and sizes of what follows the image written into it.

        Raises:
            ComponentError: compressing failed.
        """
        layout, memory = self.layout, self.slot.memory
        parts: list[Buffer] = [memory[: layout.size]]
        end = layout.size
        for path, places in layout.packed.items():
            for (size_at, address_at), chunk in zip(places, self.chunks[path], strict=True):
                try:
                    content = chunk.result() if isinstance(chunk, Future) else chunk
                except (Exception, CancelledError) as error:
                    raise ComponentError(f"data_serializer.compression: compressing {path} failed: {error}") from error
                # The mask of filters left out follows the size; written each time, as memory is used again.
                struct.pack_into("<II", memory, size_at, len(content), int(isinstance(content, AsItIs)))
                struct.pack_into("<Q", memory, address_at, end)
                parts.append(content)
                end += len(content)
        for path, (length_at, largest_at, address_at) in layout.ragged.items():
            content = b"".join(piece.tobytes() for piece in self.pieces[path])
            count = sum(piece.size for piece in self.pieces[path])
            struct.pack_into("<Q", memory, length_at, count)
            struct.pack_into("<Q", memory, largest_at, count)
            struct.pack_into("<QQ", memory, address_at, end if content else NO_ADDRESS, len(content))
            parts.append(content)
            end += len(content)
        struct.pack_into("<q", memory, layout.sequence_at, sequence)
        write_end(memory, end)
        return parts


def _places(owner: Owner, layout: Layout) -> tuple[dict[str, tuple[int, ...]], int]:
    """Where the rows of every dataset are in a slot, for packed ones also where their chunks go and their room each."""
    places: dict[str, tuple[int, ...]] = {path: (place,) for path, place in layout.plain.items()}
    size = layout.size
    codecs = {owner.paths[name]: (name, path) for name, path in owner.paths.items()}
    for column in layout.columns:
        if column.kind != "packed":
            continue
        size = -(-size // 64) * 64
        codec = owner.codec(codecs[column.path][0], (column.shape, column.dtype))
        assert codec is not None
        raw = size
        size = -(-(size + layout.rows * row_size(column)) // 64) * 64
        places[column.path] = (raw, size, codec.room)
        size += layout.rows * codec.room
    return places, size


def filler(dtype: np.dtype[Any]) -> Any:
    """What stands for a missing value of this type."""
    if dtype.kind in "fc":
        return np.array(np.nan, dtype)
    if dtype.kind == "i" and np.iinfo(dtype).min <= _MISSING_INTEGER:
        return np.array(_MISSING_INTEGER, dtype)
    return np.zeros((), dtype)
