"""An ASGI application served with mutual TLS; every request knows its peer, every answer is logged.

One event loop owns everything of a server. :func:`serve` returns when SIGINT or SIGTERM arrives, after the requests
under way have ended or five seconds have passed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import HTTPException, Request

from lclstream.security.access import AccessLog, access_log, write_to
from lclstream.security.connections import (
    HANDSHAKE_S,
    HEAD_BYTES,
    KEEP_ALIVE_S,
    MutualTlsServer,
    PeerCertificateProtocol,
)
from lclstream.security.credentials import Credentials
from lclstream.security.gate import CertificateGate
from lclstream.security.identity import Identity
from lclstream.security.limits import UNLIMITED, LimitRequests, Limits
from lclstream.security.rate import Rate
from lclstream.security.reloading import LiveCredentials

__all__ = [
    "GRACEFUL_STOP_S",
    "AccessLog",
    "Limits",
    "Rate",
    "access_log",
    "peer_identity",
    "serve",
    "server_for",
]

#: How long requests under way may take after a stop signal, in seconds.
GRACEFUL_STOP_S = 5


def peer_identity(request: Request) -> Identity:
    """FastAPI dependency: who is calling.

    Raises:
        HTTPException: 401 when the connection came without a certificate (a server that is not run by :func:`serve`).
    """
    der: bytes | None = getattr(request.state, "peer_certificate", None)
    if der is None:
        raise HTTPException(401, "a client certificate is needed: this service speaks mutual TLS only")
    try:
        return Identity.of_certificate(der)
    except ValueError as error:
        raise HTTPException(401, str(error)) from error


def server_for(
    app: Any,
    *,
    host: str,
    port: int,
    credentials: Credentials,
    limits: Limits | None = None,
    handshake_s: float = HANDSHAKE_S,
) -> MutualTlsServer:
    """A server that is not started yet; tests run it in a thread of their own.

    Args:
        app: the ASGI application.
        host: name or address to listen at.
        port: port to listen at; 0 takes a free one.
        credentials: the service's certificate folder. It is followed while it changes: a renewed certificate and
            other issuers count for the next connection, ``revoked.yaml`` for the next request.
        limits: how much, how long and how often a peer may ask; not limited when None.
        handshake_s: seconds a TLS handshake may take.

    Raises:
        CredentialsError: the folder cannot be used.
    """
    live = LiveCredentials(credentials)
    config = uvicorn.Config(
        AccessLog(CertificateGate(LimitRequests(app, limits or UNLIMITED), live)),
        host=host,
        port=port,
        http=PeerCertificateProtocol,
        # uvloop reads a connection that was paused in connection_made, and the first bytes of the handshake are lost.
        loop="asyncio",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        # A peer must not be able to write another address into the access log.
        proxy_headers=False,
        timeout_graceful_shutdown=GRACEFUL_STOP_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    return MutualTlsServer(config, live, handshake_s=handshake_s)


def serve(
    app: Any,
    *,
    host: str,
    port: int,
    credentials: Credentials,
    limits: Limits | None = None,
    access_log_file: Path | None = None,
) -> None:
    """Serve until a stop signal.

    Args:
        app: the ASGI application.
        host: name or address to listen at.
        port: port to listen at.
        credentials: the service's certificate folder, followed while it changes.
        limits: how much, how long and how often a peer may ask; not limited when None.
        access_log_file: where the access log goes, one JSON object a line; among the other log lines when None.

    Raises:
        CredentialsError: the folder cannot be used.
        SystemExit: 3, with a message, when the address cannot be listened at; 1 when the application could not start.
    """
    if access_log_file is not None:
        write_to(access_log_file)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _cannot_listen(host, port, error) from error
    # uvicorn repeats the signal to the process after it has stopped. A service stopped by a signal has done its work.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = server_for(app, host=host, port=port, credentials=credentials, limits=limits)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    except OSError as error:
        # Somebody took the port after the probe.
        raise _cannot_listen(host, port, error) from error
    if server.lifespan.should_exit:
        raise SystemExit(1)


def _cannot_listen(host: str, port: int, error: OSError) -> SystemExit:
    print(
        f"cannot listen at {host}:{port}: {error.strerror}. Choose another `port`, or stop what uses it "
        f"(`ss -ltnp 'sport = :{port}'` shows it).",
        file=sys.stderr,
    )
    return SystemExit(3)
