"""The two ends of a ZeroMQ stream, on libzmq.

Everything here runs in the caller's thread; libzmq's own thread moves the bytes and connects again with growing
pauses. The end of a stream is an empty message (the sentinel of `nngstream --sentinel`), or that the peer has gone.
libzmq says *disconnected* before the last messages are read, so a connection counts as ended only when nothing has come
for a moment after that. When dialling, each connection has a socket of its own: a sentinel then belongs to one peer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from lclstream.client.address import Address
from lclstream.client.errors import (
    AddressError,
    BrokenStream,
    ListenError,
    NoPeerError,
    StreamTimeout,
    WrongPeerError,
)
from lclstream.client.statistics import Statistics

#: Seconds without a message after which a connection that has closed counts as read to its end.
DRAINED_S = 0.25
_RECONNECT_MS = (100, 5000)
#: In seconds, as at the buffer.
_KEEPALIVE = {
    int(zmq.TCP_KEEPALIVE): 1,
    int(zmq.TCP_KEEPALIVE_IDLE): 30,
    int(zmq.TCP_KEEPALIVE_INTVL): 10,
    int(zmq.TCP_KEEPALIVE_CNT): 3,
}
_SLICE_MS, _DRAINING_MS = 250, 50
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED


def _url(address: Address, listen: bool) -> str:
    if address.tls:
        raise AddressError(f"{address}: ZeroMQ has no TLS; use library nng for an encrypted stream")
    if listen and address.scheme == "tcp" and address.port == 0:
        return f"tcp://{address.host}:*"
    return str(address)


@dataclass
class _Link:
    """One socket with its monitor, and what is known of its peers."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    url: str
    came: int = 0
    gone: int = 0
    failed: int = 0
    failures: int = 0
    sentinels: int = 0
    gone_at: float = 0.0
    over: bool = False

    def watch(self) -> None:
        """Take in what the monitor says."""
        from zmq.utils.monitor import recv_monitor_message

        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.came += 1
            elif event & _FAILED:
                self.failed += 1
                self.failures += 1
            elif event == zmq.EVENT_DISCONNECTED:
                if self.failed:
                    self.failed -= 1  # the end of a connection that never was a peer
                else:
                    self.gone += 1
                    self.gone_at = time.monotonic()

    @property
    def alone(self) -> bool:
        """Whether every peer that came has gone."""
        return self.came <= self.gone


def _link(context: zmq.Context[Any], kind: int, address: Address, *, listen: bool, options: dict[int, int]) -> _Link:
    socket = context.socket(kind)
    monitor: zmq.Socket[bytes] | None = None
    try:
        for option, value in options.items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS[0])
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1])
        # A machine that vanished never closes its connections: TCP finds out within a minute. ZeroMQ's own heartbeats
        # would lose data: a reader that pauses with a full queue never sees the answer to its own, and ends a healthy
        # connection; and an answer that meets a sender which has closed makes its kernel drop what had not left.
        for option, value in _KEEPALIVE.items():
            socket.setsockopt(option, value)
        if ":" in address.host:
            socket.setsockopt(zmq.IPV6, 1)
        monitor = socket.get_monitor_socket(_EVENTS)
        try:
            if listen:
                socket.bind(_url(address, listen))
            else:
                socket.connect(_url(address, listen))
        except zmq.ZMQError as error:
            raise (ListenError if listen else AddressError)(f"{address}: {error}") from error
        return _Link(socket, monitor, socket.getsockopt_string(zmq.LAST_ENDPOINT) if listen else str(address))
    except BaseException:
        _close_link(socket, monitor, 0)
        raise


def _close_link(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes] | None, linger_ms: int) -> None:
    socket.disable_monitor()
    if monitor is not None:
        monitor.close(linger=0)  # an open monitor would keep the context from ending
    socket.close(linger=linger_ms)


def _await_peers(links: Sequence[_Link], deadline: float, waited_s: float) -> None:
    """Wait until every dialled link has met its peer."""
    poller = zmq.Poller()
    for link in links:
        poller.register(link.monitor, zmq.POLLIN)
    while missing := [link for link in links if not link.came]:
        left = deadline - time.monotonic()
        if left <= 0:
            refused = [link.url for link in missing if link.failures]
            if refused:
                raise WrongPeerError(f"{', '.join(refused)} does not speak ZeroMQ, or is no peer: use library nng?")
            raise NoPeerError(
                f"{', '.join(link.url for link in missing)}: nobody to connect to for {waited_s:.1f} s; "
                "is the stream already over?"
            )
        poller.poll(min(int(left * 1000) + 1, _SLICE_MS))
        for link in links:
            link.watch()


class ZmqReceiver:
    """Pulls from ZeroMQ pushers; arguments as of :class:`lclstream.client.nng_receiving.NngReceiver`.

    Args:
        sentinel: whether the stream must end by an empty message; a peer that goes without one is then a broken
            stream, or, within `reconnect_s`, one that restarts.
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
        sentinel: bool,
        statistics: Statistics,
    ) -> None:
        self._addresses = addresses
        self._listen = listen
        self._each = connections
        self._producers = producers
        self._prefetch = prefetch
        self._connect_timeout_s = connect_timeout_s
        self._reconnect_s = reconnect_s
        self._sentinel = sentinel
        self._statistics = statistics
        self._context: zmq.Context[Any] | None = None
        self._links: list[_Link] = []
        self._poller = zmq.Poller()
        self._errors: list[str] = []
        self._deadline = 0.0

    @property
    def urls(self) -> list[str]:
        """Where we listen (with the real ports) or dial."""
        return [link.url for link in self._links] or [str(address) for address in self._addresses]

    def open(self) -> None:
        """Connect, or start to listen; raises as :meth:`lclstream.client.nng_receiving.NngReceiver.open`."""
        self._deadline = time.monotonic() + self._connect_timeout_s
        self._context = zmq.Context()
        try:
            for address in self._addresses:
                for _ in range(1 if self._listen else self._each):
                    options = {int(zmq.RCVHWM): self._prefetch, int(zmq.LINGER): 0}
                    link = _link(self._context, zmq.PULL, address, listen=self._listen, options=options)
                    self._links.append(link)
                    self._poller.register(link.socket, zmq.POLLIN)
                    self._poller.register(link.monitor, zmq.POLLIN)
            if not self._listen:
                _await_peers(self._links, self._deadline, self._connect_timeout_s)
                self._statistics.connections = len(self._links)
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message (the parts of a multipart message joined), or None at the end of the stream.

        Raises:
            StreamTimeout: no message for `timeout_s`.
            NoPeerError: listening, and nobody came in time.
            BrokenStream: all peers have gone, and one without the sentinel it should have sent.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for link in self._links:
                if not link.over and (message := self._try(link)) is not None:
                    return message
            for link in self._links:
                if not link.over:
                    self._judge(link)
            if all(link.over for link in self._links):
                if self._errors:
                    raise BrokenStream("; ".join(self._errors))
                return None
            self._check_bounds(deadline, timeout_s)
            pending = any(link.alone and link.came for link in self._links if not link.over)
            left_ms = int(max(0.0, deadline - time.monotonic()) * 1000) + 1
            self._poller.poll(min(left_ms, _DRAINING_MS if pending else _SLICE_MS))

    def _try(self, link: _Link) -> bytes | None:
        """A message of this link that is there already."""
        while True:
            try:
                parts = link.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            link.gone_at = time.monotonic() if link.gone_at else 0.0
            if parts == [b""]:
                link.sentinels += 1
                continue
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def _judge(self, link: _Link) -> None:
        """Whether this link has ended, and how."""
        before = link.came
        link.watch()
        if self._listen:
            self._statistics.connections += link.came - before
        elif link.came > before:
            self._statistics.reconnects += link.came - before
        expected = max(link.came, self._producers) if self._listen else 1
        if link.sentinels >= expected:
            self._end(link)
            return
        if not link.came or not link.alone or link.came < expected:
            return
        quiet = time.monotonic() - link.gone_at
        if not self._sentinel:
            if quiet >= DRAINED_S:
                self._end(link)
        elif quiet >= max(DRAINED_S, self._reconnect_s):
            self._errors.append(f"{link.url}: the peer has gone without an end-of-stream message")
            self._end(link)

    def _end(self, link: _Link) -> None:
        link.over = True
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        _close_link(link.socket, link.monitor, 0)

    def _check_bounds(self, deadline: float, timeout_s: float) -> None:
        now = time.monotonic()
        came = sum(link.came for link in self._links)
        if not came and now > self._deadline:
            failures = any(link.failures for link in self._links)
            raise NoPeerError(
                f"nobody connected to {', '.join(self.urls)} within {self._connect_timeout_s:g} s"
                + (" (somebody tried who does not speak ZeroMQ)" if failures else "")
            )
        if came and now > deadline:
            raise StreamTimeout(f"no message from {', '.join(self.urls)} for {timeout_s:g} s")

    def close(self) -> None:
        """End all connections."""
        for link in self._links:
            if not link.over:
                self._end(link)
        if self._context is not None:
            self._context.term()
            self._context = None


class ZmqSender:
    """Pushes to ZeroMQ pullers; arguments as of :class:`lclstream.client.nng_sending.NngSender`."""

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
    ) -> None:
        self._addresses = addresses
        self._listen = listen
        self._each = connections
        self._places = queue_messages
        self._connect_timeout_s = connect_timeout_s
        self._reconnect_s = reconnect_s
        self._statistics = statistics
        self._context: zmq.Context[Any] | None = None
        self._links: list[_Link] = []
        self._next = 0
        self._deadline = 0.0

    @property
    def urls(self) -> list[str]:
        """Where we listen (with the real ports) or dial."""
        return [link.url for link in self._links] or [str(address) for address in self._addresses]

    def open(self) -> None:
        """Connect, or start to listen; raises as :meth:`lclstream.client.nng_receiving.NngReceiver.open`."""
        self._deadline = time.monotonic() + self._connect_timeout_s
        self._context = zmq.Context()
        try:
            for address in self._addresses:
                for _ in range(1 if self._listen else self._each):
                    link = _link(
                        self._context,
                        zmq.PUSH,
                        address,
                        listen=self._listen,
                        options={int(zmq.SNDHWM): self._places},
                    )
                    self._links.append(link)
            if not self._listen:
                _await_peers(self._links, self._deadline, self._connect_timeout_s)
                self._statistics.connections = len(self._links)
        except BaseException:
            self.abort()
            raise

    def send(self, message: bytes, timeout_s: float) -> None:
        """Hand over one message; raises as :meth:`lclstream.client.nng_sending.NngSender.send`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._watch()
            if self._offer(message):
                return
            now = time.monotonic()
            came = sum(link.came for link in self._links)
            if not came and now > max(deadline, self._deadline):
                raise NoPeerError(f"nobody connected to {', '.join(self.urls)} to take messages")
            left = all(link.alone and now - link.gone_at > self._reconnect_s for link in self._links)
            if came and not self._listen and left:
                raise BrokenStream(f"nobody is left to send to: {', '.join(self.urls)} has gone")
            if came and now > deadline:
                raise StreamTimeout(f"nobody at {', '.join(self.urls)} took a message for {timeout_s:g} s")
            poller = zmq.Poller()
            for link in self._links:
                if not link.alone:  # a socket without a peer may still have room: polling it would spin
                    poller.register(link.socket, zmq.POLLOUT)
                poller.register(link.monitor, zmq.POLLIN)
            poller.poll(min(_SLICE_MS, int(max(0.0, deadline - now) * 1000) + 1))

    def _watch(self) -> None:
        for link in self._links:
            before = link.came
            link.watch()
            if self._listen:
                self._statistics.connections += link.came - before
            elif before:
                self._statistics.reconnects += link.came - before

    def _offer(self, message: bytes) -> bool:
        """Give the message to the next link, in turn, that has room and a peer."""
        for turn in range(len(self._links)):
            link = self._links[(self._next + turn) % len(self._links)]
            if link.alone:
                continue  # libzmq would keep it for a peer that may never come back
            try:
                link.socket.send(message, zmq.NOBLOCK)
            except zmq.Again:
                continue
            self._next = (self._next + turn + 1) % len(self._links)
            return True
        return False

    def close(self, timeout_s: float) -> None:
        """Wait until everything has left, at most `timeout_s`.

        Raises:
            StreamTimeout: something may not have left in time.
        """
        began = time.monotonic()
        urls = ", ".join(self.urls)
        self._shut(int(timeout_s * 1000))
        if time.monotonic() - began >= timeout_s:
            raise StreamTimeout(f"{urls} did not take everything within {timeout_s:g} s: messages are lost")

    def abort(self) -> int:
        """End everything now; what had not left is dropped (libzmq does not say how much that was)."""
        self._shut(0)
        return 0

    def _shut(self, linger_ms: int) -> None:
        for link in self._links:
            _close_link(link.socket, link.monitor, linger_ms)
        self._links.clear()
        if self._context is not None:
            self._context.term()  # returns when all sockets have lingered
            self._context = None
