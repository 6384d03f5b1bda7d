"""ZMTP 3.x, the protocol of ZeroMQ, with the NULL mechanism, for PUSH and PULL (rfc.zeromq.org/spec/23 and /37).

A connection begins with a greeting of 64 bytes each way, then a READY command each way that names the socket type. A
frame is one byte of flags (MORE 1, LONG 2, COMMAND 4), its length as one byte, or as 64-bit big-endian integer when
LONG, then its bytes. Frames with MORE and the first one without it are one message.
"""

from __future__ import annotations

import struct
from array import array
from typing import NamedTuple

from nngstream.errors import WireError
from nngstream.wire import MANY_FRAMES, Scan, Span, equal_frames

FIRST_BYTE = 0xFF
GREETING_SIZE = 64
#: A command larger than this is no heartbeat and no READY; nobody may make us wait for it.
MAX_COMMAND = 65536
#: Bytes of a PING's context that the PONG repeats at most.
MAX_PING_CONTEXT = 16

MORE, LONG, COMMAND = 1, 2, 4
EMPTY_MESSAGE = b"\x00\x00"

_LENGTH = struct.Struct(">Q")
_MECHANISM = slice(12, 32)


class Greeting(NamedTuple):
    """What a peer's greeting says."""

    major: int
    minor: int
    mechanism: str


def greeting() -> bytes:
    """Our greeting: ZMTP 3.1, NULL mechanism."""
    return b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


def read_greeting(data: bytes) -> Greeting:
    """Read the 64 bytes a peer begins with.

    Raises:
        WireError: not ZMTP, a version before 3, or a mechanism other than NULL.
    """
    if len(data) != GREETING_SIZE or data[0] != FIRST_BYTE or data[9] != 0x7F:
        raise WireError(f"not a ZMTP greeting: {data[:12].hex(' ')}")
    major, minor = data[10], data[11]
    mechanism = bytes(data[_MECHANISM]).rstrip(b"\0").decode("ascii", "replace")
    if major < 3:
        raise WireError(f"ZMTP {major}.{minor} is too old: libzmq 4 or newer (ZMTP 3) is needed")
    if mechanism != "NULL":
        raise WireError(f"ZMTP mechanism {mechanism!r} is not offered here, only NULL: use tls+tcp for encryption")
    return Greeting(major, minor, mechanism)


def command(name: str, data: bytes = b"") -> bytes:
    """A command frame."""
    body = bytes([len(name)]) + name.encode("ascii") + data
    if len(body) < 256:
        return bytes([COMMAND, len(body)]) + body
    return bytes([COMMAND | LONG]) + _LENGTH.pack(len(body)) + body


def read_command(body: bytes) -> tuple[str, bytes]:
    """Name and data of a command frame's body.

    Raises:
        WireError: the name does not fit, or is not ASCII.
    """
    if not body or 1 + body[0] > len(body):
        raise WireError("a command without a name")
    name = body[1 : 1 + body[0]]
    if not name.isascii():
        raise WireError(f"a command with an unreadable name {name.hex(' ')}")
    return name.decode("ascii"), body[1 + body[0] :]


def ready(socket_type: str, **properties: str) -> bytes:
    """The READY command frame of a socket; further properties are ignored by peers that do not know them."""
    data = b""
    for key, value in {"Socket-Type": socket_type, "Identity": "", **properties}.items():
        encoded = value.encode()
        data += bytes([len(key)]) + key.encode("ascii") + struct.pack(">I", len(encoded)) + encoded
    return command("READY", data)


def read_properties(data: bytes) -> dict[str, bytes]:
    """The properties of a READY command, names in lower case since the protocol ignores case.

    Raises:
        WireError: a property is cut off.
    """
    properties = {}
    position = 0
    while position < len(data):
        name_end = position + 1 + data[position]
        if name_end + 4 > len(data):
            raise WireError("READY with a property that is cut off")
        name = data[position + 1 : name_end].decode("ascii", "replace").lower()
        value_end = name_end + 4 + struct.unpack_from(">I", data, name_end)[0]
        if value_end > len(data):
            raise WireError(f"READY with a property {name!r} that is cut off")
        properties[name] = data[name_end + 4 : value_end]
        position = value_end
    return properties


def error(reason: str) -> bytes:
    """The ERROR command frame that tells a peer why it is refused."""
    text = reason.encode("ascii", "replace")[:255]
    return command("ERROR", bytes([len(text)]) + text)


def ping(ttl_s: float) -> bytes:
    """A PING frame: the peer may forget us when nothing comes for `ttl_s` seconds."""
    return command("PING", struct.pack(">H", min(65535, round(10 * ttl_s))))


def pong(ping_data: bytes) -> bytes:
    """The answer to a PING with this data.

    Raises:
        WireError: the PING has no TTL, or too long a context.
    """
    if not 2 <= len(ping_data) <= 2 + MAX_PING_CONTEXT:
        raise WireError(f"a PING of {len(ping_data)} bytes")
    return command("PONG", ping_data[2:])


class ZmtpScanner:
    """Remembers, between two calls, whether a message of several parts is under way, and its bytes so far."""

    def __init__(self) -> None:
        self._partial = 0

    def scan(self, buffer: memoryview, position: int, end: int, ends: array[int]) -> Scan:
        """See :class:`~nngstream.wire.Scanner`."""
        payload, partial, before, alike = 0, self._partial, 0, 0
        while True:
            available = end - position
            if available < 2:
                need = 9 if available and buffer[position] & LONG else 2
                break
            flags = buffer[position]
            if flags & LONG:
                if flags > 7 or flags & 5 == 5:
                    raise WireError(f"a frame with unknown flags {flags:#04x}")
                if available < 9:
                    need = 9
                    break
                length = _LENGTH.unpack_from(buffer, position + 1)[0]
                if length >> 63:
                    raise WireError(f"a frame of {length} bytes: more than 2^63 are not allowed")
                need = 9 + length
            else:
                if flags > 7 or flags & 5 == 5:
                    raise WireError(f"a frame with unknown flags {flags:#04x}")
                length = buffer[position + 1]
                need = 2 + length
            if flags & COMMAND and length > MAX_COMMAND:
                raise WireError(f"a command of {length} bytes: {MAX_COMMAND} are allowed")
            if need > available:
                break
            if flags & COMMAND:
                self._partial = partial
                body = bytes(buffer[position + need - length : position + need])
                return Scan(position, 2, payload, body, need)
            alike = alike + 1 if need == before else 0
            if alike > 3 and available >= MANY_FRAMES * need and not flags & MORE and not partial:
                count = equal_frames(buffer, position, end, need - length, need)
                ends.extend(range(position + need, position + count * need + 1, need))
                position += count * need
                payload += count * length
                continue
            before = need
            position += need
            partial += length
            if not flags & MORE:
                ends.append(position)
                payload += partial
                partial = 0
        self._partial = partial
        return Scan(position, need, payload)


class ZmtpFormat:
    """Frames with flags; parts stay apart."""

    multipart = True
    name = "zmtp"

    def scanner(self) -> ZmtpScanner:
        """A scanner for one connection."""
        return ZmtpScanner()

    def parts(self, buffer: memoryview, start: int, stop: int) -> list[Span]:
        """See :class:`~nngstream.wire.Format`."""
        spans = []
        while start < stop:
            if buffer[start] & LONG:
                first = start + 9
                start = first + _LENGTH.unpack_from(buffer, start + 1)[0]
            else:
                first = start + 2
                start = first + buffer[start + 1]
            spans.append((first, start))
        return spans

    def header(self, length: int, more: bool) -> bytes:
        """See :class:`~nngstream.wire.Format`."""
        if length < 256:
            return bytes((MORE if more else 0, length))
        return bytes((LONG | MORE if more else LONG,)) + _LENGTH.pack(length)


ZMTP = ZmtpFormat()
