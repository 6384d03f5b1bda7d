"""The sending end of a stream."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from lclstream.client.address import parse
from lclstream.client.encryption import context_for
from lclstream.client.errors import AddressError
from lclstream.client.pulling import CONNECT_TIMEOUT_S, TIMEOUT_S, Library
from lclstream.client.statistics import Statistics


class _Sender(Protocol):
    @property
    def urls(self) -> list[str]: ...
    def open(self) -> None: ...
    def send(self, message: bytes, timeout_s: float) -> None: ...
    def close(self, timeout_s: float) -> None: ...
    def abort(self) -> int: ...


class Pusher:
    """Sends messages, each to one receiver; made by :func:`push`. Used by one thread.

    ``with`` waits at its end until everything has left; when it ends by an error, what has not left is dropped.
    """

    def __init__(self, sender: _Sender, statistics: Statistics, timeout_s: float) -> None:
        self._sender = sender
        self._timeout_s = timeout_s
        self._opened = False
        #: Counts and rates, up to date at any moment.
        self.statistics = statistics

    @property
    def urls(self) -> list[str]:
        """The addresses dialled, or listened at with their real ports."""
        return self._sender.urls

    def open(self) -> Self:
        """Connect or listen; ``with`` and the first ``send`` do it when it was not done.

        Raises:
            NoPeerError: a dialled address did not answer within `connect_timeout_s`.
            WrongPeerError: what answered is not the receiving end of a stream.
            ListenError: the address cannot be listened at.
        """
        if not self._opened:
            self._sender.open()
            self._opened = True
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def send(self, message: bytes) -> None:
        """Hand over one message; waits while all receivers are busy.

        Raises:
            NoPeerError: listening, and nobody has come to take it.
            BrokenStream: every receiver has gone.
            StreamTimeout: no receiver took a message for `timeout_s`.
        """
        self.open()
        began = time.monotonic()
        try:
            self._sender.send(message, self._timeout_s)
        finally:
            self.statistics.wait_s += time.monotonic() - began
        self.statistics.count(len(message))

    def close(self) -> None:
        """Wait until everything has left this machine, then end all connections. May be called twice.

        Raises:
            BrokenStream: messages are lost because a receiver went away.
            StreamTimeout: something had not left after `timeout_s`; it is dropped.
        """
        if self._opened:
            self._opened = False
            self._sender.close(self._timeout_s)

    def abort(self) -> None:
        """End all connections now and drop what has not left."""
        if self._opened:
            self._opened = False
            self._sender.abort()


def push(
    url: str | Sequence[str],
    *,
    library: Library = "nng",
    listen: bool = False,
    timeout_s: float = TIMEOUT_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    connections: int = 1,
    queue_messages: int = 2,
    reconnect_s: float = 0.0,
    tls: ssl.SSLContext | None = None,
) -> Pusher:
    """The sending end of a stream, not yet connected.

    Args:
        url: one or several of ``tcp://host:port``, ``ipc:///path``, ``tls+tcp://host:port`` (nng only).
        library: protocol, ``nng`` or ``zmq``.
        listen: wait for receivers at `url` instead of dialling it.
        timeout_s: longest time nobody takes a message, and bound on :meth:`Pusher.close`, in seconds.
        connect_timeout_s: longest wait for the first connection, in seconds; dialling is repeated meanwhile.
        connections: connections to each URL when dialling.
        queue_messages: messages held here, beside those under way, at most.
        reconnect_s: how long a connection that ended is dialled again, in seconds; 0: not at all. A message that was
            under way then is lost and counted, never sent twice.
        tls: context for ``tls+tcp``; None: made from the certificate folder that ``LCLSTREAM_CREDENTIALS`` names.

    Raises:
        AddressError: a URL or a combination of options cannot be used.
        CredentialsError: the folder of the certificate is incomplete.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise AddressError("no URL to push to")
    addresses = [parse(each, listen=listen) for each in urls]
    if connections < 1 or queue_messages < 1:
        raise AddressError(f"connections and queue_messages are 1 or more, not {connections} and {queue_messages}")
    statistics = Statistics()
    sender: _Sender
    if library == "zmq":
        from lclstream.client.zeromq import ZmqSender

        if tls is not None or any(address.tls for address in addresses):
            raise AddressError(f"{', '.join(urls)}: ZeroMQ has no TLS; use library nng for an encrypted stream")
        sender = ZmqSender(
            addresses,
            listen=listen,
            connections=connections,
            queue_messages=queue_messages,
            connect_timeout_s=connect_timeout_s,
            reconnect_s=reconnect_s,
            statistics=statistics,
        )
    elif library == "nng":
        from lclstream.client.nng_sending import NngSender

        sender = NngSender(
            addresses,
            listen=listen,
            connections=connections,
            queue_messages=queue_messages,
            connect_timeout_s=connect_timeout_s,
            reconnect_s=reconnect_s,
            statistics=statistics,
            tls=context_for(urls, None, listen=listen) if tls is None else tls,
        )
    else:
        raise AddressError(f"library {library!r} is neither nng nor zmq")
    return Pusher(sender, statistics, timeout_s)
