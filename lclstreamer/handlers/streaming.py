"""The handler that sends messages to sinks over the network.

Who owns what: the main thread puts messages into one queue. Each connection has a thread that takes the next message
when its peer has taken the one before, so a slow sink gets fewer. In the role `client` there is a thread a URL, which
connects (again); in the role `server` a thread a URL accepts and starts a thread for each peer. A message of which the
kernel did not take everything cannot have been received: it goes to the next sink. No message is sent twice.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from lclstreamer.errors import ConnectError, HandlerError
from lclstreamer.events import Message
from lclstreamer.handlers.base import Handler, HandlerContext, MessageQueue
from lclstreamer.handlers.encryption import RefusedError, TlsConnection, context_for
from lclstreamer.handlers.wire import Address, Connection, WireError

log = logging.getLogger("lclstreamer")

_RETRY_S = (0.05, 1.0)
_HANDSHAKE_S = 10.0


class BinaryDataStreamingDataHandler(Handler):
    """Sends each message to one of the sinks that are connected."""

    def __init__(self, parameters: Any, context: HandlerContext) -> None:
        super().__init__(parameters, context)
        self._addresses = [Address.of(url) for url in parameters.urls]
        files = parameters.tls
        self._tls = None if files is None else context_for(files, server=parameters.role == "server")
        self._queue = MessageQueue(1 + len(self._addresses), context.stop)
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._connected = 0
        self._ever_connected = 0
        self._alone_since = time.monotonic()
        self._maybe_lost = 0
        self._deadline = 0.0
        self._last_error = ""
        self._listeners: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @property
    def name(self) -> str:
        """The handler and where it sends to."""
        return f"{self.parameters.library} {self.parameters.role} {' '.join(self.parameters.urls)}"

    # --------------------------------------------------------------------------------------------------- main thread

    def open(self) -> None:
        """Listen, or begin to connect.

        Raises:
            ConnectError: an address cannot be listened at, or its host is not known.
        """
        server = self.parameters.role == "server"
        if server:
            for address in self._addresses:
                self._listeners.append(_listen(address))
        else:
            for address in self._addresses:
                _check_host(address)
        # From now on: the data may have taken their time to open.
        self._alone_since = time.monotonic()
        for number, address in enumerate(self._addresses):
            if server:
                self._start(self._accept, self._listeners[number], address)
            else:
                self._start(self._keep_connected, address)

    def handle(self, message: Message) -> None:
        """Queue a message; waits while all sinks are busy.

        Raises:
            HandlerError: no sink came within `connect_timeout_s`, or none took anything for `send_timeout_s`.
        """
        self._check_alone()
        timeout = self.parameters.send_timeout_s
        why = f"{self.name}: the sink took nothing for {timeout:.0f} s (send_timeout_s)"
        self._queue.put(message, timeout, why)

    def close(self, *, drain: bool, timeout: float | None = None) -> None:
        """Wait until all messages have reached the other side, then close.

        Raises:
            HandlerError: some have not; the text says how many.
        """
        deadline = time.monotonic() + (self.parameters.drain_timeout_s if timeout is None else timeout)
        reached = True
        if drain and self._queue.error is None:
            # A buffer counts its producers: also a rank without a single message must have been there.
            self._wait_for_first_sink(deadline)
            reached = self._queue.wait_empty(deadline)
        self._deadline = deadline
        self._ending.set()
        left = self._queue.close()
        for listener in self._listeners:
            listener.close()
        for address in self._addresses:
            if self._listeners and address.family == socket.AF_UNIX:
                Path(str(address.name)).unlink(missing_ok=True)
        for thread in self._threads:
            thread.join(max(0.5, deadline + 1 - time.monotonic()))
        if self._queue.error is not None:
            raise self._queue.error
        left += self._queue.refused
        if drain and (left or not reached or self._maybe_lost):
            raise HandlerError(self._loss(left))

    def _loss(self, left: int) -> str:
        parts = []
        if left:
            parts.append(f"{left} messages were never taken by a sink")
        if self._maybe_lost:
            parts.append(
                f"up to {self._maybe_lost} messages were on their way to a sink that left or did not fetch them"
            )
        seen = "" if self._ever_connected else f"; no sink was ever connected{self._because()}"
        return f"{self.name}: {' and '.join(parts) or 'the last messages did not arrive in time'}{seen}"

    def _because(self) -> str:
        return f" ({self._last_error})" if self._last_error else ""

    def _wait_for_first_sink(self, deadline: float) -> None:
        if self.parameters.role == "server" and not len(self._queue):
            return
        while not self._ever_connected and time.monotonic() < deadline and self._queue.error is None:
            time.sleep(0.01)
        if not self._ever_connected and self._queue.error is None:
            self._queue.fail(self._no_sink())

    def _no_sink(self) -> HandlerError:
        seconds = time.monotonic() - self._alone_since
        what = "all sinks have left" if self._ever_connected else "no sink is there"
        listening = "listening at" if self.parameters.role == "server" else "connecting to"
        waiting = len(self._queue)
        unsent = f"; {waiting} messages are not sent" if waiting else ""
        return HandlerError(
            f"{listening} {' '.join(self.parameters.urls)}: {what} since {seconds:.0f} s{self._because()}{unsent}. "
            "Start the "
            f"sink first, or allow more time with connect_timeout_s (now {self.parameters.connect_timeout_s:g})"
        )

    # ------------------------------------------------------------------------------------------------------- threads

    def _start(self, function: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, name=f"sink-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _over(self) -> bool:
        return self._ending.is_set() or self._queue.error is not None

    def _check_alone(self) -> None:
        with self._lock:
            alone = not self._connected and time.monotonic() - self._alone_since > self.parameters.connect_timeout_s
        if alone and self._queue.error is None:
            self._queue.fail(self._no_sink())

    def _keep_connected(self, address: Address) -> None:
        pause = _RETRY_S[0]
        while not self._over():
            self._check_alone()
            try:
                sock = socket.socket(address.family, socket.SOCK_STREAM)
                sock.settimeout(2.0)
                try:
                    sock.connect(address.name)
                    connection = self._connection(sock, address)
                except BaseException:
                    sock.close()
                    raise
            except RefusedError as error:
                self._queue.fail(HandlerError(f"{address.url}: {error}"))
                return
            except OSError as error:
                self._last_error = error.strerror or str(error)
                if isinstance(error, WireError):
                    log.warning("%s: %s", address.url, error)
                self._ending.wait(pause)
                pause = min(2 * pause, _RETRY_S[1])
                continue
            pause = _RETRY_S[0]
            self._serve(connection, address.url)

    def _accept(self, listener: socket.socket, address: Address) -> None:
        while not self._over():
            self._check_alone()
            try:
                sock, peer = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self._start(self._greet, sock, address, f"{address.url} from {peer or 'a local process'}")

    def _greet(self, sock: socket.socket, address: Address, where: str) -> None:
        try:
            connection = self._connection(sock, address)
        except OSError as error:
            self._last_error = str(error)
            log.warning("%s: %s", where, error)
            return
        self._serve(connection, where)

    def _connection(self, sock: socket.socket, address: Address) -> Connection:
        if self._tls is None or not address.tls:
            return Connection(sock, self.parameters.library, _HANDSHAKE_S)
        host = None if self.parameters.role == "server" else str(address.name[0])
        return TlsConnection(sock, self.parameters.library, _HANDSHAKE_S, self._tls, host)

    def _serve(self, connection: Connection, where: str) -> None:
        """Send messages to one sink until it leaves or everything is over."""
        with self._lock:
            self._connected += 1
            self._ever_connected += 1
        log.info("sink connected: %s", where)
        flying = _InFlight()
        try:
            while not self._queue.closed and self._queue.error is None:
                message = self._queue.take()
                if flying.count:
                    flying.unconfirmed(connection.unconfirmed())
                try:
                    connection.listen()
                    if message is None:
                        continue
                    connection.send(message.parts, message.nbytes, self.parameters.send_timeout_s)
                except OSError:
                    if message is not None:
                        self._queue.give_back(message)
                    raise
                flying.sent(message.nbytes, connection.unconfirmed())
                self.messages += 1
                self.nbytes += message.nbytes
                self._queue.done(message)
            if self._queue.error is None and not connection.wait_confirmed(self._deadline):
                self._lost(
                    flying.unconfirmed(connection.unconfirmed()), where, "it did not fetch the last messages in time"
                )
        except TimeoutError as error:
            self._queue.fail(HandlerError(f"{where}: {error} (send_timeout_s)"))
        except OSError as error:
            self._last_error = error.strerror or str(error)
            self._lost(flying.count, where, f"it left: {self._last_error}")
        finally:
            connection.close()
            with self._lock:
                self._connected -= 1
                self._alone_since = time.monotonic()

    def _lost(self, count: int, where: str, why: str) -> None:
        with self._lock:
            self._maybe_lost += count
        if count:
            log.warning("sink %s: %s; up to %d messages on their way to it may be lost", where, why, count)
        elif not self._queue.closed:
            log.warning("sink %s: %s", where, why)


class _InFlight:
    """Which sent messages the other side's kernel may not have yet."""

    def __init__(self) -> None:
        self._ends: deque[int] = deque()
        self._total = 0

    @property
    def count(self) -> int:
        return len(self._ends)

    def sent(self, nbytes: int, unconfirmed: int) -> None:
        self._total += nbytes
        self._ends.append(self._total)
        self.unconfirmed(unconfirmed)

    def unconfirmed(self, nbytes: int) -> int:
        """Forget what has arrived when so many bytes have not; how many messages are left."""
        while self._ends and self._ends[0] <= self._total - nbytes:
            self._ends.popleft()
        return len(self._ends)


def _listen(address: Address) -> socket.socket:
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        if address.family == socket.AF_UNIX:
            _remove_stale(str(address.name))
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address.name)
        listener.listen(64)
        listener.settimeout(0.1)
    except OSError as error:
        listener.close()
        raise ConnectError(
            f"data_handlers.urls: cannot listen at {address.url}: {error.strerror or error}. Choose another address, "
            "or stop "
            "what uses this one"
        ) from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket file of a process that has gone; one that still listens is left, and binding fails."""
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


def _check_host(address: Address) -> None:
    if isinstance(address.name, str):
        return
    try:
        socket.getaddrinfo(*address.name, family=address.family, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConnectError(f"data_handlers.urls: {address.url}: the host is not known: {error.strerror}") from error
