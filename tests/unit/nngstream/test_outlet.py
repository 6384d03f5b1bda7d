"""A consumer's connection that breaks at any byte: what arrived, what is lost, what somebody else gets."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nngstream.batch import Batch
from nngstream.fifo import Fifo, Seat
from nngstream.memory import Pool
from nngstream.outlet import Outlet, translate
from nngstream.wire import Format, sp, zmtp

FORMATS = [sp.SP, sp.SP_IPC, zmtp.ZMTP]


class BreakingStream:
    """Takes `room` bytes, in pieces of at most `step`, then breaks, with `uncertain` bytes begun and `beyond` arrived.

    `left` bytes of what it took lie in our kernel.
    """

    def __init__(
        self, room: int, step: int, uncertain: int = 0, beyond: int = 0, error: type[BaseException] = ConnectionError
    ) -> None:
        self.data = b""
        self.room = room
        self.step = step
        self.uncertain = uncertain
        self.beyond = beyond
        self.error = error
        self.left = 0

    def send(self, pieces: list[bytes | memoryview]) -> int:
        data = b"".join(pieces)[: min(self.step, self.room - len(self.data))]
        if not data:
            raise self.error("gone")
        self.data += data
        return len(data)

    def acknowledged(self, written: int) -> int:
        return written - self.left + self.beyond


def encode(wire: Format, messages: list[list[bytes]]) -> tuple[bytes, array[int]]:
    data = b""
    ends: array[int] = array("Q")
    for parts in messages:
        for number, part in enumerate(parts, 1):
            data += wire.header(len(part), number < len(parts)) + part
        ends.append(len(data))
    return data, ends


def give(fifo: Fifo, pool: Pool, wire: Format, messages: list[list[bytes]]) -> None:
    data, ends = encode(wire, messages)
    block = pool.copy(memoryview(data), lambda: True)
    nbytes = sum(len(part) for message in messages for part in message)
    fifo.put(Batch(block, wire, 0, ends, nbytes, since=0.0))


def outlet(fifo: Fifo, stream: BreakingStream, wire: Format) -> tuple[Outlet, SimpleNamespace]:
    greeted = SimpleNamespace(format=wire, protocol="zmq" if wire is zmtp.ZMTP else "nng", buffer=None)
    peer = SimpleNamespace(greeted=greeted, messages=0, bytes=0, lost_messages=0, lost_bytes=0)
    made = Outlet(stream, peer, fifo, Seat(), sentinel=0, ending=lambda: False, kernel_bytes=1 << 20)  # type: ignore[arg-type]
    return made, peer


@pytest.mark.parametrize("source", FORMATS, ids=lambda wire: f"from {wire.name}")
@pytest.mark.parametrize("target", FORMATS, ids=lambda wire: f"to {wire.name}")
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    room=st.integers(0, 3000),
    step=st.integers(1, 700),
    uncertain=st.sampled_from([(0, 0), (0, 0), (100, 0), (600, 400), (900, 900)]),
)
def test_a_connection_that_breaks_at_any_byte_gives_nothing_twice(source, target, sizes, room, step, uncertain):
    uncertain, beyond = uncertain
    pool, fifo = Pool(1 << 20), Fifo()
    messages = [[bytes([number]) * size] for number, size in enumerate(sizes)]
    give(fifo, pool, source, messages)
    data, ends = encode(target, messages)
    stream = BreakingStream(min(room, len(data)), step, uncertain, beyond)
    made, peer = outlet(fifo, stream, target)
    whole = [end for end in ends if end <= stream.room + beyond]
    assume(len(whole) < len(ends))
    with pytest.raises(ConnectionError):
        made.run(lambda: None)
    assert stream.data == data[: stream.room]
    starts = [0, *ends[:-1]]
    begun = sum(start < stream.room + uncertain for start in starts)
    lost = max(0, begun - len(whole))
    ledger = fifo.ledger()
    assert (ledger.sent.messages, ledger.lost.messages) == (len(whole), lost)
    assert ledger.held.messages == len(sizes) - len(whole) - lost
    assert ledger.sent.bytes == peer.bytes == sum(sizes[: len(whole)])
    assert ledger.lost.bytes == peer.lost_bytes == sum(sizes[len(whole) : len(whole) + lost])
    if ledger.held.messages:
        rest = BreakingStream(1 << 20, 1 << 20)
        other = Seat()
        taken = fifo.take(other)
        view = taken.block.view
        rest.data = b"".join(
            b"".join(translate(target, view, source.parts(view, start, stop)))
            for start, stop in zip(taken.starts(), taken.ends, strict=True)
        )
        assert rest.data == data[starts[len(whole) + lost] :]
        fifo.done(taken, len(taken), 0)
    assert pool.used == 0


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12), left=st.integers(0, 4000), batches=st.integers(1, 4)
)
def test_messages_that_had_not_left_our_socket_are_lost(sizes, left, batches):
    pool, fifo = Pool(1 << 20), Fifo()
    for _ in range(batches):
        give(fifo, pool, sp.SP, [[bytes(size)] for size in sizes])
    total = batches * sum(8 + size for size in sizes)
    stream = BreakingStream(total, 1 << 20)
    stream.left = min(left, total)
    made, peer = outlet(fifo, stream, sp.SP)
    give(fifo, pool, sp.SP, [[b"too much"]])
    with pytest.raises(ConnectionError):
        made.run(lambda: None)
    end = 0
    lost = [(end := end + 8 + size, size) for size in sizes * batches]
    lost = [size for stop, size in lost if stop > total - stream.left]
    ledger = fifo.ledger()
    assert ledger.lost == (len(lost), sum(lost))
    assert ledger.sent.messages == batches * len(sizes) - len(lost) == peer.messages
    assert ledger.held.messages == 1


def test_a_defect_while_sending_does_not_leave_messages_with_nobody():
    pool, fifo = Pool(1 << 20), Fifo()
    give(fifo, pool, sp.SP, [[b"one"], [b"two"]])
    made, _ = outlet(fifo, BreakingStream(0, 1, error=MemoryError), sp.SP)
    with pytest.raises(MemoryError):
        made.run(lambda: None)
    assert fifo.empty
    assert fifo.ledger().lost.messages == 2
