"""The pool: bounded, first come first served, reused, and never waiting for itself."""

from __future__ import annotations

import errno
import threading

import pytest

from nngstream.errors import InterruptedWaitError, OversizeError
from nngstream.memory import BATCH_OVERHEAD, Pool, _Slab

MB = 1 << 20


def always() -> bool:
    return True


def test_who_finds_no_room_waits_until_there_is_some(wait_until):
    pool = Pool(8 * MB)
    first = pool.slab(5 * MB, always)
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.slab(5 * MB, always)))
    thread.start()
    wait_until(lambda: pool.waiting == 1)
    assert not got
    first.drop()
    thread.join(60)
    assert len(got) == 1
    assert pool.used == got[0].charged


def test_a_large_message_is_not_overtaken_for_ever_by_small_ones(wait_until):
    pool = Pool(8 * MB)
    first = pool.slab(6 * MB, always)
    got = {}
    large = threading.Thread(target=lambda: got.update(large=pool.slab(8 * MB, always)))
    large.start()
    wait_until(lambda: pool.waiting == 1)
    small = threading.Thread(target=lambda: got.update(small=pool.slab(MB // 2, always)))
    small.start()
    wait_until(lambda: pool.waiting == 2)
    first.drop()
    large.join(60)
    assert list(got) == ["large"], "it takes all there is, and who came later goes on waiting"
    got["large"].drop()
    small.join(60)
    assert list(got) == ["large", "small"]


def test_a_wait_can_be_given_up(wait_until):
    pool = Pool(MB)
    keep = pool.slab(MB, always)
    wanted = threading.Event()
    wanted.set()
    errors = []

    def ask() -> None:
        try:
            pool.copy(memoryview(b"x"), wanted.is_set)
        except InterruptedWaitError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: pool.waiting == 1)
    wanted.clear()
    pool.wake()
    thread.join(60)
    assert len(errors) == 1
    assert pool.used == keep.charged


def test_a_message_larger_than_everything_is_refused_and_one_as_large_is_not():
    pool = Pool(1_000_000)
    with pytest.raises(OversizeError, match="1000001 bytes can never fit into a buffer of 1000000 bytes"):
        pool.slab(1_000_001, always)
    block = pool.slab(1_000_000, always)
    assert len(block.view) >= 1_000_000
    assert pool.used <= 1_000_000


def test_slabs_are_used_again_and_never_exceed_the_capacity():
    pool = Pool(8 * MB)
    first = pool.slab(3 * MB, always)
    mapping = first.slab
    first.drop()
    again = pool.slab(3 * MB - 1000, always)
    assert again.slab is mapping
    again.drop()
    other = pool.slab(7 * MB, always)
    assert pool.mapped <= 8 * MB
    other.drop()
    assert pool.used == 0


def test_a_full_pool_swaps_one_slab_for_another_of_its_size_without_new_memory():
    pool = Pool(8 * MB)
    first, second = pool.slab(4 * MB, always), pool.slab(4 * MB, always)
    memory = {id(first.slab), id(second.slab)}
    first.drop()
    third = pool.slab(4 * MB, always)
    assert {id(second.slab), id(third.slab)} == memory


def test_a_full_pool_exchanges_chunks_without_new_memory(wait_until):
    pool = Pool(MB)
    full = [pool.chunk()]
    for _ in range(MB // pool.chunk_size):
        full.append(pool.exchange(full[-1], always))
    memory = {id(each.slab) for each in full}
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.exchange(full[-1], always)))
    thread.start()
    wait_until(lambda: pool.waiting == 1)
    full[0].drop()
    thread.join(60)
    assert id(got[0].slab) in memory
    assert pool.used == MB


def test_who_had_to_wait_is_let_in_when_a_part_is_free_and_not_for_each_message(wait_until):
    pool = Pool(8 * MB)
    small = [pool.slab(MB // 8, always) for _ in range(64)]
    for each in small:
        pool.received(each)
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.slab(MB // 8, always)))
    thread.start()
    wait_until(lambda: pool.waiting == 1)
    for each in small[:3]:
        each.drop()
    thread.join(0.4)  # longer than the wait looks by itself
    assert not got
    small[3].drop()
    thread.join(60)
    assert len(got) == 1


def test_what_only_producers_hold_is_not_waited_for(wait_until):
    pool = Pool(8 * MB)
    receiving, queued = pool.slab(7 * MB, always), pool.slab(MB, always)
    pool.received(queued)
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.slab(MB // 8, always)))
    thread.start()
    wait_until(lambda: pool.waiting == 1)
    queued.drop()
    thread.join(60)
    assert len(got) == 1, "the large message may take a minute to arrive: nobody else waits for it"
    receiving.drop()


def test_a_block_is_given_back_by_its_last_user():
    pool = Pool(MB)
    block = pool.copy(memoryview(b"12345"), always)
    assert pool.used == 5 + BATCH_OVERHEAD
    block.share()
    block.drop()
    assert pool.used == 5 + BATCH_OVERHEAD
    block.drop()
    assert pool.used == 0


def test_a_slab_grows_and_keeps_its_bytes():
    pool = Pool(64 * MB)
    block = pool.slab(MB, always)
    block.view[:5] = b"hello"
    pool.grow(block, 40 * MB, always)
    assert len(block.view) >= 40 * MB
    assert bytes(block.view[:5]) == b"hello"
    assert pool.used == block.charged
    block.drop()
    assert pool.used == 0


def test_growing_messages_that_fill_everything_let_one_go_beyond(wait_until):
    pool = Pool(8 * MB)
    first, second = pool.slab(4 * MB, always), pool.slab(4 * MB, always)
    pool.grow(first, 6 * MB, always)
    thread = threading.Thread(target=pool.grow, args=(second, 6 * MB, always))
    thread.start()
    wait_until(lambda: pool.waiting == 1)
    pool.received(first)
    assert thread.is_alive(), "the first one is whole: it makes room when it is sent"
    first.drop()
    thread.join(60)
    assert not thread.is_alive()
    second.drop()
    assert pool.used == 0


def test_memory_the_system_does_not_give_is_not_counted(monkeypatch):
    pool = Pool(8 * MB)
    chunk = pool.chunk()
    grown = pool.slab(MB, always)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(_Slab, "fresh", refuse)
        patch.setattr(_Slab, "resized", refuse)
        for ask in (
            lambda: pool.slab(3 * MB, always),
            lambda: pool.exchange(chunk, always),
            lambda: pool.grow(grown, 7 * MB, always),
        ):
            with pytest.raises(OSError, match="Cannot allocate memory"):
                ask()
            assert pool.used == MB
    chunk.drop()
    grown.drop()
    assert pool.used == 0
    whole = pool.slab(8 * MB, always)
    whole.drop()
    assert pool.used == 0


def test_a_slab_that_could_not_grow_serves_the_next_message():
    pool = Pool(8 * MB)
    slab = pool.slab(MB, always)
    assert isinstance(slab.slab, _Slab)
    with memoryview(slab.slab.mapping), pytest.raises(BufferError):  # a mapping that is looked at cannot move
        pool.grow(slab, 2 * MB, always)
    assert pool.used == MB
    slab.drop()
    again = pool.slab(MB, always)
    again.view[:1] = b"y"
    again.drop()
    assert pool.used == 0


def test_copies_lie_in_memory_that_is_used_again_but_for_small_ones():
    pool = Pool(1 << 20)
    for size in (100_000, 99_000, 98_500):
        block = pool.copy(memoryview(bytes([7]) * size), lambda: True)
        assert bytes(block.view[:size]) == bytes([7]) * size
        assert pool.used == block.charged >= size
        block.drop()
        assert (pool.used, pool.mapped) == (0, block.charged)
    small = pool.copy(memoryview(b"small"), lambda: True)
    assert bytes(small.view) == b"small"
    small.drop()
    assert pool.used == 0
