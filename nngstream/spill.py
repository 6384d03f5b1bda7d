"""Messages on disk: when the memory fills, or while no consumer is there, and across a crash of the buffer.

The queue keeps its order, since only the memory of its batches moves: the newest ones are written to a *segment* file,
and their block becomes a part of that file, which is mapped when a consumer takes it, and no sooner: there may be more
records than files and mappings a process may have. A segment is deleted when all its records have been given away.

::

    segment  = record*
    record   = "NNGSPILL" done:u8 format:u8 group:u16 count:u32 size:u64 nbytes:u64 number:u64 crc:u32
               end:u64 * count   data: size bytes                                 padding to 8 bytes

(little-endian). `number` is the record's place in the queue: the newest ones are written first, so that their place in
the files does not tell it. `done` becomes 1 when every message of the record was sent or lost. A buffer that starts
finds those that are not done and offers them again, in order: after a crash the one that was being sent comes twice
(at most a MiB, or one message, for each consumer). A buffer that ends in order marks the messages of such a record that
are gone, with the highest bit of their `end`, so that none comes twice. What was only in memory is gone. `crc` covers
the head and the ends, without marks: a record that was being written when the buffer crashed is not offered. A power
cut may lose what the kernel had not written yet.

Ownership: one thread (:meth:`Spill.start`) writes; any thread that gives up the last use of a record marks it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from nngstream.batch import Batch
from nngstream.errors import ConfigurationError
from nngstream.fifo import Fifo, Loan
from nngstream.memory import Block, Pool
from nngstream.wire import Format, sp, zmtp

log = logging.getLogger("nngstream")

#: A segment that has so many bytes is closed, and the next one begun.
SEGMENT = 64 << 20
#: Small batches that follow each other become one record of about this many bytes.
RECORD = 1 << 20
#: Written at once, before the queue is told: bounds what is written twice when consumers take it meanwhile.
_ROUND = 32 << 20
#: Memory is moved to disk while messages take more than this share of the capacity.
FULL = 0.5
#: A consumer that reconnects at once finds its messages in memory.
ALONE_S = 1.0
_LOOK_S = 0.05
_AFTER_FAILURE_S = 5.0

_MAGIC = b"NNGSPILL"
_HEAD = struct.Struct("<8sBBHIQQQI")
_DONE_AT = len(_MAGIC)
#: Set in the `end` of a message that is gone.
_GONE = 1 << 63
_FORMATS: tuple[Format, ...] = (sp.SP, sp.SP_IPC, zmtp.ZMTP)
_NOTHING = memoryview(b"")
_NUMBERS = {wire.name: number for number, wire in enumerate(_FORMATS)}


class CannotWriteError(Exception):
    """No more can be written now: the disk or the limit is full, or the system refuses."""


class Spill:
    """See the module.

    Args:
        folder: for this buffer alone; made when missing.
        limit: most bytes on disk, None for as many as the disk has.
        fifo: the queue.
        pool: the memory to relieve.

    Raises:
        ConfigurationError: the folder cannot be used, or another buffer uses it.
    """

    def __init__(self, folder: Path, limit: int | None, fifo: Fifo, pool: Pool) -> None:
        self._folder = folder
        self._limit = limit
        self._fifo = fifo
        self._pool = pool
        self._lock = threading.Lock()
        self._segments: set[_Segment] = set()
        self._current: _Segment | None = None
        self._number = 0
        self._ended = threading.Event()
        self._alone_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="spill", daemon=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = (folder / "lock").open("a")
        except OSError as error:
            raise ConfigurationError(f"--spill {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ConfigurationError(
                f"--spill {folder}: another buffer uses it; give each a folder of its own"
            ) from error

    @property
    def disk_bytes(self) -> int:
        """Bytes of the segment files."""
        with self._lock:
            return sum(segment.size for segment in self._segments)

    def recover(self) -> int:
        """Queue what a buffer before us left, in its order; returns how many messages. Call before :meth:`start`."""
        batches: list[Batch] = []
        for path in sorted(self._folder.glob("*.segment")):
            self._number = max(self._number, int(path.stem) + 1)
            segment = _Segment(self, path, create=False)
            self._segments.add(segment)
            batches += segment.records(self._fifo.groups)
            segment.close()
        for batch in sorted(batches, key=lambda each: each.number):
            self._fifo.put(batch)
        return sum(map(len, batches))

    def start(self) -> None:
        """Begin to relieve the memory."""
        self._thread.start()

    def stop(self) -> None:
        """Write no more on our own account."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def keep_everything(self) -> bool:
        """Write what is in the queue, and nothing else, for the next start. Call after :meth:`stop`.

        Returns:
            False when something could not be written.
        """
        try:
            self._mark_gone()
            while self._relieve():
                pass
        except (CannotWriteError, OSError) as error:
            log.error("spill: %s", error)
            return False
        return True

    def _mark_gone(self) -> None:
        """Consumers that were cut off have had a part of their records: it must not come again."""
        queued: dict[_Record, list[Batch]] = {}
        for batch in self._fifo.on_disk():
            assert isinstance(batch.block, _Record)
            queued.setdefault(batch.block, []).append(batch)
        for record, parts in queued.items():
            if sum(map(len, parts)) < record.messages:
                record.segment.mark_gone(record, parts)

    def close(self) -> None:
        """Free files and memory; records that are not done stay on disk."""
        with self._lock:
            segments = list(self._segments)
        for segment in segments:
            segment.unmap()
        self._lock_file.close()

    def forget(self, segment: _Segment) -> None:
        """A segment has nothing left to give."""
        with self._lock:
            self._segments.discard(segment)
            if self._current is segment:
                self._current = None

    # -- the spill's thread

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                while self._wanted() and not self._ended.is_set() and self._relieve():
                    pass
            except CannotWriteError as error:
                log.warning("spill: %s: producers wait until consumers make room", error)
                self._ended.wait(_AFTER_FAILURE_S)
            except Exception:
                log.exception("spill: error while writing to %s; trying again", self._folder)
                self._ended.wait(_AFTER_FAILURE_S)

    def _wanted(self) -> bool:
        if self._pool.used > FULL * self._pool.capacity:
            return True
        now = time.monotonic()
        if self._fifo.consumers:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        return self._alone_since is not None and now - self._alone_since >= ALONE_S

    def _relieve(self) -> bool:
        """Move the newest batches that are in memory to disk; False when there are none."""
        loans = self._fifo.newest_in_memory(_ROUND)
        if not loans:
            return False
        records = list(_records(loans, RECORD if self._limit is None else min(RECORD, self._limit)))
        while records:
            try:
                merged = self._write([loan.copy for loan in records[0]])
            except BaseException:
                for record in records:
                    self._fifo.return_loan(record)
                raise
            if not self._fifo.replace(records.pop(0), merged):
                merged.block.drop()  # consumers were faster: the record is done
        return True

    def _write(self, run: list[Batch]) -> Batch:
        size = sum(batch.size for batch in run)
        current = self._current
        if current is not None and (current.size >= SEGMENT or current.idle):
            # Idle too: records that are done would count against a small limit for ever.
            self._current = None
            current.close()
        if self._limit is not None and self.disk_bytes + size > self._limit:
            raise CannotWriteError(f"{self._folder} holds the {self._limit} bytes that --spill-limit allows")
        try:
            return (self._current or self._begin_segment()).append(run)
        except OSError as error:
            raise CannotWriteError(f"{self._folder}: {error.strerror or error}") from error

    def _begin_segment(self) -> _Segment:
        path = self._folder / f"{self._number:012d}.segment"
        self._number += 1  # now: a file that was made and could not be used must not hinder the next try
        segment = _Segment(self, path, create=True)
        with self._lock:
            self._segments.add(segment)
            self._current = segment
        return segment


def _records(loans: list[Loan], most: int) -> Iterator[list[Loan]]:
    """Batches that become one record of about `most` bytes each, the oldest first."""
    record: list[Loan] = []
    size = 0
    for loan in loans:
        batch = loan.copy
        if record and (record[0].copy.format.name != batch.format.name or size + batch.size > most):
            yield record
            record, size = [], 0
        record.append(loan)
        size += batch.size
    if record:
        yield record


class _Record(Block):
    """The messages of one record, in their file until somebody looks at them.

    Args:
        segment: where it lies.
        at: where the record begins there.
        messages: how many it has.
        size: bytes of their data.
    """

    __slots__ = ("_mapping", "_size", "at", "messages", "segment")

    def __init__(self, segment: _Segment, at: int, messages: int, size: int) -> None:
        super().__init__(segment, _NOTHING, 0)
        self._mapping: mmap.mmap | None = None
        self._size = size
        self.segment = segment
        self.at = at
        self.messages = messages

    @property
    def view(self) -> memoryview:
        """The data; they stay mapped until :meth:`unmap`."""
        if self._view is _NOTHING:
            with self._lock:
                if self._view is _NOTHING:
                    self._view = self._mapped()
        return self._view

    def unmap(self) -> None:
        """Nobody looks at the data any more."""
        if self._view is not _NOTHING:
            self._view.release()
        if self._mapping is not None:
            with contextlib.suppress(BufferError):  # somebody still holds a slice: freed with it
                self._mapping.close()

    def _mapped(self) -> memoryview:
        number = self.segment.fileno()
        begin = self.at + _HEAD.size + 8 * self.messages
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            self._mapping = mmap.mmap(number, begin - start + self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
        except OSError:  # out of files or mappings: the messages must not be lost for that
            return memoryview(_read_at(number, self._size, begin))
        return memoryview(self._mapping)[begin - start :]


class _Segment:
    """One file of records."""

    def __init__(self, spill: Spill, path: Path, *, create: bool) -> None:
        self._spill = spill
        self.path = path
        self._lock = threading.Lock()
        self._closed = False
        self._records: set[_Record] = set()
        self._file = path.open("x+b" if create else "r+b")
        path.chmod(0o600)
        self.size = 0 if create else path.stat().st_size

    def append(self, run: list[Batch]) -> Batch:
        """Write batches as one record; returns the same messages, on disk."""
        first = run[0]
        ends: array[int] = array("Q")
        size = 0
        for batch in run:
            ends.extend(size + end - batch.begin for end in batch.ends)
            size += batch.size
        nbytes = sum(batch.nbytes for batch in run)
        index = ends.tobytes()
        head = _head(_NUMBERS[first.format.name], first.group, len(ends), size, nbytes, first.number, index)
        at = self.size
        number = self._file.fileno()
        try:
            position = _write_at(number, head + index, at)
            for batch in run:
                position = _write_at(number, batch.block.view[batch.begin : batch.stop], position)
            end = position + -position % 8
            os.ftruncate(number, end)
            merged = self._record(at, first.format, first.group, ends, size, nbytes, first.since)
        except BaseException:
            # A record that is whole on disk while its messages stay in memory would give them twice after a restart.
            with contextlib.suppress(OSError):
                os.ftruncate(number, at)
            raise
        self.size = end
        merged.number = first.number
        return merged

    def records(self, groups: int) -> Iterator[Batch]:
        """The records that are not done."""
        at = 0
        while at + _HEAD.size <= self.size:
            head = os.pread(self._file.fileno(), _HEAD.size, at)
            magic, done, wire, group, count, size, nbytes, number, _ = _HEAD.unpack(head)
            data_at = at + _HEAD.size + 8 * count
            if magic != _MAGIC or wire >= len(_FORMATS) or data_at + size > self.size:
                break
            ends: array[int] = array("Q")
            ends.frombytes(os.pread(self._file.fileno(), 8 * count, at + _HEAD.size))
            gone = [bool(end & _GONE) for end in ends]
            if any(gone):
                ends = array("Q", [end & ~_GONE for end in ends])
            index = ends.tobytes()
            if head[_DONE_AT + 1 :] != _head(wire, group, count, size, nbytes, number, index)[_DONE_AT + 1 :]:
                break
            if not done and count:
                batch = self._record(at, _FORMATS[wire], group % groups, ends, size, nbytes, time.monotonic())
                batch.number = number
                yield from _without(batch, gone) if any(gone) else [batch]
            at = data_at + size + -(data_at + size) % 8
        if at < self.size:
            log.warning("spill: %s: %d bytes at its end were not written wholly", self.path, self.size - at)

    @property
    def idle(self) -> bool:
        """Whether everything in it has been given away."""
        return not self._records

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def give_back(self, block: Block) -> None:
        """All messages of a record were given away."""
        assert isinstance(block, _Record)
        with self._lock:
            self._records.remove(block)
            with contextlib.suppress(OSError):  # a disk that is full, or gone: the record comes twice after a crash
                os.pwrite(self._file.fileno(), b"\x01", block.at + _DONE_AT)
            block.unmap()
            over = self._closed and not self._records
        if over:
            self._delete()

    def mark_gone(self, record: _Record, left: list[Batch]) -> None:
        """All messages of a record were given away but these.

        Raises:
            OSError: it cannot be written.
        """
        kept = {end for batch in left for end in batch.ends}
        at = record.at + _HEAD.size
        ends: array[int] = array("Q")
        ends.frombytes(os.pread(self._file.fileno(), 8 * record.messages, at))
        _write_at(self._file.fileno(), array("Q", [end if end in kept else end | _GONE for end in ends]).tobytes(), at)

    def close(self) -> None:
        """No more records are added; deletes the file when nothing of it is left."""
        with self._lock:
            self._closed = True
            over = not self._records
        if over:
            self._delete()

    def unmap(self) -> None:
        """The buffer ends: free memory and file, leave the records."""
        with self._lock:
            for record in self._records:
                record.unmap()
            self._file.close()
            if not self._records:
                self.path.unlink(missing_ok=True)
            self._records.clear()

    def _record(
        self, at: int, wire: Format, group: int, ends: array[int], size: int, nbytes: int, since: float
    ) -> Batch:
        record = _Record(self, at, len(ends), size)
        with self._lock:
            self._records.add(record)
        return Batch(record, wire, 0, ends, nbytes, since=since, group=group)

    def _delete(self) -> None:
        self._spill.forget(self)
        with self._lock:
            if not self._file.closed:
                self._file.close()
                self.path.unlink(missing_ok=True)


def _without(batch: Batch, gone: list[bool]) -> Iterator[Batch]:
    """The runs of messages that are not gone; the batch is used up."""
    for is_gone, same in itertools.groupby(gone):
        count = sum(1 for _ in same)
        run = batch.split(count) if count < len(batch) else batch
        if is_gone:
            run.block.drop()
        else:
            yield run


def _head(wire: int, group: int, count: int, size: int, nbytes: int, number: int, index: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, 0, wire, group, count, size, nbytes, number, 0)
    crc = zlib.crc32(index, zlib.crc32(head))
    return _HEAD.pack(_MAGIC, 0, wire, group, count, size, nbytes, number, crc)


def _write_at(number: int, data: bytes | memoryview, position: int) -> int:
    view = memoryview(data)
    while view:
        count = os.pwrite(number, view, position)
        position += count
        view = view[count:]
    return position


def _read_at(number: int, size: int, position: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.preadv(number, [view], position)
        if not count:
            raise EOFError(f"a segment ends {len(view)} bytes before the end of its record")
        position += count
        view = view[count:]
    return data
