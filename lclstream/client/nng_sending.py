"""The sending end of an NNG stream.

Who owns what: every connection belongs to one thread, which makes it (again, if it breaks), writes it, stays until the
peer's machine has everything, and ends with it. Writers take from one bounded outbox. The caller's thread owns
everything else, and ``close`` or ``abort`` ends every thread.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence

from lclstream.client import sp
from lclstream.client.address import Address
from lclstream.client.errors import BrokenStream, NoPeerError, StreamError, StreamTimeout
from lclstream.client.statistics import Statistics

_JOIN_S = 10.0


class _Outbox:
    """Messages on their way from the caller to the writers; bounded, first in first out."""

    def __init__(self, places: int) -> None:
        self._items: deque[bytes] = deque()
        self._places = places
        self._changed = threading.Condition()
        self._finished = False
        self._aborted = False

    def put(self, item: bytes, timeout: float) -> bool:
        """False when there was no place in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._items) < self._places, timeout):
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def put_back(self, item: bytes) -> None:
        """A message of which nothing was sent goes to the next writer."""
        with self._changed:
            self._items.appendleft(item)
            self._changed.notify_all()

    def take(self, timeout: float) -> bytes | None:
        """The next message; None when there is none in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self.over, timeout) or not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sent."""
        return self._aborted or (self._finished and not self._items)

    def finish(self) -> None:
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def abort(self) -> int:
        """Drop everything; returns how many messages that were."""
        with self._changed:
            dropped = len(self._items)
            self._items.clear()
            self._aborted = True
            self._changed.notify_all()
            return dropped

    def __len__(self) -> int:
        return len(self._items)


class NngSender:
    """Pushes to pullers, dialling them or listening for them.

    Arguments as of :class:`lclstream.client.nng_receiving.NngReceiver`.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        listen: bool,
        connections: int,
        queue_messages: int,
        connect_timeout_s: float,
        reconnect_s: float,
        statistics: Statistics,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._addresses = addresses
        self._listen = listen
        self._each = connections
        self._connect_timeout_s = connect_timeout_s
        self._reconnect_s = reconnect_s
        self._statistics = statistics
        self._tls = tls
        self._outbox = _Outbox(queue_messages)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: list[sp.Connection] = []
        self._threads: list[threading.Thread] = []
        self._listeners: list[sp.Listener] = []
        self._started = 0
        self._alive = 0
        self._left: list[str] = []
        self._incomplete: list[str] = []
        self._deadline = 0.0

    @property
    def urls(self) -> list[str]:
        """Where we listen (with the real ports) or dial."""
        return [str(each.address) for each in self._listeners] or [str(address) for address in self._addresses]

    def open(self) -> None:
        """Connect, or start to listen; raises as :meth:`lclstream.client.nng_receiving.NngReceiver.open`."""
        self._deadline = time.monotonic() + self._connect_timeout_s
        try:
            for address in self._addresses:
                if self._listen:
                    self._listeners.append(
                        sp.Listener(
                            address, protocol=sp.PUSH, peer_protocol=sp.PULL, accepted=self._begin, tls=self._tls
                        )
                    )
                    continue
                for _ in range(self._each):
                    self._begin(self._dial(address, self._deadline), address)
        except BaseException:
            self.abort()
            raise

    def _dial(self, address: Address, deadline: float) -> sp.Connection:
        return sp.dial(
            address,
            protocol=sp.PUSH,
            peer_protocol=sp.PULL,
            deadline=deadline,
            closing=self._closing,
            tls=self._tls,
        )

    def _begin(self, connection: sp.Connection, address: Address | None = None) -> None:
        with self._lock:
            if self._closing.is_set() or self._outbox.over:
                connection.close()
                return
            self._started += 1
            self._alive += 1
            self._statistics.connections += 1
            self._connections.append(connection)
            thread = threading.Thread(
                target=self._write, args=(connection, address), name=f"push {connection.name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _write(self, connection: sp.Connection, address: Address | None) -> None:
        current: sp.Connection | None = connection
        try:
            while current is not None and not self._outbox.over:
                try:
                    self._write_all(current)
                except sp.CutOffError as error:
                    self._forget(current)
                    current = self._replacement(address, str(error))
            if current is not None:
                self._depart(current)
        finally:
            with self._lock:
                self._alive -= 1

    def _write_all(self, connection: sp.Connection) -> None:
        while not self._outbox.over:
            message = self._outbox.take(1.0)
            if connection.ended_by_peer():
                if message is not None:
                    self._outbox.put_back(message)
                if connection.failure() or connection.unsent():
                    with self._lock:
                        self._incomplete.append(f"{connection.name} left before it had everything sent to it")
                raise sp.CutOffError(f"{connection.name} has left", inside=False)
            if message is None:
                continue
            try:
                connection.send(message)
            except sp.CutOffError as error:
                with self._lock:
                    self._incomplete.append(str(error))
                    self._statistics.lost += 1  # some of it may have arrived: giving it to another could be twice
                raise

    def _replacement(self, address: Address | None, reason: str) -> sp.Connection | None:
        if address is None or not self._reconnect_s or self._closing.is_set():
            with self._lock:
                self._left.append(reason)
            return None
        try:
            connection = self._dial(address, time.monotonic() + self._reconnect_s)
        except StreamError as error:
            with self._lock:
                self._left.append(f"{reason}; then {error}")
            return None
        with self._lock:
            self._statistics.reconnects += 1
            self._connections.append(connection)
            if self._closing.is_set():
                connection.stop()
        return connection

    def _forget(self, connection: sp.Connection) -> None:
        with self._lock:
            if connection in self._connections:
                self._connections.remove(connection)
                connection.close()

    def _depart(self, connection: sp.Connection) -> None:
        """Say the end and stay until the peer's machine has everything: NNG keeps nothing after a close."""
        connection.finish()
        failure = ""
        while not self._closing.is_set() and not (failure := connection.failure()) and connection.unsent():
            self._closing.wait(0.005)
        if failure:
            with self._lock:
                self._incomplete.append(f"{connection.name}: {failure} before all data had left")
        self._forget(connection)

    def send(self, message: bytes, timeout_s: float) -> None:
        """Hand over one message; waits while the peers are busy.

        Raises:
            NoPeerError: listening, and nobody has come in time.
            BrokenStream: every connection has broken.
            StreamTimeout: nobody took it for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                broken = self._started and not self._alive and not self._listen
                left = "; ".join(self._left)
            if broken:
                raise BrokenStream(f"nobody is left to send to: {left}")
            if self._outbox.put(message, min(1.0, max(0.0, deadline - time.monotonic()))):
                return
            now = time.monotonic()
            if not self._started and now > max(deadline, self._deadline):
                rejected = "; ".join(each.rejected for each in self._listeners if each.rejected)
                raise NoPeerError(
                    f"nobody connected to {', '.join(self.urls)} to take messages"
                    + (f" ({rejected})" if rejected else "")
                )
            if self._started and now > deadline:
                raise StreamTimeout(f"nobody at {', '.join(self.urls)} took a message for {timeout_s:g} s")

    def close(self, timeout_s: float) -> None:
        """Wait until everything has left, at most `timeout_s`, then end all connections.

        Raises:
            StreamTimeout: some messages have not left in time; they are dropped and counted as lost.
            BrokenStream: a connection broke before all its data had left.
        """
        deadline = time.monotonic() + timeout_s
        self._outbox.finish()
        while time.monotonic() < deadline:
            with self._lock:
                alive = self._alive
            if not alive and (not self._listen or not len(self._outbox)):
                break
            self._closing.wait(0.005)
        with self._lock:
            late, cut = self._alive, list(self._incomplete)
            broken = cut or ([] if late else list(self._left))
        dropped = self.abort()
        if cut or (dropped and broken):
            raise BrokenStream(f"{self._statistics.lost} messages are lost: {'; '.join(broken)}")
        if dropped or late:
            raise StreamTimeout(
                f"after {timeout_s:g} s {dropped} messages had not been taken and "
                f"{late} connections still had data on the way to {', '.join(self.urls)}"
            )

    def abort(self) -> int:
        """End everything now; returns how many messages were dropped (they are counted as lost)."""
        dropped = self._outbox.abort()
        self._statistics.lost += dropped
        self._closing.set()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            for connection in self._connections:
                connection.stop()
            threads = list(self._threads)
        deadline = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
        return dropped
