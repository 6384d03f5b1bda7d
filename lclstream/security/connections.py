"""Connections of a server with mutual TLS: the handshake, its time limit, and what HTTP/1.1 lets a peer do slowly.

uvicorn reads and writes HTTP; this module decides who gets that far. Each connection is accepted, shaken hands with
under the folder's present certificates, and only then handed to HTTP. A handshake or a request head that does not
arrive in time is cut off: a peer that sends one byte a minute holds a connection for seconds, not for ever.

The server's event loop owns everything here: one task a listening socket accepts, one task a connection shakes hands;
:class:`MutualTlsServer` ends them when it stops.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import h11
import uvicorn
from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol

from lclstream.security.reloading import LiveCredentials, PeerCertificate

log = logging.getLogger(__name__)

#: Seconds a handshake may take.
HANDSHAKE_S = 10.0
#: Seconds from the first byte of a request, or from the handshake, until its head (request line and headers) is there.
HEAD_S = 10.0
#: Seconds a connection is kept between two requests.
KEEP_ALIVE_S = 30
#: Bytes of a request's head.
HEAD_BYTES = 32 * 1024
#: Errors that mean this process or machine has no room for a connection now.
_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: Seconds a peer may take to answer the close of TLS.
CLOSE_S = 5.0


class PeerCertificateProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which hands the peer's certificate to the application as ``request.state``.

    ``peer_certificate`` is the certificate (DER), ``peer`` the same parsed (:class:`.PeerCertificate`), or None when it
    names nobody.
    """

    #: Seconds for a request's head; the server's tests shorten it.
    head_s = HEAD_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lost = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with HTTP, after the handshake."""
        ssl_object: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        certificate = ssl_object.getpeercert(binary_form=True) if ssl_object else None
        peer = None
        if certificate is not None:
            try:
                peer = PeerCertificate(certificate)
            except (ValueError, x509.InvalidVersion) as error:
                log.warning("%s: %s", transport.get_extra_info("peername"), error)
        self.app_state = {
            **self.app_state,
            "peer_certificate": certificate,
            "peer": peer,
            "cipher": _cipher(transport),
            "hang_up": transport.abort,
        }
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has gone."""
        self.lost = True
        self._stop_head_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close as soon as the request under way is answered."""
        idle = self.cycle is None or self.cycle.response_complete
        if not idle or self.conn.our_state is not h11.ERROR:
            super().shutdown()
        if idle:
            # A client that keeps a connection without using it does not answer the close of TLS: do not wait for it.
            self.transport.abort()

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and not self.lost and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_s, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        log.info("%s:%s: no complete request head in %g s, connection cut", *(self.client or ("?", "?")), self.head_s)
        self.transport.abort()


class _Listener:
    """One listening socket and the task that accepts its connections, in the shape uvicorn closes."""

    def __init__(self, sock: socket.socket, accept: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        self.sockets = [sock]
        self._task = asyncio.get_running_loop().create_task(accept(sock))
        # Not earlier: the event loop still polls the socket's number, which another socket could get.
        self._task.add_done_callback(lambda _: sock.close())

    def close(self) -> None:
        """Accept no more, and give the address back."""
        self._task.cancel()

    async def wait_closed(self) -> None:
        """Until the accepting task has ended."""
        await asyncio.wait({self._task})


class MutualTlsServer(uvicorn.Server):
    """A uvicorn server whose connections are made under a folder's present certificates.

    Args:
        config: uvicorn's configuration; its own TLS options are not used.
        live: the server's folder.
        handshake_s: time limit of a handshake, in seconds.
    """

    def __init__(self, config: uvicorn.Config, live: LiveCredentials, *, handshake_s: float = HANDSHAKE_S) -> None:
        super().__init__(config)
        self._live = live
        self._handshake_s = handshake_s
        self._handshakes: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen.

        Raises:
            OSError: the address cannot be listened at.
        """
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        try:
            listening = list(sockets or await self._bound())
        except OSError:
            await self.lifespan.shutdown()
            raise
        for sock in listening:
            sock.setblocking(False)
            log.info("listening at https://%s:%d", *sock.getsockname()[:2])
        self.servers = [_Listener(sock, self._accept) for sock in listening]  # type: ignore[misc]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end handshakes under way, then what uvicorn does."""
        for server in self.servers:
            server.close()
        for task in self._handshakes:
            task.cancel()
        await super().shutdown(sockets)

    async def _bound(self) -> list[socket.socket]:
        """Listening sockets at every address of the configured host."""
        found = await asyncio.get_running_loop().getaddrinfo(
            self.config.host, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sockets: list[socket.socket] = []
        try:
            for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
                # Port 0 means one free port, the same one at each address.
                port = sockets[0].getsockname()[1] if sockets and not address[1] else address[1]
                place = (address[0], port, *address[2:])
                sockets.append(socket.create_server(place, family=family, backlog=self.config.backlog))
        except OSError:
            for sock in sockets:
                sock.close()
            raise
        return sockets

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                # Most often a peer that went away before it was accepted.
                if error.errno in _OUT_OF:
                    log.error("no connection can be accepted now: %s", error)
                await asyncio.sleep(1 if error.errno in _OUT_OF else 0.01)
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._shake_hands(sock, address))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: PeerCertificateProtocol(
                    config=self.config, server_state=self.server_state, app_state=self.lifespan.state
                ),
                sock,
                ssl=self._live.context(),
                ssl_handshake_timeout=self._handshake_s,
                ssl_shutdown_timeout=CLOSE_S,
            )
        except ssl.SSLCertVerificationError as error:
            # Who was refused and why is told here: in TLS 1.3 the peer may only see the connection go.
            log.warning(
                "%s:%s: its certificate is refused: %s (rule: known_clients/ of this service)",
                *address[:2],
                error.verify_message,
            )
            sock.close()
        except OSError as error:
            log.info("%s:%s: no TLS handshake: %s", *address[:2], error)
            sock.close()
        except BaseException:
            sock.close()
            raise


def _cipher(transport: asyncio.Transport) -> str | None:
    used = transport.get_extra_info("cipher")
    return None if used is None else str(used[0])
