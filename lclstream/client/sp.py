"""The wire format of NNG's scalability protocols, spoken on plain sockets.

libnng (pynng) is a correct peer for this module, but not a sufficient implementation of a stream's ends: it has no
linger, so a pusher that closes after its last ``send`` loses what has not left; and it hides why a connection ended,
so a message cut off half way looks like the end of the stream. Both are visible here. Sources: "SP TCP mapping" and
"SP IPC mapping" (nanomsg RFCs), checked against libnng 1.11.

Handshake, both sides at once: ``00 'S' 'P' 00``, protocol number (16-bit big-endian), ``00 00``. A message: on ipc a
byte ``01``, then its length (64-bit big-endian), then its bytes. There is no end mark: a stream ends by closing the
connection between two messages.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable

from lclstream.client.address import Address
from lclstream.client.errors import AddressError, ListenError, NoPeerError, WrongPeerError

#: Protocol numbers (the pipeline protocol of NNG).
PUSH, PULL = 0x50, 0x51
#: Longest message believed; a longer one is a peer that speaks something else.
LONGEST = 1 << 40
#: Seconds a peer that accepted the connection has to introduce itself.
HANDSHAKE_S = 10.0
_BACK_OFF_S = (0.05, 2.0)
_SMALL = 64 * 1024
_REFUSALS = re.compile(r"ALERT_(BAD_CERT|UNKNOWN_CA|UNSUPPORTED_CERT|CERTIFICATE_|DECRYPT_ERROR|ACCESS_DENIED)")
_ALERT_READ_S = 1.0
_NAMES = {PUSH: "pushes (it produces messages)", PULL: "pulls (it consumes messages)"}


class CutOffError(Exception):
    """The connection ended inside a message or by an error; the text says which.

    Attributes:
        inside: whether a part of a message had been moved: that message is lost.
    """

    def __init__(self, text: str, *, inside: bool) -> None:
        super().__init__(text)
        self.inside = inside


class Connection:
    """One connection after its handshake. A single thread reads or writes it; any thread may call :meth:`stop`.

    Args:
        stream: a connected blocking socket, with TLS already done where it is wanted.
        name: the peer, for messages.
        ipc: whether messages carry the type byte of the ipc mapping.
    """

    def __init__(self, stream: socket.socket, name: str, *, ipc: bool) -> None:
        self._socket = stream
        self.name = name
        self._header = struct.Struct(">BQ" if ipc else ">Q")
        self._ipc = ipc
        self._encrypted = isinstance(stream, ssl.SSLSocket)

    def introduce(self, protocol: int, peer_protocol: int) -> None:
        """Exchange handshakes.

        Raises:
            WrongPeerError: the peer is no NNG socket of the wanted kind.
            OSError: the connection failed, or the peer said nothing for ``HANDSHAKE_S``.
        """
        self._socket.settimeout(HANDSHAKE_S)
        self._socket.sendall(struct.pack(">4sHH", b"\0SP\0", protocol, 0))
        answer = b""
        while len(answer) < 8 and (piece := self._socket.recv(8 - len(answer))):
            answer += piece
            if not b"\0SP\0".startswith(answer[:4]):
                what = "speaks ZeroMQ: use library zmq" if answer[0] == 0xFF else f"is no NNG socket (said {answer!r})"
                raise WrongPeerError(f"{self.name} {what}")
        if len(answer) < 8:
            why = ": it has ended, or its list of logins does not name ours" if self._encrypted else ""
            raise ConnectionResetError(f"{self.name} closed the connection at once{why}")
        (theirs,) = struct.unpack(">H", answer[4:6])
        if theirs != peer_protocol:
            does = _NAMES.get(theirs, f"has protocol number 0x{theirs:x}")
            raise WrongPeerError(f"{self.name} {does}, and so do we: dial the buffer's other side")
        self._socket.settimeout(None)

    def receive(self) -> bytes | None:
        """The next message; None when the peer has closed the connection between two messages.

        Raises:
            CutOffError: the connection ended inside a message, or with an error.
        """
        header = None
        try:
            header = self._exactly(self._header.size)
            if header is None:
                return None
            length = self._header.unpack(header)[-1]
            if length > LONGEST:
                text = f"{self.name} announced a message of {length} bytes: it does not speak SP any more"
                raise CutOffError(text, inside=True)
            message = self._exactly(length) if length else b""
        except (OSError, ValueError) as error:  # ValueError: read on an SSL socket that was stopped
            raise CutOffError(f"{self.name}: {error}", inside=header is not None) from error
        if message is None:
            raise CutOffError(f"{self.name} ended before the {length} bytes it had announced", inside=True)
        return message

    def _exactly(self, size: int) -> bytes | None:
        if isinstance(self._socket, ssl.SSLSocket):
            first = self._socket.recv(min(size, _SMALL))
        else:
            # Straight into the bytes object that is handed out: no second copy of a large message.
            first = self._socket.recv(size, socket.MSG_WAITALL)
        if len(first) == size:
            return first
        if not first:
            return None
        whole = bytearray(size)
        whole[: len(first)] = first
        with memoryview(whole) as view:
            at = len(first)
            while at < size:
                count = self._socket.recv_into(view[at:])
                if not count:
                    raise CutOffError(f"{self.name} ended after {at} of {size} bytes", inside=True)
                at += count
        return bytes(whole)

    def send(self, message: bytes | bytearray | memoryview) -> None:
        """Write one message; returns when the kernel has all of it.

        Raises:
            CutOffError: the connection failed.
        """
        size = memoryview(message).nbytes
        header = self._header.pack(1, size) if self._ipc else self._header.pack(size)
        try:
            if isinstance(self._socket, ssl.SSLSocket) or size <= _SMALL:
                self._socket.sendall(header + bytes(message) if size <= _SMALL else header)
                if size > _SMALL:
                    self._socket.sendall(message)
                return
            sent = self._socket.sendmsg([header, message]) - len(header)
            if sent < 0:
                self._socket.sendall(header[sent:])
                sent = 0
            if sent < size:
                self._socket.sendall(memoryview(message).cast("B")[sent:])
        except (OSError, ValueError) as error:
            raise CutOffError(f"{self.name}: {error}", inside=True) from error

    def ended_by_peer(self) -> bool:
        """Whether the peer has closed its side; for a connection that only sends."""
        try:
            if not isinstance(self._socket, ssl.SSLSocket):
                return not self._socket.recv(1, socket.MSG_DONTWAIT)
            self._socket.settimeout(0)
            return not self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except (OSError, ValueError):
            return True
        finally:
            self._socket.settimeout(None)

    def finish(self) -> None:
        """Tell the peer that no more messages come."""
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                self._socket.settimeout(HANDSHAKE_S)
                self._socket.unwrap()
        except (OSError, ValueError):
            pass  # the peer has gone already, or closes without answering the TLS farewell: both are an end
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)

    def unsent(self) -> int:
        """Bytes that the peer's machine has not acknowledged yet (0 on ipc: they are in the peer's queue at once)."""
        if self._ipc:
            return 0
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, count)
        except OSError:
            return 0
        return count[0]

    def failure(self) -> str:
        """Why the kernel gave the connection up; empty while it is well."""
        try:
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            return str(error)
        return os.strerror(code) if code else ""

    def stop(self) -> None:
        """End the connection now; a thread that reads or writes it returns."""
        # Not SSLSocket.shutdown: it takes the TLS state away from under a thread that reads.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. Only when no thread uses it any more."""
        self._socket.close()


def dial(
    address: Address,
    *,
    protocol: int,
    peer_protocol: int,
    deadline: float,
    closing: threading.Event,
    tls: ssl.SSLContext | None = None,
) -> Connection:
    """Connect and introduce ourselves, again and again with growing pauses until `deadline` (monotonic seconds).

    Raises:
        NoPeerError: nobody was there in time, or `closing` was set.
        WrongPeerError: somebody is there who is not a peer.
    """
    pause, longest = _BACK_OFF_S
    began = time.monotonic()
    reason = "nobody answered"
    while True:
        left = deadline - time.monotonic()
        stream: socket.socket | None = None
        try:
            stream = _connected(address, max(0.05, min(left, HANDSHAKE_S)), tls)
            connection = Connection(stream, str(address), ipc=address.scheme == "ipc")
            connection.introduce(protocol, peer_protocol)
        except ssl.SSLError as error:
            _close(stream)
            raise WrongPeerError(f"{address}: {_tls_problem(error)}") from error
        except WrongPeerError:
            _close(stream)
            raise
        except OSError as error:
            _close(stream)
            reason = str(error) or type(error).__name__
        else:
            return connection
        if time.monotonic() + pause > deadline or closing.wait(pause):
            waited = time.monotonic() - began
            raise NoPeerError(
                f"{address}: nobody to connect to for {waited:.1f} s ({reason}); is the stream already over?"
            )
        pause = min(2 * pause, longest)


def _secured(stream: socket.socket, tls: ssl.SSLContext) -> ssl.SSLSocket:
    """The server's side of TLS; a peer that is refused can read why."""
    secured = tls.wrap_socket(stream, server_side=True, do_handshake_on_connect=False)
    try:
        secured.do_handshake()
    except ssl.SSLError:
        # Closing while its first bytes are unread would make our kernel send a reset, which overtakes the alert.
        deadline = time.monotonic() + _ALERT_READ_S
        with contextlib.suppress(OSError):
            socket.socket.shutdown(secured, socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0 and secured.fileno() >= 0:
                secured.settimeout(left)
                if not socket.socket.recv(secured, 4096):
                    break
        secured.close()
        raise
    except BaseException:
        secured.close()
        raise
    return secured


def _tls_problem(error: ssl.SSLError) -> str:
    """Why the two sides do not come together, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"we do not accept its certificate: {error.verify_message}; its issuer must be in known_servers/ of our "
            "certificate folder, and it must carry the name in the URL"
        )
    text = str(error.reason or error)
    if _REFUSALS.search(text):
        return f"it refuses our certificate ({text}): our issuer must be one the other side trusts"
    return f"TLS failed ({text}): does the other side speak TLS, and accept our certificate (libnng: P-256 keys only)?"


def _close(stream: socket.socket | None) -> None:
    if stream is not None:
        stream.close()


def _connected(address: Address, timeout: float, tls: ssl.SSLContext | None) -> socket.socket:
    if address.scheme == "ipc":
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(timeout)
            stream.connect(address.path)
        except BaseException:
            stream.close()
            raise
        return stream
    stream = _tuned(socket.create_connection((address.host, address.port), timeout))
    if stream.getsockname() == stream.getpeername():
        # Linux may connect a socket to itself while nobody listens at a port of the ephemeral range.
        stream.close()
        raise ConnectionRefusedError("nobody listens there")
    if not address.tls:
        return stream
    try:
        return _context(tls, address).wrap_socket(stream, server_hostname=address.host)
    except BaseException:
        stream.close()
        raise


def _context(tls: ssl.SSLContext | None, address: Address) -> ssl.SSLContext:
    if tls is None:
        raise AddressError(f"{address}: an encrypted stream needs our certificate: give tls= (--credentials FOLDER)")
    return tls


def _tuned(stream: socket.socket) -> socket.socket:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that vanished never closes its connections: probes end them after about a minute.
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return stream


class Listener:
    """Accepts connections in a thread of its own and hands each, introduced, to `accepted`.

    A peer that does not introduce itself properly is dropped; `rejected` keeps the latest reason.
    """

    def __init__(
        self,
        address: Address,
        *,
        protocol: int,
        peer_protocol: int,
        accepted: Callable[[Connection], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._accepted = accepted
        self._protocols = protocol, peer_protocol
        self._tls = _context(tls, address) if address.tls else None
        self.rejected = ""
        try:
            if address.scheme == "ipc":
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.bind(address.path)
                self._socket.listen(128)
            else:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                self._socket = socket.create_server((address.host, address.port), family=family, backlog=128)
                address = Address(address.scheme, address.host, self._socket.getsockname()[1])
        except OSError as error:
            if address.scheme == "ipc":
                self._socket.close()
            raise ListenError(f"cannot listen at {address}: {error}") from error
        self.address = address
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._accept, name=f"accept {address}", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                stream, peer = self._socket.accept()
            except OSError:
                if self._stopped.wait(0.1):
                    return
                continue  # out of descriptors, or the peer left before it was accepted
            name = f"{self.address} (peer {peer[0]}:{peer[1]})" if isinstance(peer, tuple) else str(self.address)
            # The introduction runs beside: a silent peer must not keep the others waiting.
            threading.Thread(target=self._welcome, args=(stream, name), name=f"welcome {name}", daemon=True).start()

    def _welcome(self, stream: socket.socket, name: str) -> None:
        try:
            if self.address.scheme != "ipc":
                _tuned(stream)
            if self._tls is not None:
                stream.settimeout(HANDSHAKE_S)
                stream = _secured(stream, self._tls)
            connection = Connection(stream, name, ipc=self.address.scheme == "ipc")
            connection.introduce(*self._protocols)
        except (OSError, WrongPeerError) as error:
            reason = _tls_problem(error) if isinstance(error, ssl.SSLError) else error
            self.rejected = f"{name}: {reason}"
            stream.close()
            return
        self._accepted(connection)

    def close(self) -> None:
        """Accept no more peers and free the address."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)
        if self.address.scheme == "ipc":
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)
