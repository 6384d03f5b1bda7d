"""The sending side of two wire protocols, on plain sockets: NNG's Push0 (SP) and ZeroMQ's PUSH (ZMTP 3).

Why not the libraries: libnng cannot tell when a message has left, and loses the last ones at exit; libzmq says only
that a message left its queue. Here a message is *sent* when the kernel has all of it and *confirmed* when the other
side's kernel has acknowledged it, and nothing is copied in between.

SP: https://nng.nanomsg.org/RFCs/sp-tcp-v1.html. ZMTP: https://rfc.zeromq.org/spec/23/.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Protocol = Literal["nng", "zmq"]

_SP_PUSH = struct.pack(">4sHH", b"\0SP\0", 0x50, 0)
_SP_PULL = struct.pack(">4sHH", b"\0SP\0", 0x51, 0)
_ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_LOOPBACK_BUFFER = 256 * 1024
_MAX_PARTS = 512  # below any system's IOV_MAX


class WireError(OSError):
    """The other side is not what was expected, or speaks wrongly."""


@dataclass(frozen=True)
class Address:
    """Where a URL points: a host and port, or the path of a UNIX socket."""

    url: str
    family: socket.AddressFamily
    name: tuple[str, int] | str

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.startswith("tls+")

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse ``tcp://HOST:PORT``, ``tls+tcp://HOST:PORT`` or ``ipc:///PATH``; ``*`` means every interface."""
        scheme, _, rest = url.partition("://")
        if scheme == "ipc":
            return cls(url, socket.AF_UNIX, rest)
        host, _, port = rest.rpartition(":")
        host = host.strip("[]")
        if host == "*":
            host = "0.0.0.0"  # noqa: S104 - that is what the user asks for with *
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return cls(url, family, (host, int(port)))


class Connection:
    """A connection to one pulling peer, after the handshake. Used by one thread.

    Args:
        sock: a connected socket, which the connection closes.
        protocol: what to speak.
        timeout: how long the handshake may take, in seconds.

    Raises:
        OSError: the peer left, or speaks another protocol (:class:`WireError`).
    """

    def __init__(self, sock: socket.socket, protocol: Protocol, timeout: float) -> None:
        self._socket = sock
        self._protocol = protocol
        self._ipc = sock.family == socket.AF_UNIX
        self._inbox = bytearray()
        self._answers = bytearray()
        sock.settimeout(timeout)
        if not self._ipc:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sock.getpeername()[0] in ("127.0.0.1", "::1"):
                # What fits the cache is sent with less work; over a network the kernel must find the size itself.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOOPBACK_BUFFER)
        try:
            if protocol == "nng":
                self._greet_sp()
            else:
                self._greet_zmtp(time.monotonic() + timeout)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise

    # ------------------------------------------------------------------------------------------------------ sending

    def send(self, parts: Sequence[memoryview], nbytes: int, timeout: float) -> None:
        """Hand a message to the kernel.

        Args:
            parts: the message, in pieces.
            nbytes: length of all pieces.
            timeout: how long the peer may take nothing of it, in seconds.

        Raises:
            TimeoutError: the peer took nothing for so long.
            OSError: the peer has left. It cannot have received the whole message.
        """
        answers, self._answers = self._answers, bytearray()
        self._write([memoryview(answers + self._header(nbytes)), *parts], timeout)

    def _header(self, nbytes: int) -> bytes:
        if self._protocol == "nng":
            return (b"\x01" if self._ipc else b"") + struct.pack(">Q", nbytes)
        return struct.pack(">BB", 0, nbytes) if nbytes < 256 else struct.pack(">BQ", 2, nbytes)

    def _write(self, parts: list[memoryview], timeout: float) -> None:
        first = 0
        progress = time.monotonic()
        while first < len(parts):
            try:
                sent = self._socket.sendmsg(parts[first : first + _MAX_PARTS])
            except BlockingIOError:
                left = progress + timeout - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"the peer took nothing for {timeout:.0f} s") from None
                # Reading as well: only that tells that the peer has closed its side.
                readable, _, _ = select.select([self._socket], [self._socket], [], min(left, 1.0))
                if readable:
                    self._read()
                continue
            progress = time.monotonic()
            while first < len(parts) and sent >= parts[first].nbytes:
                sent -= parts[first].nbytes
                first += 1
            if sent:
                parts[first] = parts[first][sent:]

    def listen(self) -> None:
        """Read what the peer says between messages: heartbeats are answered.

        Raises:
            OSError: it has closed the connection.
        """
        self._read()
        if self._answers:
            answers, self._answers = self._answers, bytearray()
            self._write([memoryview(answers)], 10.0)

    def _read(self) -> None:
        while True:
            data = self._take()
            if data is None:
                return
            if not data:
                raise ConnectionResetError("the peer has closed the connection")
            if self._protocol == "nng":
                raise WireError("a pulling NNG peer sends nothing, this one did")
            self._inbox += data
            while (frame := self._frame()) is not None:
                is_command, body = frame
                if is_command and body[1 : 1 + body[0]] == b"PING":
                    # Not sent here: a message may be half written.
                    self._answers += _command(b"PONG", body[7:])

    def _take(self) -> bytes | None:
        """What has come, `None` when nothing has, empty at the end."""
        try:
            return self._socket.recv(65536)
        except BlockingIOError:
            return None

    def unconfirmed(self) -> int:
        """How many bytes the kernel holds that the other side's kernel has not acknowledged."""
        count = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        return int(count)

    def wait_confirmed(self, deadline: float) -> bool:
        """Wait until everything sent has reached the other side; whether that happened before the deadline."""
        while self.unconfirmed():
            if time.monotonic() >= deadline:
                return False
            readable, _, _ = select.select([self._socket], [], [], 0.01)
            if readable:
                try:
                    self.listen()
                except OSError:
                    return self.unconfirmed() == 0
        return True

    def close(self) -> None:
        """Close; what the kernel holds is still sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()

    # ---------------------------------------------------------------------------------------------------- handshake

    def _receive(self, count: int) -> bytes:
        while len(self._inbox) < count:
            data = self._socket.recv(count - len(self._inbox))
            if not data:
                raise WireError("the other side closed the connection during the handshake")
            self._inbox += data
        taken = bytes(self._inbox[:count])
        del self._inbox[:count]
        return taken

    def _greet_sp(self) -> None:
        self._socket.sendall(_SP_PUSH)
        answer = self._receive(1)
        if answer == b"\xff":
            raise WireError("the other side speaks ZeroMQ, not NNG: set `library: zmq`")
        answer += self._receive(7)
        if answer != _SP_PULL:
            raise WireError(f"the other side is no NNG Pull0 socket (it says {answer!r})")

    def _greet_zmtp(self, deadline: float) -> None:
        self._socket.sendall(_ZMTP_GREETING)
        first = self._receive(1)
        if first == b"\0":
            raise WireError("the other side speaks NNG, not ZeroMQ: set `library: nng`")
        greeting = first + self._receive(63)
        if first != b"\xff" or not greeting[9] & 1 or greeting[10] < 3:
            raise WireError("the other side does not speak ZeroMQ 4 (ZMTP 3)")
        mechanism = greeting[12:32].rstrip(b"\0")
        if mechanism != b"NULL":
            raise WireError(
                f"the other side wants ZeroMQ security {mechanism.decode('latin1')}, which is not supported"
            )
        self._socket.sendall(_command(b"READY", _property(b"Socket-Type", b"PUSH") + _property(b"Identity", b"")))
        while True:
            frame = self._frame()
            if frame is None:
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                data = self._socket.recv(65536)
                if not data:
                    raise WireError("the other side closed the connection during the handshake")
                self._inbox += data
                continue
            is_command, body = frame
            name = body[1 : 1 + body[0]] if is_command and body else b""
            if name == b"ERROR":
                raise WireError(f"the other side refuses: {body[7:].decode('latin1')}")
            if name == b"READY":
                if b"PULL" not in body:
                    raise WireError("the other side is no ZeroMQ PULL socket")
                return

    def _frame(self) -> tuple[bool, bytes] | None:
        """The next whole frame in the inbox: whether it is a command, and its body."""
        if len(self._inbox) < 2:
            return None
        flags = self._inbox[0]
        if flags & 2:
            if len(self._inbox) < 9:
                return None
            start, size = 9, int.from_bytes(self._inbox[1:9], "big")
        else:
            start, size = 2, self._inbox[1]
        if size > 65536:
            raise WireError(f"the other side sends a frame of {size} bytes, a PULL socket should send none")
        if len(self._inbox) < start + size:
            return None
        body = bytes(self._inbox[start : start + size])
        del self._inbox[: start + size]
        return bool(flags & 4), body


def _command(name: bytes, data: bytes) -> bytes:
    body = bytes([len(name)]) + name + data
    return struct.pack(">BB", 4, len(body)) + body if len(body) < 256 else struct.pack(">BQ", 6, len(body)) + body


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
