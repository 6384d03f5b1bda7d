"""A connected socket, plain or TLS, as the connections use it: blocking, and interruptible from another thread.

Ownership: one thread reads and writes; :meth:`Stream.interrupt` may be called by any.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import ssl
import struct
import termios
import time
from collections.abc import Sequence

from nngstream.errors import WireError

_IOV_MAX = 512
#: One TLS write: what it began to write counts as written when it fails, so this bounds what a dead consumer costs.
_TLS_WRITE = 256 * 1024
#: A dead host (no reset, no FIN) is noticed after about a minute: by the kernel while nothing is under way to it.
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT = 30, 10, 3
#: First byte of the kernel's TCP_INFO, while neither side has closed.
_ESTABLISHED = 1
#: What is in it of a peer's answers (linux/tcp.h): repeats and window probes without one, ms since the last one.
_ANSWERS = struct.Struct("=2xBB52xI")
#: One question may be lost, or just be under way: a reader that pauses never left more than one unanswered.
_UNANSWERED = 3
#: Where `tcpi_bytes_acked` is in it (linux/tcp.h, since Linux 4.1).
_BYTES_ACKED = struct.Struct("=120xQ")
#: Most payload in a TLS record, and more than any cipher of TLS 1.2 and 1.3 adds to it.
_RECORD, _RECORD_OVERHEAD = 16384, 96


class Stream:
    """A TCP or UNIX connection without encryption.

    Args:
        sock: connected; the stream owns it.
        address: the peer, for people.
    """

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        self.address = address
        #: Common name of the peer's certificate.
        self.subject: str | None = None
        self._interrupted = False
        #: After a failed `send`: bytes of that call that may have gone out all the same.
        self.uncertain = 0
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)

    @property
    def ipc(self) -> bool:
        """Whether it is a UNIX socket."""
        return self.sock.family == socket.AF_UNIX

    def send_buffer(self, nbytes: int) -> int:
        """Bound what may lie in the kernel, unread, towards the peer; returns what the kernel grants, in bytes."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def unanswered(self, seconds: float) -> bool:
        """Whether the peer's host has left our packets without any answer for so long; any thread may ask.

        TCP_USER_TIMEOUT would not do: since Linux 5.11 it also ends connections whose reader only pauses, although its
        kernel answers every window probe.
        """
        if self.ipc:
            return False
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ANSWERS.size)
        except OSError:
            return False  # closed meanwhile
        repeats, probes, quiet_ms = _ANSWERS.unpack(info)
        return bool(max(repeats, probes) >= _UNANSWERED and quiet_ms >= 1000 * seconds)

    # -- during the handshake

    def receive_exactly(self, size: int, deadline: float) -> bytes:
        """Read `size` bytes before the deadline (monotonic).

        Raises:
            WireError: the peer closed before.
            TimeoutError: the deadline passed.
        """
        data = bytearray()
        while len(data) < size:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise WireError(f"closed after {len(data)} of {size} bytes of its handshake" if data else "closed")
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(data)

    def send_greeting(self, data: bytes, deadline: float) -> None:
        """Write a few bytes before the deadline (monotonic).

        Raises:
            TimeoutError: the deadline passed.
        """
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        self.sock.sendall(data)

    def block(self) -> None:
        """End of the handshake: from now on calls wait as long as it takes."""
        self.sock.settimeout(None)

    # -- afterwards

    def receive_into(self, view: memoryview) -> int:
        """Wait for bytes; 0 at the end of the connection.

        Raises:
            OSError: the connection broke.
        """
        return self.sock.recv_into(view)

    def send(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Write as much as the kernel takes of `pieces` (at least one byte), waiting for room.

        Raises:
            OSError: the connection broke; nothing of this call was written.
        """
        if len(pieces) == 1:
            return self.sock.send(pieces[0])
        return self.sock.sendmsg(pieces[:_IOV_MAX])

    def send_now(self, data: bytes) -> None:
        """Write a few bytes if that is possible without waiting; a broken connection is noticed elsewhere.

        Nothing is written to a peer whose end has arrived: its kernel would answer with a reset.
        """
        with contextlib.suppress(OSError):
            if self.ipc or self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED:
                self.sock.send(data, socket.MSG_DONTWAIT)

    def receive_now(self) -> bytes | None:
        """What has come, without waiting; None when nothing has, b"" at the end of the connection."""
        try:
            return self.sock.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def acknowledged(self, written: int) -> int:
        """Of the first `written` bytes given to :meth:`send`, those the peer's kernel surely has, also after errors."""
        return written - self._unacknowledged()

    def _unacknowledged(self) -> int:
        """Bytes in our kernel that the peer's kernel has not taken yet; also after the connection broke."""
        if self.ipc:
            return 0  # what is written lies in the peer's socket at once
        answer = fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0\0\0\0")
        return int(struct.unpack("i", answer)[0])

    def end_sending(self) -> None:
        """Tell the peer that nothing more comes, after what was written.

        Raises:
            OSError: the connection broke.
        """
        self.sock.shutdown(socket.SHUT_WR)

    def linger(self, patience_s: float) -> None:
        """Wait until the peer has taken what was written, as far as one can see; call :meth:`end_sending` before.

        Ends when the peer closes, when everything has been acknowledged for a second, or when nothing more has been
        acknowledged for `patience_s`; the kernel goes on delivering after that. Closing while the peer still writes
        would make the kernel send a reset, which can overtake the last data.
        """
        left, progress = -1, time.monotonic()
        while True:
            now, before = time.monotonic(), left
            left = self._unacknowledged()
            if left != before:
                progress = now
            if now - progress > (patience_s if left else min(1.0, patience_s)) or self._interrupted:
                return
            self.sock.settimeout(0.05)
            try:
                if not self.sock.recv(4096):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def interrupt(self) -> None:
        """Let a thread that waits in this connection come back, with an error or an end."""
        self._interrupted = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket."""
        self.sock.close()


class TlsStream(Stream):
    """A connection with mutual TLS; the handshake of TLS must be done."""

    sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket, address: str) -> None:
        super().__init__(sock, address)
        self.subject = common_name(sock)
        self._before = 0  # encrypted bytes of this connection before the last write, at least

    def send(self, pieces: Sequence[bytes | memoryview]) -> int:
        """See :meth:`Stream.send`; small pieces are joined, since each write is a record of its own."""
        first = memoryview(pieces[0])
        if len(first) >= _TLS_WRITE // 2 or len(pieces) == 1:
            return self._send_one(first[:_TLS_WRITE])
        joined = bytearray()
        for piece in pieces:
            if len(joined) + len(piece) > _TLS_WRITE:
                break
            joined += piece
        return self._send_one(joined)

    def _send_one(self, data: bytearray | memoryview) -> int:
        # In this order: what is acknowledged between the two counts twice, and never too little.
        self._before = self._unacknowledged() + self._taken()
        try:
            return self.sock.send(data)
        except OSError:
            self.uncertain = len(data)
            raise

    def acknowledged(self, written: int) -> int:
        """See :meth:`Stream.acknowledged`; of a write that failed the peer may have taken a part, and read it."""
        known = super().acknowledged(written)
        if self.uncertain:
            beyond = self._taken() - self._before  # encrypted bytes of the write that failed, if it is positive
            if beyond > 0:
                beyond = max(0, beyond - _RECORD_OVERHEAD * -(-self.uncertain // _RECORD))
            known = max(known, written + min(beyond, self.uncertain))
        return known

    def _taken(self) -> int:
        """Encrypted bytes of this connection, handshake included, that the peer's kernel has taken."""
        return int(_BYTES_ACKED.unpack_from(self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))[0])

    def send_now(self, data: bytes) -> None:
        """Nothing: over TLS only our own buffers speak ZMTP, and they send no heartbeats."""

    def receive_now(self) -> bytes | None:
        """See :meth:`Stream.receive_now`."""
        self.sock.settimeout(0)
        try:
            return self.sock.recv(4096)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except OSError:
            return b""
        finally:
            self.sock.settimeout(None)

    def end_sending(self) -> None:
        """See :meth:`Stream.end_sending`."""
        # unwrap() would wait for the peer's close_notify; the FIN says the same after our last record.
        socket.socket.shutdown(self.sock, socket.SHUT_WR)


def let_read(sock: ssl.SSLSocket, patience_s: float = 1.0) -> None:
    """After a handshake that failed: let the peer read our alert, which says why, before the socket is closed.

    Closing while its first bytes are unread would make our kernel send a reset, which overtakes the alert.
    """
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not socket.socket.recv(sock, 4096):
                return


def common_name(sock: ssl.SSLSocket) -> str | None:
    """Whom the peer's verified certificate names, or None."""
    certificate = sock.getpeercert() or {}
    names: dict[str, str] = {}
    for entry in certificate.get("subject", ()):
        for pair in entry:
            if isinstance(pair, tuple) and len(pair) == 2:
                names[str(pair[0])] = str(pair[1])
    return names.get("commonName") or names.get("userId")
