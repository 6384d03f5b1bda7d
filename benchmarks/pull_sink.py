"""The sink of the engine's benchmark: a ZeroMQ PULL peer on plain sockets, so cheap that it does not set the rate.

ZeroMQ's own PULL socket gives every message fresh memory, and the page faults of that take as much of a processor as
the engine does; on a machine of two cores it, not the engine, would set the rate. This sink has one buffer a
connection, used again for every message, and is woken for pieces of 256 KiB.

Every message is checked: it begins as an HDF5 file, the end the file states is the end of the message, and the first
and the last event in it begin with values of one of the frames that were sent. Where the events lie is asked of h5py
for the first message of each length; compressed messages have another place for them every time, so h5py opens each.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_SAMPLE = 64
_ROOM = 64 << 20
#: Being woken for less costs both sides more than copying it.
_WAKE = 256 << 10


@dataclass
class Places:
    """Where in messages of one length the events are.

    Attributes:
        events: how many.
        samples: places of the first bytes of the first and the last event; empty where they must be read with h5py.
    """

    events: int
    samples: tuple[int, ...]


@dataclass
class Tally:
    """What has arrived; shared by the threads of all connections."""

    warm: int
    events: int = 0
    messages: int = 0
    wrong: int = 0
    first_events: int = 0
    first: float = 0.0
    last: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, events: int, now: float) -> None:
        """A message of so many events has arrived; the first `warm` are not part of the rate."""
        with self.lock:
            self.events += events
            self.messages += 1
            self.last = now
            if self.messages <= self.warm:
                self.first, self.first_events = now, self.events


class Checker:
    """Looks into the messages of one connection."""

    def __init__(self, frames: str, tally: Tally) -> None:
        self._known = {bytes(one.reshape(-1).view(np.uint8)[:_SAMPLE]) for one in np.load(frames, mmap_mode="r")}
        self._length = len(next(iter(self._known)))
        self._tally = tally
        self._places: dict[int, Places] = {}

    def __call__(self, message: memoryview, now: float) -> None:
        """Count a message and its events."""
        size = message.nbytes
        places = self._places.get(size)
        try:
            if bytes(message[:8]) != b"\x89HDF\r\n\x1a\n" or struct.unpack_from("<Q", message, 40) != (size,):
                raise OSError("no whole HDF5 file")
            if places is None or not places.samples:
                places = self._places[size] = self._look(message)
            right = all(bytes(message[at : at + self._length]) in self._known for at in places.samples)
        except (OSError, KeyError):
            places, right = Places(0, ()), False
        if not right:
            self._tally.wrong += 1
        self._tally.add(places.events, now)

    def _look(self, message: memoryview) -> Places:
        """Find the events with HDF5, which reads the first one as well."""
        import h5py
        import hdf5plugin  # noqa: F401 - registers the codecs

        with h5py.File(io.BufferedReader(_Reader(message), 1 << 16)) as file:
            data = file["data/frames"]
            row = np.ascontiguousarray(data[0]).reshape(-1).view(np.uint8)[:_SAMPLE]
            if bytes(row) not in self._known:
                raise OSError("an event that was never sent")
            last = data.shape[0] - 1
            if data.chunks is None:
                start, step = data.id.get_offset(), data[0].nbytes
                return Places(last + 1, (start, start + last * step))
            if data.id.get_create_plist().get_nfilters():
                return Places(last + 1, ())
            chunks = {one.chunk_offset[0]: one.byte_offset for one in map(data.id.get_chunk_info, (0, last))}
            return Places(last + 1, tuple(chunks[row] for row in {0, last}))


class _Reader(io.RawIOBase):
    """A file over a buffer that is not copied."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._place = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._content.nbytes)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        count = min(view.nbytes, self._content.nbytes - self._place)
        view[:count] = self._content[self._place : self._place + count]
        self._place += count
        return count


class _Buffer:
    """Memory for one message, kept, with large pages where there are some."""

    def __init__(self) -> None:
        self._view = memoryview(b"")

    def of(self, size: int) -> memoryview:
        if size > self._view.nbytes:
            memory = mmap.mmap(-1, max(_ROOM, size + size // 4))
            memory.madvise(mmap.MADV_HUGEPAGE)
            self._view = memoryview(memory)
        return self._view[:size]


def _exactly(peer: socket.socket, into: memoryview) -> bool:
    """Fill a buffer; false when the peer has closed before its first byte."""
    done = 0
    while done < into.nbytes:
        left = into.nbytes - done
        # The kernel never wakes for less than this, so the rest of a message must be waited for with less.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE if left >= _WAKE else 1)
        count = peer.recv_into(into[done : done + (left - left % _WAKE or left)])
        if not count:
            if done:
                raise ConnectionError("the peer left within a message")
            return False
        done += count
    return True


def _greet(peer: socket.socket) -> None:
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 4) + b"PULL"
    peer.sendall(_GREETING)
    _exactly(peer, memoryview(bytearray(64)))
    peer.sendall(struct.pack(">BB", 4, len(ready)) + ready)


def _pull(peer: socket.socket, take: Callable[[memoryview, float], None]) -> None:
    """Take messages until the peer leaves. A ZMTP frame: flags (2 long, 4 command), length, content."""
    room, head, long = _Buffer(), memoryview(bytearray(2)), memoryview(bytearray(7))
    # Leaving within a message is not an error here: the original does, and the events that arrived are counted.
    with peer, contextlib.suppress(ConnectionError):
        _greet(peer)
        while _exactly(peer, head):
            size = head[1]
            if head[0] & 2:
                _exactly(peer, long)
                size = int.from_bytes(bytes(head[1:]) + bytes(long), "big")
            message = room.of(size)
            _exactly(peer, message)
            if not head[0] & 4:
                take(message, time.perf_counter())


def sink(url: str, frames: str, warm: int, pipe: Connection) -> None:
    """Pull until told to end and every peer has left; answers with the :class:`Tally` in figures.

    Args:
        url: `tcp://` or `ipc://` to listen at.
        frames: `.npy` file of the frames that are sent; empty to count messages without looking into them.
        warm: so many messages are received before the clock starts.
        pipe: "ready" goes out of it, anything comes in, and a tuple of events after the warm-up, seconds for them, all
            events, and wrong messages goes out.
    """
    tally = Tally(warm)
    scheme, _, rest = url.partition("://")
    family, name = (
        (socket.AF_UNIX, rest) if scheme == "ipc" else (socket.AF_INET, ("127.0.0.1", int(rest.split(":")[1])))
    )
    threads: list[threading.Thread] = []
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(name)
        listener.listen()
        listener.settimeout(0.1)
        pipe.send("ready")
        while not pipe.poll():
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                continue
            peer.settimeout(120)
            take = Checker(frames, tally) if frames else lambda _, now: tally.add(1, now)
            threads.append(threading.Thread(target=_pull, args=(peer, take), daemon=True))
            threads[-1].start()
    for thread in threads:
        thread.join(30)
    pipe.send((tally.events - tally.first_events, tally.last - tally.first, tally.events, tally.wrong))
