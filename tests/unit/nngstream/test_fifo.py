"""The queue: order, turns, shares, and an account that closes."""

from __future__ import annotations

import random
import threading
from array import array

import pytest

from nngstream.batch import Batch
from nngstream.fifo import Amount, Fifo, Seat
from nngstream.memory import Pool
from nngstream.wire import sp

POOL = Pool(64 << 20)


def batch(*messages: bytes, since: float = 0.0, group: int = 0) -> Batch:
    data = b"".join(sp.SP.header(len(message)) + message for message in messages)
    block = POOL.copy(memoryview(data), lambda: True)
    ends: array[int] = array("Q")
    scan = sp.SP.scan(block.view, 0, len(data), ends)
    return Batch(block, sp.SP, 0, ends, scan.payload, since=since, group=group)


def content(taken: Batch | None) -> list[bytes]:
    assert taken is not None
    return [
        bytes(taken.block.view[a:b])
        for start, stop in zip(taken.starts(), taken.ends, strict=True)
        for a, b in taken.format.parts(taken.block.view, start, stop)
    ]


@pytest.fixture
def seats() -> tuple[Fifo, list[Seat]]:
    fifo = Fifo(clock=lambda: 100.0)
    made = [Seat() for _ in range(3)]
    for seat in made:
        fifo.join(seat)
    return fifo, made


def test_messages_come_out_in_the_order_they_went_in(seats):
    fifo, (seat, *others) = seats
    for other in others:
        fifo.leave(other)
    for number in range(5):
        fifo.put(batch(b"%d" % number))
    taken = []
    for _ in range(5):
        one = fifo.take(seat)
        taken += content(one)
        fifo.done(one, 1, 0)
    assert taken == [b"0", b"1", b"2", b"3", b"4"]
    assert fifo.empty


def test_a_burst_is_shared_while_the_queue_is_short_and_not_split_when_it_is_long(seats):
    fifo, made = seats
    fifo.put(batch(*[b"%d" % number for number in range(9)]))
    shares = [fifo.take(seat) for seat in made]
    assert [len(share) for share in shares] == [3, 3, 3]
    for share in shares:
        fifo.done(share, 3, 0)
    for _ in range(3):
        fifo.put(batch(*[b"x"] * 9))
    assert len(fifo.take(made[0])) == 9


def test_consumers_that_wait_are_served_in_turn(seats):
    fifo, made = seats
    served = []

    def consume(number: int) -> None:
        for _ in range(10):
            one = fifo.take(made[number])
            served.append(number)
            fifo.done(one, 1, 0)

    threads = [threading.Thread(target=consume, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        while sum(seat.waiting for seat in made) < min(3, 30 - number):
            pass
        fifo.put(batch(b"x"))
        while len(served) <= number:
            pass
    for thread in threads:
        thread.join(60)
    assert sorted(served[:3]) == [0, 1, 2]
    assert served == served[:3] * 10


def test_what_a_dead_consumer_had_not_begun_goes_first_to_the_next_one(seats):
    fifo, (first, second, third) = seats
    fifo.leave(second)
    fifo.leave(third)
    fifo.put(batch(b"a", b"b", b"c", b"d"))
    fifo.put(batch(b"e"))
    one = fifo.take(first)
    fifo.done(one, 1, 1)
    ledger = fifo.ledger()
    assert (ledger.sent, ledger.lost, ledger.held) == (Amount(1, 1), Amount(1, 1), Amount(3, 3))
    assert content(fifo.take(first)) == [b"c", b"d"]
    assert content(fifo.take(first)) == [b"e"]


def test_a_consumer_can_be_called_back_while_it_waits_and_before(seats):
    fifo, (seat, *_) = seats
    fifo.call(seat)
    assert fifo.take(seat) is None
    got = []
    thread = threading.Thread(target=lambda: got.append(fifo.take(seat)))
    thread.start()
    while not seat.waiting:
        pass
    fifo.call(seat)
    thread.join(60)
    assert got == [None]
    fifo.put(batch(b"x"))
    assert content(fifo.take(seat)) == [b"x"]


def test_messages_lost_in_the_socket_move_from_sent_to_lost(seats):
    fifo, (seat, *_) = seats
    fifo.put(batch(b"abc"))
    fifo.done(fifo.take(seat), 1, 0)
    fifo.lost_after_sending(1, 3)
    ledger = fifo.ledger()
    assert (ledger.received, ledger.sent, ledger.lost) == (Amount(1, 3), Amount(0, 0), Amount(1, 3))


def test_giving_up_counts_everything_as_lost_and_frees_the_memory(seats):
    fifo, _ = seats
    before = POOL.used
    for _ in range(3):
        fifo.put(batch(b"abc", b"de"))
    assert fifo.drop_all() == Amount(6, 15)
    assert POOL.used == before
    assert fifo.ledger().held == Amount(0, 0)


def test_the_age_is_that_of_the_oldest_message_also_while_it_is_being_sent(seats):
    fifo, (seat, *_) = seats
    assert fifo.ledger().oldest_age_s == 0
    fifo.put(batch(b"x", since=90.0))
    fifo.put(batch(b"y", since=95.0))
    assert fifo.ledger().oldest_age_s == 10
    one = fifo.take(seat)
    assert fifo.ledger().oldest_age_s == 10
    fifo.done(one, 1, 0)
    assert fifo.ledger().oldest_age_s == 5


def test_the_account_closes_whatever_happens():
    random_ = random.Random(7)
    fifo = Fifo()
    seats = [Seat() for _ in range(4)]
    for seat in seats:
        fifo.join(seat)
    put = 0
    used = POOL.used
    for _ in range(2000):
        if random_.random() < 0.5 or fifo.empty:
            messages = [bytes(random_.randrange(20)) for _ in range(random_.randrange(1, 9))]
            put += len(messages)
            fifo.put(batch(*messages))
        else:
            one = fifo.take(random_.choice(seats))
            sent = random_.randrange(len(one) + 1)
            lost = random_.randrange(2) if sent < len(one) else 0
            fifo.done(one, sent, lost)
        ledger = fifo.ledger()
        assert ledger.received.messages == put
        for unit in (0, 1):
            assert ledger.received[unit] == ledger.sent[unit] + ledger.held[unit] + ledger.lost[unit]
        assert ledger.held.messages == fifo.waiting_for(0)[1].messages
    fifo.drop_all()
    assert POOL.used == used


@pytest.mark.parametrize(("sent", "lost"), [(0, 1), (1, 1), (0, 2), (2, 1), (1, 2), (0, 3), (3, 0)])
def test_every_message_of_a_broken_batch_has_exactly_one_end(sent, lost):
    fifo, seat = Fifo(), Seat()
    fifo.join(seat)
    fifo.put(batch(b"a", b"bb", b"ccc"))
    fifo.done(fifo.take(seat), sent, lost)
    ledger = fifo.ledger()
    assert (ledger.sent.messages, ledger.lost.messages, ledger.held.messages) == (sent, lost, 3 - sent - lost)
    if sent + lost < 3:
        assert content(fifo.take(seat)) == [b"a", b"bb", b"ccc"][sent + lost :]
