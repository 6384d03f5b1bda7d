"""Memory that messages are made in and sent from, used again and again.

Fresh large buffers cost more than copying: every page of them is a fault and is cleared by the kernel. A slot is
filled by the main thread, goes out with a message, and comes back when the last data handler has released the message.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Callable

_POLL_S = 0.05
_HUGE_PAGES_FROM = 4 << 20


class Slot:
    """A piece of memory of at least the size that was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, max(size, 1))
        if size >= _HUGE_PAGES_FROM:
            with contextlib.suppress(OSError, AttributeError, ValueError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(self._map)
        #: Whose image is in the memory; the same layout need not be written again.
        self.content: object = None


class SlotRing:
    """At most `count` slots.

    Args:
        count: how many.
        stop: set when the run is told to stop: then one more slot is made rather than waiting for a sink.
    """

    def __init__(self, count: int, stop: threading.Event | None = None) -> None:
        self._count = count
        self._stop = stop or threading.Event()
        self._free: list[Slot] = []
        self._made = 0
        self._changed = threading.Condition()
        #: Seconds spent waiting for a slot to come back.
        self.waited_s = 0.0

    def take(self, size: int, content: object) -> Slot:
        """A slot of this size or more, one that has this content if there is one; waits until one is free."""
        with self._changed:
            if not self._free and self._made >= self._count:
                before = time.monotonic()
                while not self._free and not self._stop.is_set():
                    self._changed.wait(_POLL_S)
                    # Counted while it waits: whoever looks at a run that hangs must see what it waits for.
                    now = time.monotonic()
                    self.waited_s, before = self.waited_s + now - before, now
            for number in range(len(self._free) - 1, -1, -1):
                if self._free[number].content is content and self._free[number].size >= size:
                    return self._free.pop(number)
            if self._free and self._made >= self._count:
                slot = self._free.pop(0)
                if slot.size >= size:
                    return slot
                # Too small: a new one in its place, so that memory stays bounded.
                self._made -= 1
            self._made += 1
        return Slot(size)

    def giver(self, slot: Slot) -> Callable[[], None]:
        """A function that gives the slot back, from any thread."""

        def give_back() -> None:
            with self._changed:
                if self._made > self._count:
                    self._made -= 1
                else:
                    self._free.append(slot)
                self._changed.notify_all()

        return give_back
