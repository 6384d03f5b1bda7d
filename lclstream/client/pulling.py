"""The receiving end of a stream."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from lclstream.client.address import parse
from lclstream.client.encryption import context_for
from lclstream.client.errors import AddressError
from lclstream.client.statistics import Statistics

if TYPE_CHECKING:
    from lclstream.client.batch import Batch

Library = Literal["nng", "zmq"]
#: Bounds used when the caller names none, in seconds.
TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 30.0


class _Receiver(Protocol):
    @property
    def urls(self) -> list[str]: ...
    def open(self) -> None: ...
    def receive(self, timeout_s: float) -> bytes | None: ...
    def close(self) -> None: ...


class Puller:
    """Iterates over the messages of a stream; made by :func:`pull`. Used by one thread.

    ::

        with pull("tcp://buffer.example.org:5001") as stream:
            for batch in stream.batches():
                print(batch.attributes["run"], batch["/data/detector"].shape)
        print(stream.statistics)
    """

    def __init__(self, receiver: _Receiver, statistics: Statistics, timeout_s: float) -> None:
        self._receiver = receiver
        self._timeout_s = timeout_s
        self._opened = False
        self._over = False
        #: Counts and rates, up to date at any moment.
        self.statistics = statistics

    @property
    def urls(self) -> list[str]:
        """The addresses dialled, or listened at with their real ports."""
        return self._receiver.urls

    @property
    def over(self) -> bool:
        """Whether the end of the stream was seen."""
        return self._over

    def open(self) -> Self:
        """Connect or listen; ``with`` and iterating do it when it was not done.

        Raises:
            NoPeerError: a dialled address did not answer within `connect_timeout_s`.
            WrongPeerError: what answered is not the sending end of a stream.
            ListenError: the address cannot be listened at.
        """
        if not self._opened:
            self._receiver.open()
            self._opened = True
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; messages that were sent to us but not read are lost. May be called twice."""
        if self._opened:
            self._receiver.close()
            self._opened = False
            self._over = True

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next message, or None at the end of the stream.

        Args:
            timeout_s: another bound than the puller's own; nothing is lost by asking again after a timeout.

        Raises:
            BrokenStream: a connection ended before the end of the stream (told after all others were read).
            StreamTimeout: no message came for `timeout_s`.
            NoPeerError: listening, and nobody came within `connect_timeout_s`.
        """
        if self._over:
            return None
        self.open()
        began = time.monotonic()
        try:
            message = self._receiver.receive(self._timeout_s if timeout_s is None else timeout_s)
        finally:
            self.statistics.wait_s += time.monotonic() - began
        if message is None:
            self._over = True
            self._receiver.close()
            self._opened = False
            return None
        self.statistics.count(len(message))
        return message

    def __iter__(self) -> Iterator[bytes]:
        """Messages until the end of the stream; raises as :meth:`receive`."""
        ours = not self._opened  # inside a `with` a loop that is left early may be taken up again
        try:
            while (message := self.receive()) is not None:
                yield message
        finally:
            if ours:
                self.close()

    def batches(self) -> Iterator[Batch]:
        """Messages decoded to arrays (:class:`lclstream.client.batch.Batch`).

        The format - HDF5, Simplon 1.8, DECTRIS stream V2 - is recognised. A batch is one message; of a Simplon stream
        one image message, with what its start message said.

        Raises:
            MessageError: a message is of no known format or damaged; its number in the stream is named.
            StreamError: as :meth:`receive`.
        """
        from lclstream.client.decoding import Decoder

        decoder = Decoder()
        for number, message in enumerate(self):
            yield from decoder.feed(message, name=f"message {number} from {', '.join(self.urls)}")
        decoder.end()


def pull(
    url: str | Sequence[str],
    *,
    library: Library = "nng",
    listen: bool = False,
    timeout_s: float = TIMEOUT_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    connections: int = 1,
    producers: int = 1,
    prefetch: int = 8,
    reconnect_s: float = 0.0,
    sentinel: bool = False,
    tls: ssl.SSLContext | None = None,
) -> Puller:
    """The receiving end of a stream, not yet connected.

    The end of the stream is the disconnection of every sender between two messages or, with ZeroMQ, also an empty
    message. Messages of several senders come in the order in which they arrive; each is given once.

    Args:
        url: one or several of ``tcp://host:port``, ``ipc:///path``, ``tls+tcp://host:port`` (nng only).
        library: protocol, ``nng`` or ``zmq``.
        listen: wait for senders at `url` instead of dialling it.
        timeout_s: longest silence of a connected sender, in seconds.
        connect_timeout_s: longest wait for the first connection, in seconds; dialling is repeated meanwhile.
        connections: connections to each URL when dialling. More than one can be faster over long distances.
        producers: senders that must have come before the stream can end, when listening.
        prefetch: messages received ahead of the caller, at most; they bound the memory.
        reconnect_s: how long a connection that *broke* is dialled again, in seconds; 0: it is an error at once. What
            was under way when it broke is lost and counted. With ZeroMQ a break is known only with `sentinel`.
        sentinel: ZeroMQ only: a sender that goes without having sent an empty message broke the stream.
        tls: context for ``tls+tcp``; None: made from the certificate folder that ``LCLSTREAM_CREDENTIALS`` names.

    Raises:
        AddressError: a URL or a combination of options cannot be used.
        CredentialsError: the folder of the certificate is incomplete.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise AddressError("no URL to pull from")
    addresses = [parse(each, listen=listen) for each in urls]
    if connections < 1 or producers < 1 or prefetch < 1:
        raise AddressError(
            f"connections, producers, prefetch are 1 or more, not {connections}, {producers}, {prefetch}"
        )
    statistics = Statistics()
    receiver: _Receiver
    if library == "zmq":
        from lclstream.client.zeromq import ZmqReceiver

        if tls is not None or any(address.tls for address in addresses):
            raise AddressError(f"{', '.join(urls)}: ZeroMQ has no TLS; use library nng for an encrypted stream")
        receiver = ZmqReceiver(
            addresses,
            listen=listen,
            connections=connections,
            producers=producers,
            prefetch=prefetch,
            connect_timeout_s=connect_timeout_s,
            reconnect_s=reconnect_s,
            sentinel=sentinel,
            statistics=statistics,
        )
    elif library == "nng":
        from lclstream.client.nng_receiving import NngReceiver

        if sentinel:
            raise AddressError("sentinel is for library zmq: an NNG stream ends by its disconnection")
        receiver = NngReceiver(
            addresses,
            listen=listen,
            connections=connections,
            producers=producers,
            prefetch=prefetch,
            connect_timeout_s=connect_timeout_s,
            reconnect_s=reconnect_s,
            statistics=statistics,
            tls=context_for(urls, None, listen=listen) if tls is None else tls,
        )
    else:
        raise AddressError(f"library {library!r} is neither nng nor zmq")
    return Puller(receiver, statistics, timeout_s)
