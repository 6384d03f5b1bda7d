"""All connections of a buffer: one thread each, from the first byte to the last.

Ownership: the thread of a connection owns its socket, and frees it. Others reach it through :class:`Connections`, which
interrupts it, calls its seat, and joins its thread.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

from nngstream import route
from nngstream.config import BufferConfig
from nngstream.doorman import Doorman
from nngstream.errors import InterruptedWaitError, NotAllowedError, WireError
from nngstream.fifo import Fifo, Seat
from nngstream.handshake import HANDSHAKE_S, Greeted, Side, greet
from nngstream.inlet import EndedInsideMessageError, Inlet
from nngstream.memory import Memory
from nngstream.outlet import Outlet
from nngstream.peers import Peer, Register
from nngstream.stream import Stream, TlsStream, let_read
from nngstream.url import Address

log = logging.getLogger("nngstream")

#: More connections than this at once are turned away: each is a thread.
MAX_CONNECTIONS = 4096
#: A consumer whose host does not answer for so long is dead, in seconds.
UNANSWERED_S = 60.0
_DIAL_S = 5.0
#: What OpenSSL says of a peer with which our certificate cannot be used.
_UNKNOWN_KEY_TYPE = ("NO_SUITABLE_SIGNATURE_ALGORITHM", "NO_SHARED_CIPHER")
_P256 = "libnng's Mbed TLS knows no Ed25519, give this buffer a certificate with a P-256 key"
_BACKOFF_S = (0.05, 2.0)
#: How long a dialling buffer lets the other side speak first: at the beginning, and at most.
_SPEAK_AFTER_S = (0.5, 4.0)


@dataclass(eq=False)
class Connection:
    """One connection, from its accept or connect on."""

    side: Side
    sock: socket.socket | ssl.SSLSocket
    thread: threading.Thread = field(default_factory=threading.current_thread)
    inlet: Inlet | None = None
    stream: Stream | None = None
    seat: Seat | None = None
    why: str | None = None
    wanted: bool = True

    def interrupt(self, why: str) -> None:
        """Let its thread come back and end; only :meth:`Connections.interrupt` calls this."""
        self.why = self.why or why
        self.wanted = False
        with contextlib.suppress(OSError):
            # Not the method of SSLSocket, which would forget its encryption under the thread that uses it.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class Connections:
    """See the module.

    Args:
        config: options.
        memory: where messages lie.
        fifo: the queue.
        register: who is there.
        server_tls, client_tls: contexts for ``tls+tcp``.
        changed: set whenever somebody came or left.
    """

    def __init__(
        self,
        config: BufferConfig,
        memory: Memory,
        fifo: Fifo,
        register: Register,
        *,
        server_tls: ssl.SSLContext | None,
        client_tls: ssl.SSLContext | None,
        changed: threading.Event,
    ) -> None:
        self._config = config
        self._memory = memory
        self._fifo = fifo
        self._register = register
        self._server_tls = server_tls
        self._client_tls = client_tls
        self._changed = changed
        self._route = None if config.route is None else route.parse(config.route)
        #: Which group of consumers comes at which output address.
        self.groups: dict[Address, int] = {}
        self._lock = threading.Lock()
        self._all: set[Connection] = set()
        self._closed: set[Side] = set()
        self._dialers: list[threading.Thread] = []
        self._ended: dict[Side, threading.Event] = {"in": threading.Event(), "out": threading.Event()}
        self._ending = False
        self._told_send_buffer = False
        self.doorman = Doorman(self._welcome)

    # -- called by the buffer's thread

    def dial(self, address: Address, side: Side) -> None:
        """Connect to this address, and again whenever it breaks, until the side is closed."""
        thread = threading.Thread(target=self._dial, args=(address, side), name=f"dial {address}", daemon=True)
        self._dialers.append(thread)
        thread.start()

    def close_side(self, side: Side, why: str | None) -> None:
        """No more connections at this side; those there are interrupted when `why` is given."""
        with self._lock:
            self._closed.add(side)
        self._ended[side].set()
        self.doorman.shut(side)
        for connection in self._those(side):
            if why is not None or (connection.inlet is None and connection.seat is None):
                self.interrupt(connection, why or "the stream has ended")
        self._memory.wake()

    def end_consumers(self) -> None:
        """Everything has been sent: tell the consumers the end."""
        self._ending = True
        with self._lock:
            self._closed.add("out")
        self._ended["out"].set()
        for connection in self._those("out"):
            if connection.seat is not None:
                self._fifo.call(connection.seat)
            else:
                self.interrupt(connection, "the stream has ended")

    def interrupt(self, connection: Connection, why: str) -> None:
        """Cut one off."""
        with self._lock:
            # A socket that is closed meanwhile may have given its number to somebody else.
            if connection in self._all:
                connection.interrupt(why)

    def interrupt_all(self, why: str) -> None:
        """Cut everybody off."""
        for side in self._ended:
            self.close_side(side, why)

    def join(self, side: Side, timeout_s: float) -> bool:
        """Wait until no connection of this side is left; says whether that is so."""
        deadline = time.monotonic() + timeout_s
        for connection in self._those(side):
            connection.thread.join(max(0.0, deadline - time.monotonic()))
        return not self._those(side)

    def count(self, side: Side) -> int:
        """Connections of this side, with those that have not finished their handshake."""
        return len(self._those(side))

    def cut_silent(self, now: float) -> None:
        """Cut off producers that are silent in the middle of a message for too long, and consumers on dead hosts."""
        for connection in self._those("in"):
            since = connection.inlet.silent_since if connection.inlet else None
            if since is not None and now - since > self._config.silence:
                self.interrupt(connection, f"silent for {self._config.silence:g} s in the middle of a message")
        for connection in self._those("out"):
            if connection.stream is not None and connection.stream.unanswered(UNANSWERED_S):
                self.interrupt(connection, f"its host has not answered for {UNANSWERED_S:g} s")

    def close(self) -> None:
        """Free what is left; everybody must have been interrupted or ended before."""
        for event in self._ended.values():
            event.set()
        self.doorman.close()
        for thread in self._dialers:
            thread.join(_DIAL_S + 1)

    # -- called by the doorman

    def _welcome(self, sock: socket.socket, where: str, side: Side, address: Address) -> None:
        connection = Connection(side, sock)
        connection.thread = threading.Thread(
            target=self._run, args=(connection, where, address), name=f"{side} {where}", daemon=True
        )
        try:
            entered = self._enter(connection, connection.thread)
        except RuntimeError as error:
            log.error("%s: no thread for %s: %s", address, where, error)
            entered = False
        if not entered:
            sock.close()

    # -- threads of connections

    def _dial(self, address: Address, side: Side) -> None:
        ended, pause, speak_after = self._ended[side], _BACKOFF_S[0], _SPEAK_AFTER_S[0]
        said = ""
        while not ended.is_set():
            try:
                sock = _connect(address)
            except OSError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("%s: cannot connect: %s; trying again", address, error.strerror or error)
            else:
                said = ""
                connection = Connection(side, sock)
                if not self._enter(connection):
                    sock.close()
                elif self._run(connection, str(address), address, speak_after_s=speak_after):
                    pause, speak_after = _BACKOFF_S[0], _SPEAK_AFTER_S[0]
                else:
                    speak_after = min(2 * speak_after, _SPEAK_AFTER_S[1])
            ended.wait(pause)
            pause = min(2 * pause, _BACKOFF_S[1])

    def _run(self, connection: Connection, where: str, address: Address, *, speak_after_s: float | None = None) -> bool:
        """Serve one connection to its end; says whether it got past the handshake."""
        try:
            try:
                stream, greeted = self._open(connection, where, address, speak_after_s)
            except (OSError, WireError) as error:
                if isinstance(error, NotAllowedError):
                    return self._deny(connection, where, error)
                return self._refuse(connection, where, str(error))
            self._serve(connection, stream, Peer(connection.side, greeted, stream), address)
            return True
        except Exception:
            log.exception("%s: error while serving %s", address, where)
            return False
        finally:
            self._exit(connection)

    def _open(
        self, connection: Connection, where: str, address: Address, speak_after_s: float | None
    ) -> tuple[Stream, Greeted]:
        if address.tls:
            context = self._client_tls if address.dial else self._server_tls
            assert context is not None
            connection.sock.settimeout(HANDSHAKE_S)
            connection.sock = context.wrap_socket(
                connection.sock,
                server_side=not address.dial,
                server_hostname=address.host.strip("[]") if address.dial else None,
                do_handshake_on_connect=False,  # while it lasts, the connection must be one that can be interrupted
            )
            try:
                connection.sock.do_handshake()
            except ssl.SSLError as error:
                let_read(connection.sock)
                if error.reason in _UNKNOWN_KEY_TYPE:
                    raise WireError(f"knows no keys of our certificate's kind: {_P256} ({error.reason})") from error
                raise
            allowed = self._config.tls.allowed(connection.side) if self._config.tls is not None else None
            if allowed is not None:
                from nngstream.access import admit  # here: a buffer without lists starts faster without x509

                admit(connection.sock, connection.side, allowed)
            stream: Stream = TlsStream(connection.sock, where)
        else:
            stream = Stream(connection.sock, where)
        return stream, greet(stream, connection.side, self._config.name, speak_after_s=speak_after_s)

    def _serve(self, connection: Connection, stream: Stream, peer: Peer, address: Address) -> None:
        log.info("%s: %s %s connected", address, peer.greeted.protocol, _who(peer))
        why = "closed"
        try:
            if connection.side == "in":
                self._serve_producer(connection, stream, peer)
            else:
                why = self._serve_consumer(connection, stream, peer, self.groups.get(address, 0))
        except WireError as error:
            why = connection.why or str(error)
            if not isinstance(error, EndedInsideMessageError):
                self._refuse(connection, stream.address, why)
        except (InterruptedWaitError, OSError) as error:
            why = connection.why or str(error)
        if peer.ended is None:
            self._register.left(peer, why)
        amount = f"{peer.messages} messages, {peer.bytes} bytes"
        lost = f", {peer.lost_messages} messages lost" if peer.lost_messages else ""
        log.info("%s: %s %s: %s; %s%s", address, peer.greeted.protocol, _who(peer), why, amount, lost)

    def _serve_producer(self, connection: Connection, stream: Stream, peer: Peer) -> None:
        connection.inlet = Inlet(stream, peer, self._memory, self._fifo, lambda: connection.wanted, route=self._route)
        if not self._register.came(peer):
            raise InterruptedWaitError("the stream has ended")
        self._changed.set()
        connection.inlet.run()

    def _serve_consumer(self, connection: Connection, stream: Stream, peer: Peer, group: int) -> str:
        connection.stream = stream
        connection.seat = seat = Seat(group)
        outlet = Outlet(
            stream,
            peer,
            self._fifo,
            seat,
            sentinel=self._config.sentinel,
            ending=lambda: self._ending,
            kernel_bytes=self._send_buffer(stream),
        )
        self._register.came(peer)
        self.doorman.watch(stream.sock, lambda: self._fifo.call(seat))
        if self._ending or not connection.wanted:
            self._fifo.call(seat)
        try:
            return outlet.run(lambda: self.doorman.watch_again(stream.sock))
        finally:
            self.doorman.forget(stream.sock)

    def _send_buffer(self, stream: Stream) -> int:
        """Bound what lies in the kernel towards a consumer; a cap of the kernel, which is silent, is told once."""
        wanted = self._config.send_buffer
        granted = stream.send_buffer(wanted)
        # Linux doubles what it grants. The default is more than an untouched kernel grants: nobody asked for that much.
        asked = "send_buffer" in self._config.model_fields_set
        if asked and granted // 2 < wanted and not self._told_send_buffer:
            self._told_send_buffer = True
            log.warning(
                "send_buffer: %d bytes are wanted, the kernel grants %d: over a long distance that bounds the rate; "
                "ask for less, or let root do `sysctl -w net.core.wmem_max=%d`",
                wanted,
                granted // 2,
                wanted,
            )
        return granted

    def _refuse(self, connection: Connection, where: str, why: str) -> bool:
        if connection.wanted:
            self._register.refuse(where, why)
            log.warning("%s refused: %s", where, why)
        return False

    def _deny(self, connection: Connection, where: str, error: NotAllowedError) -> bool:
        if connection.wanted:
            times = self._register.deny(connection.side, where, error)
            if times & (times - 1) == 0:  # libnng comes again ten times a second, for hours
                log.warning("%s refused: %s; %d times so far", where, error, times)
            if isinstance(connection.sock, ssl.SSLSocket):
                let_read(connection.sock)
        return False

    def _enter(self, connection: Connection, thread: threading.Thread | None = None) -> bool:
        with self._lock:
            if connection.side in self._closed:
                return False
            if len(self._all) >= MAX_CONNECTIONS:
                self._register.refuse("", f"{MAX_CONNECTIONS} connections are there already")
                return False
            if thread is not None:
                thread.start()  # under the lock: whoever finds the connection may join its thread
            self._all.add(connection)
            return True

    def _exit(self, connection: Connection) -> None:
        with self._lock:
            self._all.discard(connection)
            connection.sock.close()
        self._changed.set()

    def _those(self, side: Side) -> list[Connection]:
        with self._lock:
            return [each for each in self._all if each.side == side]


def _connect(address: Address) -> socket.socket:
    if address.scheme != "ipc":
        return socket.create_connection((address.host.strip("[]"), address.port), timeout=_DIAL_S)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_DIAL_S)
        sock.connect(address.path)
    except OSError:
        sock.close()
        raise
    return sock


def _who(peer: Peer) -> str:
    what = "producer" if peer.side == "in" else "consumer"
    return f"{what} {peer.address}" + (f" ({peer.subject})" if peer.subject else "")
