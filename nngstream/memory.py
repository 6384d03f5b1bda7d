"""The memory of the buffer: reused slabs, bounded in bytes. Who finds no room waits: that wait is the back-pressure.

Fresh large memory costs a page fault every 4 kB (1.9 GB/s were measured), memory used before does not (10 GB/s);
therefore slabs are kept for the next message of about the same size, and given back to the system only when another
size needs the room. Everything mapped for messages, in use or kept, never exceeds the capacity (one exception: `grow`).

Outside the capacity, each producer's connection owns one chunk to receive into (:meth:`Pool.chunk`).

Ownership: any thread may call anything here. A :class:`Block` belongs to whoever holds it; batches that share one
count themselves with :meth:`Block.share` and :meth:`Block.drop`.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from nngstream.errors import InterruptedWaitError, OversizeError

#: Charged for each batch beside its bytes: the Python objects that describe it.
BATCH_OVERHEAD = 512
#: Largest read of small messages at once, in bytes.
CHUNK = 1024 * 1024
_HUGE = 2 * 1024 * 1024
#: Copies up to this size come from the heap, in bytes.
_COPY_SMALL = 32 * 1024
#: Producers that wait go on when this part of the capacity is free: 1/16.
_LET_IN = 16
#: A wait for memory looks at least this often whether it should be given up, in seconds.
_LOOK_S = 0.25


class Memory(Protocol):
    """What connections need of the memory; a compiled core would offer the same."""

    capacity: int

    def chunk(self) -> Block:
        """A block of the size one read takes, not counted in the capacity."""

    def exchange(self, block: Block, alive: Callable[[], bool]) -> Block:
        """Another chunk for one that holds messages and counts in the capacity from now on. Waits for room."""

    def slab(self, size: int, alive: Callable[[], bool]) -> Block:
        """A block of at least `size` bytes. Waits for room."""

    def grow(self, block: Block, size: int, alive: Callable[[], bool]) -> None:
        """Make a slab larger, its bytes kept: its message has more parts. Waits for room."""

    def received(self, block: Block) -> None:
        """A slab's message is whole."""

    def copy(self, data: memoryview, alive: Callable[[], bool]) -> Block:
        """A block with a copy of `data`. Waits for room."""

    def wake(self) -> None:
        """Let everybody who waits look whether it should be given up."""


class Owner(Protocol):
    """Where a block's memory comes from."""

    def give_back(self, block: Block) -> None:
        """The block is not used any more."""


class Block:
    """A piece of memory with messages in it, given back when the last batch in it has been dropped.

    Attributes:
        view: the memory, writable unless it is a copy.
        charged: bytes of the capacity it takes.
        receiving: it is a slab whose message is not whole yet.
    """

    __slots__ = ("_lock", "_owner", "_users", "_view", "charged", "receiving", "slab")

    def __init__(self, owner: Owner, memory: _Slab | memoryview, charged: int) -> None:
        self._owner = owner
        self._users = 1
        self._lock = threading.Lock()
        self.slab = memory
        self._view = memory.view if isinstance(memory, _Slab) else memory
        self.charged = charged
        self.receiving = False

    @property
    def view(self) -> memoryview:
        """See the class."""
        return self._view

    def resize(self, size: int) -> None:
        """Give the block another size; nobody may hold a slice of its view. Only :meth:`Pool.grow` calls this."""
        assert isinstance(self.slab, _Slab)
        self.slab = self.slab.resized(size)
        self._view = self.slab.view
        self.charged = size

    def share(self) -> None:
        """One more user."""
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        """One user less; the last one gives the memory back."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._owner.give_back(self)


class Pool:
    """See the module.

    Args:
        capacity: bytes that messages may take.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.chunk_size = min(CHUNK, max(4096, capacity // 4))
        self._changed = threading.Condition()
        self._used = 0
        self._receiving = 0
        self._kept: dict[int, list[_Slab]] = {}
        self._kept_bytes = 0
        self._line: deque[_Ticket] = deque()
        self._growing = 0
        self._beyond: Block | None = None

    @property
    def used(self) -> int:
        """Bytes taken by messages now."""
        return self._used

    @property
    def mapped(self) -> int:
        """Bytes taken by messages or kept for the next ones."""
        return self._used + self._kept_bytes

    @property
    def waiting(self) -> int:
        """How many producers wait for room now."""
        return len(self._line) + self._growing

    def chunk(self) -> Block:
        """See :class:`Memory`."""
        with self._changed:
            slab = self._take_kept(self.chunk_size)
        return Block(self, slab or _Slab.fresh(self.chunk_size), 0)

    def exchange(self, block: Block, alive: Callable[[], bool]) -> Block:
        """See :class:`Memory`.

        Raises:
            InterruptedWaitError: `alive` said no; nothing has changed.
            OSError: the system has no memory; nothing has changed.
        """
        with self._changed:
            self._reserve(self.chunk_size, alive)
            # Before room is made: in a full buffer the one slab that is kept would be unmapped, and mapped again.
            slab = self._take_kept(self.chunk_size)
            self._evict()
        slab = slab or self._fresh(self.chunk_size)
        block.charged = self.chunk_size
        return Block(self, slab, 0)

    def copy(self, data: memoryview, alive: Callable[[], bool]) -> Block:
        """See :class:`Memory`.

        Raises:
            InterruptedWaitError: `alive` said no.
        """
        size = len(data)
        if _COPY_SMALL < size <= self.capacity:
            # Freed pieces of this size stay in the heap, between others, beside the slabs that took their room.
            charged = self._charge(size)
            with self._changed:
                self._reserve(charged, alive)
                slab = self._take_kept(charged)
                self._evict()
            block = Block(self, slab or self._fresh(charged), charged)
            block.view[:size] = data
            return block
        charged = min(size + BATCH_OVERHEAD, self.capacity)
        with self._changed:
            self._reserve(charged, alive)
            self._evict()
        try:
            return Block(self, memoryview(bytes(data)), charged)
        except MemoryError:
            self._unreserve(charged)
            raise

    def slab(self, size: int, alive: Callable[[], bool]) -> Block:
        """See :class:`Memory`.

        Raises:
            OversizeError: `size` is larger than the capacity.
            InterruptedWaitError: `alive` said no.
            OSError: the system has no memory; nothing has changed.
        """
        charged = self._charge(size)
        with self._changed:
            self._reserve(charged, alive)
            slab = self._take_kept(charged)
            self._evict()
            self._receiving += charged
        block = Block(self, slab or self._fresh(charged, receiving=charged), charged)
        block.receiving = True
        return block

    def grow(self, block: Block, size: int, alive: Callable[[], bool]) -> None:
        """See :class:`Memory`.

        Raises:
            OversizeError: `size` is larger than the capacity.
            InterruptedWaitError: `alive` said no.
            OSError: the system has no memory; the block is as it was, but for its view.
        """
        charged = self._charge(size)
        with self._changed:
            extra = charged - block.charged
            self._growing += 1
            try:
                while self._used + extra > self.capacity:
                    # Several messages that grow can fill the memory with none of them whole, and wait for each other
                    # for ever. When nothing else is left that could make room, one of them may go beyond the capacity.
                    if self._used == self._receiving and self._beyond in (None, block):
                        self._beyond = block
                        break
                    if not alive():
                        raise InterruptedWaitError("stopped while waiting for room in the buffer")
                    self._changed.wait(_LOOK_S)
            finally:
                self._growing -= 1
                self._changed.notify_all()
            self._used += extra
            self._receiving += extra
            self._evict()
            try:
                block.resize(charged)
            except BaseException:
                self._unreserve(extra, receiving=extra)
                raise

    def received(self, block: Block) -> None:
        """See :class:`Memory`."""
        with self._changed:
            self._no_longer_receiving(block)

    def give_back(self, block: Block) -> None:
        """Take a block's memory back; only :meth:`Block.drop` calls this."""
        with self._changed:
            self._no_longer_receiving(block)
            self._used -= block.charged
            slab = block.slab
            if isinstance(slab, _Slab) and self.mapped + slab.size <= self.capacity:
                self._kept.setdefault(slab.size, []).append(slab)
                self._kept_bytes += slab.size
            elif isinstance(slab, _Slab):
                slab.unmap()
            if self._growing or (self._line and not self._short_of(self._line[0].size)):
                self._changed.notify_all()

    def wake(self) -> None:
        """Let everybody who waits look whether it should be given up."""
        with self._changed:
            self._changed.notify_all()

    def _charge(self, size: int) -> int:
        if size > self.capacity:
            raise OversizeError(f"a message of {size} bytes can never fit into a buffer of {self.capacity} bytes")
        return min(_size_class(size), self.capacity)

    def _reserve(self, size: int, alive: Callable[[], bool]) -> None:
        """Wait for room and take it; the caller holds the lock."""
        if self._line or self._growing or self._used + size > self.capacity:
            # First come, first served: otherwise small messages would keep a large one out for ever.
            ticket = _Ticket(size)
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or self._growing or self._short_of(size):
                    if not alive():
                        raise InterruptedWaitError("stopped while waiting for room in the buffer")
                    self._changed.wait(_LOOK_S)
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()
        self._used += size

    def _fresh(self, size: int, *, receiving: int = 0) -> _Slab:
        """New memory for which room is reserved already; gives the room back when the system has none."""
        try:
            return _Slab.fresh(size)
        except BaseException:
            self._unreserve(size, receiving=receiving)
            raise

    def _unreserve(self, size: int, *, receiving: int = 0) -> None:
        with self._changed:
            self._used -= size
            self._receiving -= receiving
            self._changed.notify_all()

    def _short_of(self, size: int) -> bool:
        """Whether somebody who waits for `size` bytes must go on waiting.

        A full buffer would let a producer in for one read at each message that leaves: two threads that wake each other
        for every message. Who had to wait is let in when a part of the memory is free, if consumers can make it so.
        """
        wanted = max(size, self.capacity // _LET_IN) if self._used > self._receiving else size
        return self._used + wanted > self.capacity

    def _take_kept(self, size: int) -> _Slab | None:
        kept = self._kept.get(size)
        if not kept:
            return None
        self._kept_bytes -= size
        return kept.pop()

    def _evict(self) -> None:
        """Give kept slabs back to the system until the capacity holds, from the size with most bytes kept."""
        while self._kept_bytes and self.mapped > self.capacity:
            size = max(self._kept, key=lambda each: each * len(self._kept[each]))
            self._kept_bytes -= size
            self._kept[size].pop(0).unmap()

    def _no_longer_receiving(self, block: Block) -> None:
        if block.receiving:
            block.receiving = False
            self._receiving -= block.charged
            if self._beyond is block:
                self._beyond = None


class _Ticket:
    """A place in the line of those who wait for memory, and how much they wait for."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class _Slab:
    """Anonymous mapped memory."""

    __slots__ = ("mapping", "size", "view")

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping = mapping
        self.size = len(mapping)
        self.view = memoryview(mapping)

    @classmethod
    def fresh(cls, size: int) -> _Slab:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(mapping)

    def resized(self, size: int) -> _Slab:
        """The same memory with another size, moved by the kernel without a copy; this object is dead afterwards."""
        self.view.release()
        try:
            self.mapping.resize(size)
        except BaseException:
            self.view = memoryview(self.mapping)  # it is as it was, and is kept for others when its block is dropped
            raise
        return _Slab(self.mapping)

    def unmap(self) -> None:
        self.view.release()
        self.mapping.close()


def _size_class(size: int) -> int:
    """`size` rounded up by at most an eighth, so that messages that differ a little use the same slabs."""
    granule = max(65536, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // granule) * granule
