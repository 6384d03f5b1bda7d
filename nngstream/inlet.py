"""A producer's connection: bytes in, batches out to the queue.

One thread owns an inlet and everything in it. Small messages are taken by the read (1 MiB), all whole ones of a
read as one batch; a message larger than half a read gets a slab of its own and is received straight into it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

from nngstream.batch import Batch
from nngstream.errors import OversizeError, WireError
from nngstream.fifo import Fifo
from nngstream.memory import Block, Memory
from nngstream.peers import Peer
from nngstream.route import Route
from nngstream.stream import Stream
from nngstream.wire import Scan, zmtp

#: After a large message: read this much first, to learn the next one's size without taking its bytes the slow way.
_PEEK = 9


class Inlet:
    """See the module.

    Args:
        stream: after the handshake.
        peer: counts.
        memory: where messages lie.
        fifo: where they go.
        route: to which group of consumers.
        alive: says no when the buffer wants the connection to end.
    """

    def __init__(
        self,
        stream: Stream,
        peer: Peer,
        memory: Memory,
        fifo: Fifo,
        alive: Callable[[], bool],
        *,
        route: Route | None = None,
    ) -> None:
        self._stream = stream
        self._peer = peer
        self._memory = memory
        self._fifo = fifo
        self._buffer_alive = alive
        self._heartbeats = False
        self._route = route
        self._format = peer.greeted.format
        self._scanner = self._format.scanner()
        self._ends: array[int] = array("Q")
        self._payload = 0
        #: Since when (monotonic) it waits for the rest of a message; None while it does not.
        self.silent_since: float | None = None

    def run(self) -> None:
        """Receive until the producer closes.

        Raises:
            WireError: it broke its protocol, or sent a message that cannot fit.
            InterruptedWaitError: the buffer ends.
            OSError: the connection broke.
        """
        chunk = self._memory.chunk()
        try:
            self._receive(chunk)
        finally:
            self._chunk.drop()

    def _receive(self, chunk: Block) -> None:
        self._chunk = chunk
        end = 0  # bytes in the chunk; a message begins at its first one
        position = 0  # whole frames of that message end here
        peek = False
        while True:
            view = self._chunk.view
            count = self._wait_for(view[end : end + _PEEK] if peek else view[end:], inside=end > 0)
            if count == 0:
                self._peer.incomplete_bytes += end
                return
            end, scan = self._scan(view, position, end + count)
            stop = self._ends[-1] if self._ends else 0
            if stop:
                position, end = self._put(view, stop, scan.position, end)
            else:
                position = scan.position
            peek = False
            if position + scan.need > len(self._chunk.view) // 2:
                self._receive_large(position, end, scan.need)
                position = end = 0
                peek = True

    def _scan(self, view: memoryview, position: int, end: int) -> tuple[int, Scan]:
        """Find messages, and take command frames out of the memory on the way; returns the new end."""
        self._payload = 0
        while True:
            scan = self._scanner.scan(view, position, end, self._ends)
            self._payload += scan.payload
            if scan.command is None:
                return end, scan
            after = scan.position + scan.command_size
            view[scan.position : end - scan.command_size] = view[after:end]
            end -= scan.command_size
            position = scan.position
            self._command(scan.command)

    def _command(self, body: bytes) -> None:
        name, data = zmtp.read_command(body)
        if name == "PING":
            self._heartbeats = True
            # Nothing that goes wrong with the answer may end the connection: there may be messages to read still.
            self._stream.send_now(zmtp.pong(data))
        elif name == "ERROR":
            raise WireError(f"sent ERROR: {data[1:].decode('ascii', 'replace')}")

    def _alive(self) -> bool:
        """Asked while we wait for room, some times a second."""
        if self._heartbeats:
            # We do not read its PINGs now. To libzmq a buffer that is full would look dead: it would close the
            # connection and lose what is queued in it.
            self._stream.send_now(zmtp.command("PONG"))
        return self._buffer_alive()

    def _put(self, view: memoryview, stop: int, position: int, end: int) -> tuple[int, int]:
        """Queue the whole messages before `stop`; the rest moves to the front of the chunk that comes after."""
        ends, self._ends = self._ends, array("Q")
        rest = end - stop
        if stop >= len(view) // 2:
            block = self._chunk
            self._chunk = self._memory.exchange(block, self._alive)
            self._chunk.view[:rest] = view[stop:end]
        else:
            # A quiet producer's few bytes must not hold a whole chunk.
            block = self._memory.copy(view[:stop], self._alive)
            view[:rest] = view[stop:end]
        self._queue(block, ends)
        return position - stop, rest

    def _receive_large(self, position: int, end: int, need: int) -> None:
        """Receive the message whose first `end` bytes lie in the chunk into a slab; `position` as in `_receive`."""
        block = self._slab(position + need)
        try:
            block.view[:end] = self._chunk.view[:end]
            while True:
                target = position + need
                if target > len(block.view):
                    self._grow(block, target)
                end = self._fill(block.view, end, target)
                end, scan = self._scan(block.view, position, end)
                if self._ends:
                    break
                position, need = scan.position, scan.need
        except BaseException:
            block.drop()
            raise
        self._memory.received(block)
        ends, self._ends = self._ends, array("Q")
        self._queue(block, ends)

    def _fill(self, view: memoryview, end: int, target: int) -> int:
        while end < target:
            count = self._wait_for(view[end:target], inside=True)
            if count == 0:
                self._peer.incomplete_bytes += end
                raise EndedInsideMessageError(f"closed after {end} bytes of a message")
            end += count
        return end

    def _wait_for(self, view: memoryview, *, inside: bool) -> int:
        self.silent_since = time.monotonic() if inside else None
        count = self._stream.receive_into(view)
        self.silent_since = None
        return count

    def _slab(self, size: int) -> Block:
        try:
            return self._memory.slab(size, self._alive)
        except OversizeError as error:
            self._refuse(error)
            raise

    def _grow(self, block: Block, size: int) -> None:
        try:
            self._memory.grow(block, size, self._alive)
        except OversizeError as error:
            self._refuse(error)
            raise

    def _refuse(self, error: OversizeError) -> None:
        if self._peer.greeted.protocol == "zmq":
            self._stream.send_now(zmtp.error(str(error)))

    def _queue(self, block: Block, ends: array[int]) -> None:
        batch = Batch(block, self._format, 0, ends, self._payload, since=time.monotonic())
        self._peer.messages += len(batch)
        self._peer.bytes += batch.nbytes
        for run in [batch] if self._route is None else batch.divide(self._route, self._fifo.groups):
            self._fifo.put(run)


class EndedInsideMessageError(WireError):
    """A producer closed in the middle of a message."""
