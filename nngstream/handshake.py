"""Who is there? The first byte tells the protocol; then both sides say what they are.

Everything here has a deadline, so that a peer that says nothing, or one byte a second, is cut off and holds nobody up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from nngstream.errors import WireError
from nngstream.stream import Stream
from nngstream.wire import Format, sp, zmtp

Side = Literal["in", "out"]

#: How long a peer may take to say who it is, in seconds.
HANDSHAKE_S = 5.0
#: Name of the property by which two buffers know each other.
OUR_PROPERTY = "X-nngstream"
_MAX_READY = 4096


@dataclass(frozen=True)
class Greeted:
    """What a peer turned out to be.

    Attributes:
        protocol: ``nng`` or ``zmq``.
        format: how its messages travel on this connection.
        buffer: name of the buffer at the other end, or None when it is no buffer.
        heartbeats: it answers PING.
    """

    protocol: Literal["nng", "zmq"]
    format: Format
    buffer: str | None = None
    heartbeats: bool = False


def greet(stream: Stream, side: Side, name: str, *, speak_after_s: float | None = None) -> Greeted:
    """Do the handshake of whatever protocol the peer speaks.

    Args:
        stream: fresh connection.
        side: ``in``: the peer must be a producer; ``out``: a consumer.
        name: our name, told to other buffers.
        speak_after_s: we dialled: when the peer has said nothing for so long it may be another buffer, which waits for
            our first byte; then we speak first (ZMTP, which keeps the parts of a message apart).

    Raises:
        WireError: it speaks something else, is on the wrong side, or takes too long.
        OSError: the connection broke.
    """
    try:
        return _greet(stream, side, name, speak_after_s, time.monotonic() + HANDSHAKE_S)
    except TimeoutError as error:
        raise WireError(f"said not who it is within {HANDSHAKE_S:g} s") from error


def _greet(stream: Stream, side: Side, name: str, speak_after_s: float | None, deadline: float) -> Greeted:
    patience = deadline if speak_after_s is None else min(deadline, time.monotonic() + speak_after_s)
    try:
        first = stream.receive_exactly(1, patience)
    except TimeoutError:
        if speak_after_s is None:
            raise
        return _greet_zmtp(stream, side, name, b"", deadline)
    if first[0] == sp.FIRST_BYTE:
        return _greet_sp(stream, side, first, deadline)
    if first[0] == zmtp.FIRST_BYTE:
        return _greet_zmtp(stream, side, name, first, deadline)
    raise WireError(f"speaks neither NNG (first byte 00) nor ZeroMQ (ff): its first byte is {first.hex()}")


def _greet_sp(stream: Stream, side: Side, first: bytes, deadline: float) -> Greeted:
    ours, wanted = (sp.PULL, sp.PUSH) if side == "in" else (sp.PUSH, sp.PULL)
    stream.send_greeting(sp.greeting(ours), deadline)
    found = sp.read_greeting(first + stream.receive_exactly(sp.GREETING_SIZE - 1, deadline))
    if found != wanted:
        raise WireError(_wrong_side(side, sp.NAMES.get(found, f"protocol {found:#06x}"), sp.NAMES[wanted]))
    stream.block()
    return Greeted("nng", sp.SP_IPC if stream.ipc else sp.SP)


def _greet_zmtp(stream: Stream, side: Side, name: str, first: bytes, deadline: float) -> Greeted:
    ours, wanted = ("PULL", "PUSH") if side == "in" else ("PUSH", "PULL")
    stream.send_greeting(zmtp.greeting(), deadline)
    theirs = first or stream.receive_exactly(1, deadline)
    if theirs[0] != zmtp.FIRST_BYTE:
        raise WireError("answers in another protocol than ours")
    greeting = zmtp.read_greeting(theirs + _rest_of_greeting(stream, deadline))
    stream.send_greeting(zmtp.ready(ours, **{OUR_PROPERTY: name}), deadline)
    command, data = zmtp.read_command(_command_body(stream, deadline))
    if command != "READY":
        raise WireError(f"sent {command} instead of READY: {data[1:].decode('ascii', 'replace')}")
    properties = zmtp.read_properties(data)
    found = properties.get("socket-type", b"").decode("ascii", "replace")
    if found != wanted:
        reason = _wrong_side(side, found, wanted)
        stream.send_greeting(zmtp.error(reason), deadline)
        raise WireError(reason)
    stream.block()
    buffer = properties.get(OUR_PROPERTY.lower())
    return Greeted("zmq", zmtp.ZMTP, None if buffer is None else buffer.decode("utf-8", "replace"), greeting.minor >= 1)


def _command_body(stream: Stream, deadline: float) -> bytes:
    flags, size = stream.receive_exactly(2, deadline)
    if flags == zmtp.COMMAND | zmtp.LONG:
        size = int.from_bytes(bytes([size]) + stream.receive_exactly(7, deadline), "big")
    elif flags != zmtp.COMMAND:
        raise WireError("sent no READY after its greeting")
    if size > _MAX_READY:
        raise WireError(f"sent a READY of {size} bytes, {_MAX_READY} are allowed")
    return stream.receive_exactly(size, deadline)


def _rest_of_greeting(stream: Stream, deadline: float) -> bytes:
    """The greeting after its first byte, in steps: an old libzmq says its version and waits for more from us."""
    head = stream.receive_exactly(10, deadline)
    if head[8] != 0x7F:
        raise WireError("speaks ZMTP 1: libzmq 4 or newer (ZMTP 3) is needed")
    if head[9] < 3:
        raise WireError(f"ZMTP {head[9]} is too old: libzmq 4 or newer (ZMTP 3) is needed")
    return head + stream.receive_exactly(zmtp.GREETING_SIZE - 11, deadline)


def _wrong_side(side: Side, found: str, wanted: str) -> str:
    what = "producers" if side == "in" else "consumers"
    return f"is a {found} socket, and only {wanted} may connect to the side of the {what} (--{side})"
