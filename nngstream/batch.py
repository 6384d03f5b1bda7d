"""What travels through the buffer: one or more whole messages, lying side by side in memory as they came."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator

from nngstream.memory import Block
from nngstream.route import Route
from nngstream.wire import Format


class Batch:
    """Whole messages in one block, in the format of the connection they came from.

    Attributes:
        block: the memory; the batch is one of its users.
        format: how the messages lie there.
        begin: first byte of the first message (of its header).
        ends: byte after each message, in order.
        nbytes: payload bytes of all messages together.
        since: when it came (monotonic seconds).
        group: which group of consumers it is for.
        portion: how many messages one consumer takes of it at most, 0 when not decided yet.
        number: its place in the queue, counted from 1; 0 before it came there. Parts of a batch share it.
    """

    __slots__ = ("begin", "block", "ends", "format", "group", "nbytes", "number", "portion", "since")

    def __init__(
        self, block: Block, wire: Format, begin: int, ends: array[int], nbytes: int, *, since: float, group: int = 0
    ) -> None:
        self.block = block
        self.format = wire
        self.begin = begin
        self.ends = ends
        self.nbytes = nbytes
        self.since = since
        self.group = group
        self.portion = 0
        self.number = 0

    def __len__(self) -> int:
        """How many messages."""
        return len(self.ends)

    @property
    def stop(self) -> int:
        """The byte after the last message."""
        return self.ends[-1]

    @property
    def size(self) -> int:
        """Bytes on the wire, headers included."""
        return self.ends[-1] - self.begin

    def starts(self) -> Iterator[int]:
        """The first byte of each message."""
        yield self.begin
        yield from self.ends[:-1]

    def payload(self, first: int, last: int) -> int:
        """Payload bytes of the messages ``first`` to ``last - 1``."""
        if first == 0 and last == len(self.ends):
            return self.nbytes
        view = self.block.view
        begin = self.ends[first - 1] if first else self.begin
        total = 0
        for end in self.ends[first:last]:
            total += sum(stop - start for start, stop in self.format.parts(view, begin, end))
            begin = end
        return total

    def copy(self) -> Batch:
        """Another description of the same messages, one more user of the block."""
        self.block.share()
        same = Batch(self.block, self.format, self.begin, self.ends, self.nbytes, since=self.since, group=self.group)
        same.number = self.number
        return same

    def split(self, count: int) -> Batch:
        """Take the first `count` messages out as a batch of their own; the others stay. 0 < count < len."""
        nbytes = self.payload(0, count)
        self.block.share()
        first = Batch(
            self.block, self.format, self.begin, self.ends[:count], nbytes, since=self.since, group=self.group
        )
        first.number = self.number
        self.begin = self.ends[count - 1]
        self.ends = self.ends[count:]
        self.nbytes -= nbytes
        return first

    def divide(self, route: Route, groups: int) -> list[Batch]:
        """Cut into runs of messages for one group of consumers each, in order; this batch is used up."""
        view, parts = self.block.view, self.format.parts
        keys = [
            route.group(view, *parts(view, start, stop)[0], groups)
            for start, stop in zip(self.starts(), self.ends, strict=True)
        ]
        runs = []
        for key, same in itertools.groupby(keys):
            count = sum(1 for _ in same)
            run = self.split(count) if count < len(self) else self
            run.group = key
            runs.append(run)
        return runs
