"""The queue between producers and consumers: first in, first out, to whichever consumer has waited longest.

Ownership: one lock, held only for a few operations; any thread may call anything. A consumer's thread waits in
:meth:`Fifo.take` on a lock of its own (its `Seat`), and batches are handed to seats directly, so that consumers that
all wait are served in turn and a fast one cannot overtake.

The ledger is part of the queue, since only under the same lock does it close at every moment:
received = sent + held + lost, in messages and in payload bytes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from nngstream.batch import Batch


class Amount(NamedTuple):
    """Messages, and their payload bytes."""

    messages: int = 0
    bytes: int = 0


class Ledger(NamedTuple):
    """The account of the whole buffer at one moment."""

    received: Amount
    sent: Amount
    held: Amount
    lost: Amount
    high_water_bytes: int
    oldest_age_s: float


class Loan(NamedTuple):
    """A batch in the queue, and a copy of its description as it was: consumers may take messages out meanwhile."""

    batch: Batch
    copy: Batch


class Seat:
    """One consumer's place in the queue.

    Args:
        group: the group of consumers it belongs to.
    """

    __slots__ = ("_gate", "attention", "batch", "group", "waiting")

    def __init__(self, group: int = 0) -> None:
        self.group = group
        self.batch: Batch | None = None
        self.attention = False
        self.waiting = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def open(self) -> None:
        """Let the waiting thread go; the queue's lock is held."""
        self.waiting = False
        self._gate.release()

    def wait(self) -> None:
        """Wait until somebody calls :meth:`open`."""
        self._gate.acquire()


class _Count:
    """Messages and bytes, counted up and down."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0

    def add(self, messages: int, nbytes: int) -> None:
        self.messages += messages
        self.bytes += nbytes

    def amount(self) -> Amount:
        return Amount(self.messages, self.bytes)


class Fifo:
    """See the module.

    Args:
        groups: how many groups of consumers there are; each has a queue of its own.
        clock: monotonic seconds.
    """

    def __init__(self, groups: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.groups = groups
        self._lock = threading.Lock()
        self._clock = clock
        self._queues: list[deque[Batch]] = [deque() for _ in range(groups)]
        self._waiting: list[deque[Seat]] = [deque() for _ in range(groups)]
        self._consumers = [0] * groups
        self._received, self._sent, self._lost, self._held = _Count(), _Count(), _Count(), _Count()
        self._in_hand: set[Batch] = set()
        self._high_water = 0
        self._number = 0

    # -- producers

    def put(self, batch: Batch) -> None:
        """Append whole messages; never waits, since their memory is there already."""
        with self._lock:
            self._received.add(len(batch), batch.nbytes)
            self._held.add(len(batch), batch.nbytes)
            self._high_water = max(self._high_water, self._held.bytes)
            # One that comes from the disk has its number already; what comes now is newer.
            self._number = batch.number = batch.number or self._number + 1
            self._queues[batch.group].append(batch)
            self._serve(batch.group)

    # -- consumers

    def join(self, seat: Seat) -> None:
        """A consumer has come."""
        with self._lock:
            self._consumers[seat.group] += 1

    def leave(self, seat: Seat) -> None:
        """A consumer has gone."""
        with self._lock:
            self._consumers[seat.group] -= 1

    def take(self, seat: Seat) -> Batch | None:
        """The next messages for this consumer. Waits for them.

        Returns:
            A batch, to be closed with :meth:`done`; None when :meth:`call` was used instead.
        """
        with self._lock:
            if seat.attention:
                seat.attention = False
                return None
            self._waiting[seat.group].append(seat)
            seat.waiting = True
            self._serve(seat.group)
        seat.wait()
        with self._lock:
            batch, seat.batch = seat.batch, None
            if batch is None:
                seat.attention = False
            return batch

    def call(self, seat: Seat) -> None:
        """Let the consumer's thread come back from :meth:`take` without a batch, now or the next time."""
        with self._lock:
            seat.attention = True
            if seat.waiting:
                self._waiting[seat.group].remove(seat)
                seat.open()

    def done(self, batch: Batch, sent: int, lost: int) -> None:
        """What became of a batch: its first messages were sent, the next ones lost, the others go to somebody else.

        Args:
            batch: what :meth:`take` gave.
            sent: messages of which every byte was written.
            lost: messages of which some bytes were written, and not all (0 or 1).
        """
        over = []
        with self._lock:
            self._in_hand.remove(batch)
            if sent:
                first = batch.split(sent) if sent < len(batch) else batch
                self._sent.add(sent, first.nbytes)
                self._held.add(-sent, -first.nbytes)
                over.append(first)
            if sent == 0 or first is not batch:
                rest: Batch | None = batch
                if lost == len(batch):
                    over.append(self._lose(batch))
                    rest = None
                elif lost:
                    over.append(self._lose(batch.split(lost)))
                if rest is not None:
                    rest.portion = 0
                    self._queues[rest.group].appendleft(rest)
                    self._serve(rest.group)
        for each in over:  # not under the lock: the disk may be slow
            each.block.drop()

    # -- the disk

    def newest_in_memory(self, nbytes: int) -> list[Loan]:
        """The newest run of neighbours in a queue that lie in memory, about `nbytes` of them, the oldest first.

        They stay in the queue, and their memory stays readable until :meth:`replace` or :meth:`return_loan`. Empty
        when everything queued is on disk.
        """
        with self._lock:
            for queue in self._queues:
                run: list[Loan] = []
                size = 0
                for batch in reversed(queue):
                    if batch.block.charged:
                        run.append(Loan(batch, batch.copy()))
                        size += batch.size
                    elif run:
                        break
                    if size >= nbytes:
                        break
                if run:
                    return run[::-1]
            return []

    def replace(self, loans: list[Loan], merged: Batch) -> bool:
        """Put `merged`, the same messages elsewhere, in the place of neighbours in the queue; ends the loans.

        Returns:
            False when a consumer has taken some of them meanwhile; then the queue is as it was.
        """
        with self._lock:
            queue = self._queues[merged.group]
            later = []
            while queue and queue[-1] is not loans[-1].batch:
                later.append(queue.pop())
            count = len(loans)
            same = len(queue) >= count and all(
                queue[index - count] is loan.batch and loan.batch.ends is loan.copy.ends
                for index, loan in enumerate(loans)
            )
            if same:
                for _ in loans:
                    queue.pop()
                queue.append(merged)
            queue.extend(reversed(later))
        self.return_loan(loans)
        if same:
            for loan in loans:
                loan.batch.block.drop()
        return same

    def on_disk(self) -> list[Batch]:
        """What is queued and not in memory."""
        with self._lock:
            return [batch for queue in self._queues for batch in queue if not batch.block.charged]

    def return_loan(self, loans: list[Loan]) -> None:
        """The memory of these batches is read no more."""
        for loan in loans:
            loan.copy.block.drop()

    @property
    def consumers(self) -> int:
        """How many consumers there are."""
        return sum(self._consumers)

    def lost_after_sending(self, messages: int, nbytes: int) -> None:
        """Messages counted as sent were still in our socket when their consumer died."""
        with self._lock:
            self._sent.add(-messages, -nbytes)
            self._lost.add(messages, nbytes)

    def drop_all(self) -> Amount:
        """Give up everything that is queued in memory; it counts as lost. What is on disk stays."""
        over = []
        with self._lock:
            before = self._lost.amount()
            for queue in self._queues:
                over += [self._lose(batch) for batch in queue if batch.block.charged]
                kept = [batch for batch in queue if not batch.block.charged]
                queue.clear()
                queue.extend(kept)
            dropped = Amount(self._lost.messages - before.messages, self._lost.bytes - before.bytes)
        for batch in over:
            batch.block.drop()
        return dropped

    # -- everybody

    def ledger(self) -> Ledger:
        """The account now."""
        with self._lock:
            held = [queue[0].since for queue in self._queues if queue] + [batch.since for batch in self._in_hand]
            oldest = self._clock() - min(held) if held else 0.0
            return Ledger(
                self._received.amount(),
                self._sent.amount(),
                self._held.amount(),
                self._lost.amount(),
                self._high_water,
                oldest,
            )

    @property
    def empty(self) -> bool:
        """Whether nothing is queued and nothing is being sent."""
        with self._lock:
            return not self._in_hand and not any(self._queues)

    def waiting_for(self, group: int) -> tuple[int, Amount]:
        """How many consumers a group has, and what is queued for them."""
        with self._lock:
            queue = self._queues[group]
            queued = Amount(sum(len(batch) for batch in queue), sum(batch.nbytes for batch in queue))
            return self._consumers[group], queued

    # -- with the lock held

    def _serve(self, group: int) -> None:
        """Hand batches to waiting consumers."""
        queue, waiting = self._queues[group], self._waiting[group]
        while queue and waiting:
            seat = waiting.popleft()
            seat.batch = batch = self._portion(queue, self._consumers[group])
            self._in_hand.add(batch)
            seat.open()

    def _portion(self, queue: deque[Batch], consumers: int) -> Batch:
        """What one consumer takes: a whole batch when there is enough for all of them, else its share."""
        batch = queue[0]
        if len(batch) > 1 and consumers > len(queue) and not batch.portion:
            batch.portion = -(-len(batch) // consumers)
        if 0 < batch.portion < len(batch):
            return batch.split(batch.portion)
        return queue.popleft()

    def _lose(self, batch: Batch) -> Batch:
        self._lost.add(len(batch), batch.nbytes)
        self._held.add(-len(batch), -batch.nbytes)
        return batch
