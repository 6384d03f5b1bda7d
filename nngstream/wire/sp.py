"""SP, the protocol of NNG and nanomsg, for Push0 and Pull0.

On TCP (and on TLS) a connection begins with eight bytes each way, ``00 'S' 'P' 00 <protocol, 16 bit> 00 00``; a message
is its length as 64-bit big-endian integer, then its bytes. On ipc one byte 0x01 comes before the length. From the
mappings "SP over TCP" (sp-tcp-mapping-01) and NNG's ipc transport.
"""

from __future__ import annotations

import struct
from array import array

from nngstream.errors import WireError
from nngstream.wire import MANY_FRAMES, Scan, Span, equal_frames

PUSH = 0x50
PULL = 0x51
NAMES = {
    0x10: "Pair0", 0x11: "Pair1", 0x20: "Pub0", 0x21: "Sub0", 0x30: "Req0", 0x31: "Rep0", PUSH: "Push0", PULL: "Pull0",
    0x62: "Surveyor0", 0x63: "Respondent0", 0x70: "Bus0",
}  # fmt: skip
FIRST_BYTE = 0x00
GREETING_SIZE = 8

_LENGTH = struct.Struct(">Q")
_MESSAGE_TYPE = b"\x01"


def greeting(protocol: int) -> bytes:
    """The eight bytes that open a connection."""
    return b"\x00SP\x00" + protocol.to_bytes(2, "big") + b"\x00\x00"


def read_greeting(data: bytes) -> int:
    """The protocol number a peer announced.

    Raises:
        WireError: it is not an SP greeting of version 0.
    """
    if len(data) != GREETING_SIZE or data[:3] != b"\x00SP":
        raise WireError(f"not an SP greeting: {data[:GREETING_SIZE].hex(' ')}")
    if data[3] != 0 or data[6:8] != b"\x00\x00":
        raise WireError(f"SP version {data[3]} is not known, only version 0 is")
    return int.from_bytes(data[4:6], "big")


class SpFormat:
    """Length-prefixed messages, ``ipc`` with the type byte before the length."""

    multipart = False

    def __init__(self, *, ipc: bool) -> None:
        self.name = "sp-ipc" if ipc else "sp"
        self._prefix = 1 if ipc else 0
        self.header_size = self._prefix + _LENGTH.size

    def scanner(self) -> SpFormat:
        """This format itself: every message stands alone, so that nothing need be remembered."""
        return self

    def scan(self, buffer: memoryview, position: int, end: int, ends: array[int]) -> Scan:
        """See :class:`~nngstream.wire.Scanner`."""
        prefix, header, first, count = self._prefix, self.header_size, position, len(ends)
        length_at = _LENGTH.unpack_from
        append = ends.append
        need, before, alike = header, 0, 0
        while end - position >= header:
            if prefix and buffer[position] != 1:
                raise WireError(f"ipc message of unknown type {buffer[position]:#04x}")
            size = header + length_at(buffer, position + prefix)[0]
            if size > end - position:
                need = size
                break
            alike = alike + 1 if size == before else 0
            if alike > 3 and end - position >= MANY_FRAMES * size:
                same = equal_frames(buffer, position, end, header, size)
                ends.extend(range(position + size, position + same * size + 1, size))
                position += same * size
                continue
            before = size
            position += size
            append(position)
        return Scan(position, need, position - first - header * (len(ends) - count))

    def parts(self, buffer: memoryview, start: int, stop: int) -> list[Span]:
        """See :class:`~nngstream.wire.Format`."""
        return [(start + self.header_size, stop)]

    def header(self, length: int, more: bool = False) -> bytes:
        """See :class:`~nngstream.wire.Format`; SP has no parts, `more` must be False."""
        if more:
            raise ValueError("SP messages have no parts")
        packed = _LENGTH.pack(length)
        return _MESSAGE_TYPE + packed if self._prefix else packed


SP = SpFormat(ipc=False)
SP_IPC = SpFormat(ipc=True)
