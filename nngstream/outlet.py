"""A consumer's connection: batches from the queue, bytes out.

One thread owns an outlet. Messages that came in the format the consumer speaks go out as they lie in memory; others get
new headers, their payload is not copied. A message of which a byte was written is never given to another consumer.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator

from nngstream.batch import Batch
from nngstream.errors import WireError
from nngstream.fifo import Fifo, Seat
from nngstream.peers import Peer
from nngstream.stream import Stream
from nngstream.wire import Format, Span, zmtp

#: How long the last data may stay without any progress at the end, in seconds.
LINGER_S = 5.0
#: Headers and payloads of so many messages are handed to the kernel at once.
_MESSAGES_A_CALL = 128


class Outlet:
    """See the module.

    Args:
        stream: after the handshake.
        peer: counts.
        fifo: where messages come from.
        seat: the consumer's place there.
        sentinel: empty messages to send at the end, to a ZeroMQ consumer.
        ending: says yes when everything has been sent to everybody.
        kernel_bytes: size of the socket's send buffer.
    """

    def __init__(
        self,
        stream: Stream,
        peer: Peer,
        fifo: Fifo,
        seat: Seat,
        *,
        sentinel: int,
        ending: Callable[[], bool],
        kernel_bytes: int,
    ) -> None:
        self._stream = stream
        self._peer = peer
        self._fifo = fifo
        self._seat = seat
        self._sentinel = sentinel
        self._ending = ending
        self._format = peer.greeted.format
        self._written = 0  # bytes of this connection after the handshake
        self._error: OSError | None = None
        self._uncertain = 0
        self._settled = True
        self._recent = _Recent(kernel_bytes)
        self._inbox = bytearray()
        self._scanner = zmtp.ZmtpScanner()

    def run(self, listen: Callable[[], None]) -> str:
        """Send until the end of the stream or of the consumer.

        Args:
            listen: called whenever the connection has been read empty: watch it again.

        Returns:
            Why it ended, for people.

        Raises:
            OSError: the connection broke.
            WireError: the consumer broke its protocol.
        """
        self._fifo.join(self._seat)
        try:
            while True:
                batch = self._fifo.take(self._seat)
                if batch is not None:
                    self._give(batch)
                    continue
                if not self._read():
                    self._count_unacknowledged()
                    return "closed by the consumer"
                if self._error is not None:
                    raise self._error
                listen()
                if self._ending():
                    self._end()
                    return "end of stream"
        except (OSError, WireError):
            self._count_unacknowledged()
            raise
        finally:
            self._fifo.leave(self._seat)

    # -- sending

    def _give(self, batch: Batch) -> None:
        self._settled = False
        try:
            self._send_batch(batch)
        finally:
            if not self._settled:
                # A defect, or no memory: the buffer must not wait for ever for a batch that nobody has.
                self._fifo.done(batch, 0, len(batch))

    def _send_batch(self, batch: Batch) -> None:
        before = self._written
        if batch.format.name == self._format.name:
            ends = array("Q", [end - batch.begin for end in batch.ends]) if batch.begin else batch.ends
            self._write([batch.block.view[batch.begin : batch.stop]])
        else:
            ends = self._send_translated(batch)
        written = taken = self._written - before
        if self._error is not None:
            # An encrypted write that failed has gone out in part all the same, and the consumer has read that part.
            taken = max(written, self._stream.acknowledged(self._written) - before)
        whole = bisect_right(ends, taken)
        # At most once: what may have gone out in part, or unseen, is not given to anybody else.
        begun = bisect_left(ends, written + self._uncertain) + 1 if written + self._uncertain else 0
        self._settle(batch, ends, before, whole, max(0, min(begun, len(ends)) - whole))
        if self._error is not None:
            raise self._error

    def _send_translated(self, batch: Batch) -> array[int]:
        """Send messages with the headers of another protocol; returns where each ends in the bytes written for it."""
        view = batch.block.view
        ends: array[int] = array("Q")
        pieces: list[bytes | memoryview] = []
        size = 0
        for count, (start, stop) in enumerate(zip(batch.starts(), batch.ends, strict=True), 1):
            for piece in translate(self._format, view, batch.format.parts(view, start, stop)):
                pieces.append(piece)
                size += len(piece)
            ends.append(size)
            if count % _MESSAGES_A_CALL == 0 and self._error is None:
                self._write(pieces)
                pieces = []
        if self._error is None:
            self._write(pieces)
        return ends

    def _write(self, pieces: list[bytes | memoryview]) -> None:
        """Write everything, or note why not."""
        while pieces:
            try:
                count = self._stream.send(pieces)
            except OSError as error:
                self._error = error
                self._uncertain = self._stream.uncertain
                return
            self._written += count
            pieces = _after(pieces, count)

    def _settle(self, batch: Batch, ends: array[int], before: int, whole: int, lost: int) -> None:
        peer = self._peer
        nbytes = batch.payload(0, whole)
        peer.messages += whole
        peer.bytes += nbytes
        if whole:
            self._recent.add(before, ends[:whole], nbytes)
        if lost:
            peer.lost_messages += lost
            peer.lost_bytes += batch.payload(whole, whole + lost)
        self._settled = True
        self._fifo.done(batch, whole, lost)

    def _count_unacknowledged(self) -> None:
        """Messages of which the consumer's kernel has not taken every byte are lost with it."""
        messages, nbytes = self._recent.beyond(self._stream.acknowledged(self._written))
        if messages:
            self._peer.messages -= messages
            self._peer.bytes -= nbytes
            self._peer.lost_messages += messages
            self._peer.lost_bytes += nbytes
            self._fifo.lost_after_sending(messages, nbytes)

    def _end(self) -> None:
        if self._peer.greeted.protocol == "zmq" and self._peer.greeted.buffer is None:
            for _ in range(self._sentinel):
                self._write([zmtp.EMPTY_MESSAGE])
        if self._error is not None:
            raise self._error
        self._stream.end_sending()
        self._stream.linger(LINGER_S)
        self._count_unacknowledged()

    # -- what consumers say

    def _read(self) -> bool:
        """Read what came; False when the consumer has closed."""
        while True:
            data = self._stream.receive_now()
            if data is None:
                return True
            if not data:
                return False
            if self._peer.greeted.protocol != "zmq":
                raise WireError("a Pull0 socket sent data")
            self._inbox += data
            self._commands()

    def _commands(self) -> None:
        position = 0
        ends: array[int] = array("Q")
        with memoryview(self._inbox) as view:
            while True:
                scan = self._scanner.scan(view, position, len(view), ends)
                if ends:
                    raise WireError("a PULL socket sent a message")
                if scan.command is None:
                    break
                position = scan.position + scan.command_size
                name, data = zmtp.read_command(scan.command)
                if name == "PING":
                    self._write([zmtp.pong(data)])
                elif name == "ERROR":
                    raise WireError(f"sent ERROR: {data[1:].decode('ascii', 'replace')}")
        del self._inbox[:position]


class _Recent:
    """What was written to a consumer and may still lie in our kernel: as many bytes as its send buffer can hold."""

    def __init__(self, kernel_bytes: int) -> None:
        self._kernel_bytes = kernel_bytes
        self._entries: deque[tuple[int, array[int], int]] = deque()

    def add(self, before: int, ends: array[int], nbytes: int) -> None:
        """Whole messages with `nbytes` of payload were written after the first `before` bytes of the connection."""
        self._entries.append((before, ends, nbytes))
        newest = before + ends[-1]
        while self._entries[0][0] + self._entries[0][1][-1] < newest - self._kernel_bytes:
            self._entries.popleft()

    def beyond(self, position: int) -> tuple[int, int]:
        """Messages, and their payload bytes, that end after this position; they are forgotten."""
        messages = lost = 0
        while self._entries:
            before, ends, nbytes = self._entries[-1]
            kept = bisect_right(ends, position - before) if position > before else 0
            count = len(ends) - kept
            if not count:
                break
            self._entries.pop()
            if kept:
                # Their headers are of one size, or nearly: that is all the payload of single messages is known by.
                header = (ends[-1] - nbytes) // len(ends)
                part = min(nbytes, max(0, ends[-1] - ends[kept - 1] - count * header))
                self._entries.append((before, ends[:kept], nbytes - part))
                nbytes = part
            messages += count
            lost += nbytes
        return messages, lost


def translate(target: Format, view: memoryview, spans: list[Span]) -> Iterator[bytes | memoryview]:
    """One message in another format: headers and payload, in order.

    A format without parts gets the parts of a message joined into one.
    """
    if target.multipart:
        for number, (start, stop) in enumerate(spans, 1):
            yield target.header(stop - start, number < len(spans))
            if stop > start:
                yield view[start:stop]
    else:
        yield target.header(sum(stop - start for start, stop in spans), False)
        for start, stop in spans:
            if stop > start:
                yield view[start:stop]


def _after(pieces: list[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    """What is left of `pieces` after their first `count` bytes."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [memoryview(piece)[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []
