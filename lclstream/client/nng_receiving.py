"""The receiving end of an NNG stream.

Who owns what: every connection belongs to one thread, which makes it (again, if it breaks), reads it, and ends with it.
Readers put what they got into one bounded queue, so a connection's end comes behind its last message and a slow caller
holds back the senders. The caller's thread owns everything else, and ``close`` ends every thread.
"""

from __future__ import annotations

import queue
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lclstream.client import sp
from lclstream.client.address import Address
from lclstream.client.errors import BrokenStream, NoPeerError, StreamError, StreamTimeout
from lclstream.client.statistics import Statistics

#: Seconds a listening puller waits, after its last pusher left, for another one that is still starting.
GRACE_S = 0.5
_JOIN_S = 10.0


@dataclass(frozen=True)
class _End:
    """A reader has ended: by the peer's wish, or by `error`."""

    error: str = ""
    lost: int = 0


@dataclass(frozen=True)
class _Again:
    """A reader has connected again after its connection broke."""

    lost: int


class NngReceiver:
    """Pulls from pushers, dialling them or listening for them.

    Args:
        addresses: dialled, or listened at.
        listen: which of the two.
        connections: connections to each address when dialling.
        producers: pushers that must have come before the stream can be over, when listening.
        prefetch: messages held for the caller, at most.
        connect_timeout_s: bound on waiting for the (first) peer.
        reconnect_s: how long a broken connection is dialled again; 0 gives up at once.
        statistics: where connections and losses are counted.
        tls: context for ``tls+tcp``.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        listen: bool,
        connections: int,
        producers: int,
        prefetch: int,
        connect_timeout_s: float,
        reconnect_s: float,
        statistics: Statistics,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._addresses = addresses
        self._listen = listen
        self._each = connections
        self._producers = producers
        self._connect_timeout_s = connect_timeout_s
        self._reconnect_s = reconnect_s
        self._statistics = statistics
        self._tls = tls
        self._queue: queue.Queue[bytes | _End | _Again] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: list[sp.Connection] = []
        self._threads: list[threading.Thread] = []
        self._listeners: list[sp.Listener] = []
        self._started = 0
        self._ended = 0
        self._errors: list[str] = []
        self._deadline = 0.0

    @property
    def urls(self) -> list[str]:
        """Where we listen (with the real ports) or dial."""
        return [str(each.address) for each in self._listeners] or [str(address) for address in self._addresses]

    def open(self) -> None:
        """Connect, or start to listen.

        Raises:
            NoPeerError: a dialled address did not answer in time.
            WrongPeerError: what answered is no pusher.
            ListenError: the address cannot be listened at.
        """
        self._deadline = time.monotonic() + self._connect_timeout_s
        try:
            for address in self._addresses:
                if self._listen:
                    self._listeners.append(
                        sp.Listener(
                            address, protocol=sp.PULL, peer_protocol=sp.PUSH, accepted=self._begin, tls=self._tls
                        )
                    )
                    continue
                for _ in range(self._each):
                    self._begin(self._dial(address, self._deadline), address)
        except BaseException:
            self.close()
            raise

    def _dial(self, address: Address, deadline: float) -> sp.Connection:
        return sp.dial(
            address,
            protocol=sp.PULL,
            peer_protocol=sp.PUSH,
            deadline=deadline,
            closing=self._closing,
            tls=self._tls,
        )

    def _begin(self, connection: sp.Connection, address: Address | None = None) -> None:
        with self._lock:
            if self._closing.is_set():
                connection.close()
                return
            self._started += 1
            self._statistics.connections += 1
            self._connections.append(connection)
            thread = threading.Thread(
                target=self._read, args=(connection, address), name=f"pull {connection.name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _read(self, connection: sp.Connection, address: Address | None) -> None:
        while True:
            try:
                while (message := connection.receive()) is not None:
                    self._queue.put(message)
            except sp.CutOffError as error:
                self._forget(connection)
                if address is None or not self._reconnect_s or self._closing.is_set():
                    self._queue.put(_End(str(error), lost=int(error.inside)))
                    return
                try:
                    connection = self._dial(address, time.monotonic() + self._reconnect_s)
                except StreamError as again:
                    self._queue.put(_End(f"{error}; then {again}", lost=int(error.inside)))
                    return
                with self._lock:
                    self._connections.append(connection)
                    if self._closing.is_set():
                        connection.stop()
                self._queue.put(_Again(lost=int(error.inside)))
            else:
                self._forget(connection)
                self._queue.put(_End())
                return

    def _forget(self, connection: sp.Connection) -> None:
        with self._lock:
            if connection in self._connections:
                self._connections.remove(connection)
                connection.close()

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None at the end of the stream.

        Raises:
            StreamTimeout: no message for `timeout_s`.
            NoPeerError: listening, and nobody came in time.
            BrokenStream: all connections have ended and at least one of them broke.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._is_over():
                if self._errors:
                    count = f"{len(self._errors)} of {self._started} connections broke"
                    raise BrokenStream(f"{count}: {'; '.join(self._errors)}")
                return None
            item = self._next(deadline, timeout_s)
            if isinstance(item, bytes):
                return item
            if item is not None:
                self._statistics.lost += item.lost
            if isinstance(item, _Again):
                self._statistics.reconnects += 1
            elif isinstance(item, _End):
                self._ended += 1
                if item.error:
                    self._errors.append(item.error)

    def _is_over(self) -> bool:
        if not self._listen:
            return self._ended == self._started
        if self._ended < self._started or self._started < self._producers:
            return False
        grace = time.monotonic() + GRACE_S
        while time.monotonic() < grace:
            if self._started > self._ended or not self._queue.empty():
                return False
            time.sleep(0.01)
        for listener in self._listeners:
            listener.close()  # who comes now finds nobody, rather than somebody who does not read
        with self._lock:
            return self._started == self._ended and self._queue.empty()

    def _next(self, deadline: float, timeout_s: float) -> bytes | _End | _Again | None:
        nobody = self._started < self._producers if self._listen else False
        if nobody:
            deadline = max(self._deadline, deadline) if self._started else self._deadline
        try:
            # In slices while peers may still come: a new peer changes which bound holds.
            left = deadline - time.monotonic()
            return self._queue.get(timeout=max(0.0, min(left, 0.1) if nobody else left))
        except queue.Empty:
            if time.monotonic() < deadline:
                return None
        if not self._started:
            rejected = "; ".join(each.rejected for each in self._listeners if each.rejected)
            raise NoPeerError(
                f"nobody connected to {', '.join(self.urls)} within {self._connect_timeout_s:g} s"
                + (f" ({rejected})" if rejected else "")
            ) from None
        raise StreamTimeout(f"no message from {', '.join(self.urls)} for {timeout_s:g} s; the peer is still connected")

    def close(self) -> None:
        """End all connections and threads."""
        self._closing.set()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            for connection in self._connections:
                connection.stop()
            threads = list(self._threads)
        deadline = time.monotonic() + _JOIN_S
        for thread in threads:
            while thread.is_alive() and time.monotonic() < deadline:
                self._drop_queue()  # a reader may be waiting to put
                thread.join(0.01)
        self._drop_queue()
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def _drop_queue(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            return
