"""The spill without a buffer around it: what it does when the system refuses, and what a later one finds."""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nngstream.batch import Batch
from nngstream.fifo import Fifo, Seat
from nngstream.memory import Pool
from nngstream.spill import Spill
from nngstream.wire import sp


class Store:
    """A queue, its memory, and its spill, whose thread runs when :meth:`Spill.start` is called."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.fifo = Fifo()
        self.pool = Pool(64 << 20)
        self.spill = Spill(folder, limit, self.fifo, self.pool)
        self.recovered = self.spill.recover()
        self.seat = Seat()
        self.fifo.join(self.seat)

    def put(self, *messages: bytes) -> None:
        data = b"".join(sp.SP.header(len(message), False) + message for message in messages)
        ends: array[int] = array("Q")
        for message in messages:
            ends.append((ends[-1] if ends else 0) + len(sp.SP.header(len(message), False)) + len(message))
        block = self.pool.copy(memoryview(data), lambda: True)
        self.fifo.put(Batch(block, sp.SP, 0, ends, sum(map(len, messages)), since=0.0))

    def take(self) -> tuple[Batch, list[bytes]]:
        batch = self.fifo.take(self.seat)
        assert batch is not None
        view = batch.block.view
        return batch, [
            bytes(view[first:last])
            for start, stop in zip(batch.starts(), batch.ends, strict=True)
            for first, last in sp.SP.parts(view, start, stop)
        ]

    def give(self) -> list[bytes]:
        """Give the next batch away."""
        batch, messages = self.take()
        self.fifo.done(batch, len(messages), 0)
        return messages

    def end(self) -> None:
        self.spill.stop()
        self.spill.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Open the folder again, as a buffer that is started after the one before has ended."""
    opened: list[Store] = []

    def again(**options: int) -> Store:
        if opened:
            opened[-1].end()
        opened.append(Store(tmp_path / "s", **options))
        return opened[-1]

    yield again
    opened[-1].end()


def refusing(number: int, times: int = 1 << 30, after: int = 0) -> Callable[..., object]:
    """A system call that fails some times, after some that were in order."""
    left = [after, times]

    def call(real: Callable[..., object], *args: object, **options: object) -> object:
        if left[0] > 0:
            left[0] -= 1
        elif left[1] > 0:
            left[1] -= 1
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    return call


def refuse(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: Callable[..., object]) -> None:
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: call(real, *args, **options))


def test_messages_on_disk_are_given_away_when_no_more_can_be_mapped(store, monkeypatch):
    one = store()
    for number in range(3):
        one.put(b"%d" % number)
    assert one.spill.keep_everything()
    refuse(monkeypatch, mmap, "mmap", refusing(errno.EMFILE))
    assert one.give() == [b"0", b"1", b"2"]
    assert store().recovered == 0


@pytest.mark.parametrize(("name", "after"), [("pwrite", 0), ("pwrite", 1), ("ftruncate", 0)])
def test_a_record_that_could_not_be_written_is_not_on_disk_and_can_be_written_later(store, monkeypatch, name, after):
    one = store()
    one.put(b"a", b"b")
    assert one.spill.keep_everything()
    one.put(b"c", b"d")
    with monkeypatch.context() as patch:
        refuse(patch, os, name, refusing(errno.EIO, times=1, after=after))
        assert not one.spill.keep_everything()
    two = store()
    assert two.recovered == 2
    two.put(b"c", b"d")
    with monkeypatch.context() as patch:
        refuse(patch, os, name, refusing(errno.EIO, times=1, after=after))
        assert not two.spill.keep_everything()
    assert two.spill.keep_everything()
    three = store()
    assert three.recovered == 4
    assert three.give() + three.give() == [b"a", b"b", b"c", b"d"]


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_the_spill_goes_on_after_a_failure(store, monkeypatch, wait_until, error):
    monkeypatch.setattr("nngstream.spill._AFTER_FAILURE_S", 0.01)
    one = store()
    one.fifo.leave(one.seat)
    monkeypatch.setattr("nngstream.spill.ALONE_S", 0)
    left = [error, error]
    real = Path.open

    def open_(path: Path, *args: object, **options: object) -> object:
        if left:
            raise left.pop()
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_)
    one.put(b"a")
    one.spill.start()
    wait_until(lambda: one.pool.used == 0, 60, "empty memory")
    assert store().recovered == 1


def test_what_was_given_of_a_record_does_not_come_again_after_an_orderly_stop(store):
    one = store()
    one.put(*[b"%d" % number for number in range(10)])
    one.put(b"last")
    assert one.spill.keep_everything()
    batch, _ = one.take()
    one.fifo.done(batch, 4, 1)
    assert one.spill.keep_everything()
    two = store()
    assert two.recovered == 6
    assert two.give() == [b"5", b"6", b"7", b"8", b"9", b"last"]
    assert two.fifo.empty


def test_parts_of_a_record_that_several_consumers_left_come_again_and_no_others(store):
    one = store()
    messages = [b"%02d" % number for number in range(12)]
    one.put(*messages)
    assert one.spill.keep_everything()
    second = Seat()
    one.fifo.join(second)
    third = Seat()
    one.fifo.join(third)
    taken = [one.fifo.take(seat) for seat in (one.seat, second, third)]
    assert [len(batch) for batch in taken] == [4, 4, 4]
    one.fifo.done(taken[2], 2, 0)
    one.fifo.done(taken[1], 4, 0)
    one.fifo.done(taken[0], 0, 1)
    assert one.spill.keep_everything()
    two = store()
    assert two.recovered == two.fifo.ledger().held.messages == 5
    assert two.fifo.ledger().held.bytes == 10
    batch, given = two.take()
    assert given == messages[1:4]
    two.fifo.done(batch, 1, 0)
    assert two.spill.keep_everything()
    three = store()
    rest = []
    while not three.fifo.empty:
        rest += three.give()
    assert rest == [*messages[2:4], *messages[10:]]
    assert store().recovered == 0


def test_what_is_left_of_a_record_is_kept_although_the_limit_is_reached(store):
    one = store(limit=3000)
    one.put(*[bytes(100)] * 20)
    assert one.spill.keep_everything()
    batch, _ = one.take()
    one.fifo.done(batch, 15, 0)
    one.put(bytes(5000))
    assert not one.spill.keep_everything()
    assert store().recovered == 5


def test_a_small_limit_has_room_again_when_what_was_there_is_given_away(store):
    one = store(limit=1_000_000)
    for number in range(3):
        one.put(b"%d" % number + bytes(600_000))
        assert one.spill.keep_everything()
        assert one.give()[0][:1] == b"%d" % number
    for _ in range(12):  # one record of all would not fit
        one.put(bytes(100_000))
    assert not one.spill.keep_everything()
    assert 0 < one.spill.disk_bytes <= 1_000_500
    assert one.pool.used < 700_000
