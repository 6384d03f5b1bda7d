"""Messages on disk: when the memory fills, or while no consumer is there, and across a crash of the buffer.

The queue keeps its order, since only the memory of its batches moves: the newest ones are written to a *segment* file,
and their block becomes a mapping of that file. Consumers are served from it like from memory; the kernel reads it back.
A segment is deleted when all its records have been given away.

::

    segment  = record*
    record   = "NNGSPILL" done:u8 format:u8 group:u16 count:u32 size:u64 nbytes:u64 number:u64 crc:u32
               end:u64 * count   data: size bytes                                 padding to 8 bytes

(little-endian). `number` is the record's place in the queue: the newest ones are written first, so that their place in
the files does not tell it. `done` becomes 1 when every message of the record was sent or lost. A buffer that starts
finds those that are not done and offers them again, in order: after a crash the one that was being sent comes twice
(at most a MiB, or one message, for each consumer). What was only in memory is gone. `crc` covers the head and the ends:
a record that was being written when the buffer crashed is not offered. A power cut may lose what the kernel had not
written yet.

Ownership: one thread (:meth:`Spill.start`) writes; any thread that gives up the last use of a record marks it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
_AFTER_FULL_DISK_S = 5.0

_MAGIC = b"NNGSPILL"
_HEAD = struct.Struct("<8sBBHIQQQI")
_DONE_AT = len(_MAGIC)
_FORMATS: tuple[Format, ...] = (sp.SP, sp.SP_IPC, zmtp.ZMTP)
_NUMBERS = {wire.name: number for number, wire in enumerate(_FORMATS)}


class DiskFullError(Exception):
    """No more can be written now."""


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
        """Write the whole queue for the next start; says whether it could be written. Call after :meth:`stop`."""
        try:
            while self._relieve():
                pass
        except (DiskFullError, OSError) as error:
            # Whatever hinders it: what is still in memory must be counted as lost, not as held.
            log.error("spill: %s: %s", self._folder, error)
            return False
        return True

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
            except DiskFullError as error:
                log.warning("spill: %s: producers wait until consumers make room", error)
                self._ended.wait(_AFTER_FULL_DISK_S)
            except Exception:
                log.exception("spill: cannot write to %s any more", self._folder)
                return

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
        records = list(_records(loans))
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
        if self._limit is not None and self.disk_bytes + size > self._limit:
            raise DiskFullError(f"{self._folder} holds the {self._limit} bytes that --spill-limit allows")
        if self._current is not None and self._current.size >= SEGMENT:
            current, self._current = self._current, None
            current.close()
        if self._current is None:
            segment = _Segment(self, self._folder / f"{self._number:012d}.segment", create=True)
            with self._lock:
                self._segments.add(segment)
                self._current = segment
            self._number += 1
        try:
            return self._current.append(run)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFullError(f"{self._folder}: {error.strerror}") from error
            raise


def _records(loans: list[Loan]) -> Iterator[list[Loan]]:
    """Batches that become one record each, the oldest first."""
    record: list[Loan] = []
    size = 0
    for loan in loans:
        batch = loan.copy
        if record and (record[0].copy.format.name != batch.format.name or size + batch.size > RECORD):
            yield record
            record, size = [], 0
        record.append(loan)
        size += batch.size
    if record:
        yield record


class _Segment:
    """One file of records."""

    def __init__(self, spill: Spill, path: Path, *, create: bool) -> None:
        self._spill = spill
        self.path = path
        self._lock = threading.Lock()
        self._live = 0
        self._closed = False
        self._maps: dict[Block, tuple[mmap.mmap, int]] = {}
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
        try:
            position = _write_at(self._file.fileno(), head + index, at)
            for batch in run:
                position = _write_at(self._file.fileno(), batch.block.view[batch.begin : batch.stop], position)
        except OSError:
            os.ftruncate(self._file.fileno(), at)
            raise
        self.size = position + -position % 8
        os.ftruncate(self._file.fileno(), self.size)
        merged = self._map(at, first.format, first.group, ends, size, nbytes, first.since)
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
            index = os.pread(self._file.fileno(), 8 * count, at + _HEAD.size)
            if head[_DONE_AT + 1 :] != _head(wire, group, count, size, nbytes, number, index)[_DONE_AT + 1 :]:
                break
            if not done and count:
                ends: array[int] = array("Q")
                ends.frombytes(index)
                batch = self._map(at, _FORMATS[wire], group % groups, ends, size, nbytes, time.monotonic())
                batch.number = number
                yield batch
            at = data_at + size + -(data_at + size) % 8
        if at < self.size:
            log.warning("spill: %s: %d bytes at its end were not written wholly", self.path, self.size - at)

    def give_back(self, block: Block) -> None:
        """All messages of a record were given away."""
        with self._lock:
            mapping, at = self._maps.pop(block)
            self._live -= 1
            with contextlib.suppress(OSError):  # a disk that is full, or gone: the record comes twice after a crash
                os.pwrite(self._file.fileno(), b"\x01", at + _DONE_AT)
            _unmap(block, mapping)
            over = self._closed and not self._live
        if over:
            self._delete()

    def close(self) -> None:
        """No more records are added; deletes the file when nothing of it is left."""
        with self._lock:
            self._closed = True
            over = not self._live
        if over:
            self._delete()

    def unmap(self) -> None:
        """The buffer ends: free memory and file, leave the records."""
        with self._lock:
            for block, (mapping, _) in self._maps.items():
                _unmap(block, mapping)
            self._maps.clear()
            self._file.close()
            if not self._live:
                self.path.unlink(missing_ok=True)

    def _map(self, at: int, wire: Format, group: int, ends: array[int], size: int, nbytes: int, since: float) -> Batch:
        begin = at + _HEAD.size + 8 * len(ends)
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(self._file.fileno(), begin - start + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
        block = Block(self, memoryview(mapping)[begin - start :], 0)
        with self._lock:
            self._live += 1
            self._maps[block] = mapping, at
        return Batch(block, wire, 0, ends, nbytes, since=since, group=group)

    def _delete(self) -> None:
        self._spill.forget(self)
        with self._lock:
            if not self._file.closed:
                self._file.close()
                self.path.unlink(missing_ok=True)


def _unmap(block: Block, mapping: mmap.mmap) -> None:
    block.view.release()
    with contextlib.suppress(BufferError):  # somebody still holds a slice: freed with it
        mapping.close()


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
