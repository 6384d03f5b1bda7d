"""The two wire protocols as pure functions: bytes in, message boundaries out. No sockets, no threads, no clocks.

A *scanner* finds whole messages in received bytes, a *format* walks over messages in memory and writes headers. They
can be fed anything, in pieces of any size: what is not allowed raises :class:`~nngstream.errors.WireError`.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol

#: Where one part of a message lies in its memory: first byte, byte after the last.
Span = tuple[int, int]


class Scan(NamedTuple):
    """What a scanner found.

    Attributes:
        position: first byte of the first frame that is not whole yet (or of the command).
        need: bytes from `position` on that must be there before scanning again can find more; never more than belong
            to the message under way.
        payload: payload bytes of the messages completed by this scan, headers not counted.
        command: body of the command frame that begins at `position`, or None.
        command_size: bytes of that frame on the wire.
    """

    position: int
    need: int
    payload: int
    command: bytes | None = None
    command_size: int = 0


class Scanner(Protocol):
    """Finds message boundaries; one for each connection, since a message may be under way between two calls."""

    def scan(self, buffer: memoryview, position: int, end: int, ends: array[int]) -> Scan:
        """Find whole messages in ``buffer[position:end]``, where `position` is the first byte of a frame.

        The end of each whole message is appended to `ends`. Scanning stops at a command frame, which the caller
        takes out of the buffer before it goes on.

        Raises:
            WireError: the bytes are not allowed by the protocol.
        """


class Format(Protocol):
    """How messages lie in memory and on the wire."""

    @property
    def name(self) -> str:
        """Short name, equal for two connections exactly when bytes can be passed on unchanged."""

    @property
    def multipart(self) -> bool:
        """Whether the format keeps the parts of a message apart."""

    def scanner(self) -> Scanner:
        """A scanner for one connection."""

    def parts(self, buffer: memoryview, start: int, stop: int) -> list[Span]:
        """The payload parts of the whole message in ``buffer[start:stop]``."""

    def header(self, length: int, more: bool) -> bytes:
        """The header of a part of `length` bytes; `more` when another part of the same message follows."""


#: Where fewer whole frames may follow, looking at them one by one is as fast as :func:`equal_frames`.
MANY_FRAMES = 16


def equal_frames(buffer: memoryview, start: int, end: int, header: int, size: int) -> int:
    """How many whole frames with the same header follow each other.

    Events of a detector have one size, mostly. Comparing a column of header bytes at once takes a twentieth of the time
    that looking at the frames one by one takes.

    Args:
        buffer: where they lie.
        start: first byte of the first one, which is whole.
        end: byte after the last one received.
        header: bytes of its header, which must tell the frame's size.
        size: bytes of the frame, header included.

    Returns:
        At least 1.
    """
    whole = (end - start) // size
    look = MANY_FRAMES
    while True:  # a few first: frames of many sizes must not cost a look at all that follow, each time
        count = look = min(look, whole)
        for at in range(start, start + header):
            column = bytes(buffer[at : at + (count - 1) * size + 1 : size])
            count -= len(column.lstrip(column[:1]))
        if count < look or look == whole:
            return count
        look *= 16
