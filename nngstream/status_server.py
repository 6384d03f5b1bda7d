"""The status over HTTP: ``GET /status`` (JSON) and ``GET /metrics`` (Prometheus).

Threads: one accepts; each connection has one of its own, which also does the TLS handshake, so that a client that says
nothing holds up itself alone. Every wait of a connection has a bound.
"""

from __future__ import annotations

import http.server
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from nngstream import tls
from nngstream.config import Tls
from nngstream.errors import ListenError
from nngstream.status import metrics, to_json
from nngstream.url import Address

log = logging.getLogger("nngstream.status")

_PATIENCE_S = 10


class StatusServer:
    """See the module.

    Args:
        address: ``http`` or ``https``; port 0 takes a free one.
        certificates: for ``https``: clients must have a certificate of these issuers.
        status: makes the document; called by any thread.

    Raises:
        ListenError: the address cannot be listened at.
    """

    def __init__(self, address: Address, certificates: Tls | None, status: Callable[[], dict[str, Any]]) -> None:
        context = None
        if address.tls:
            assert certificates is not None
            context = tls.server_context(certificates, minimum=ssl.TLSVersion.TLSv1_3)
        try:
            self._server = _Server(address, context, status)
        except OSError as error:
            raise ListenError(
                f"cannot listen at {address}: {error.strerror}. Choose another --status (port 0 takes a free one)."
            ) from error
        self.url = str(address.at(self._server.server_address[1]))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.5}, name="status", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: Address, context: ssl.SSLContext | None, status: Callable[[], dict[str, Any]]) -> None:
        self.status = status
        self._context = context
        host = address.host.strip("[]")
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, address.port), _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(_PATIENCE_S)
        if self._context is None:
            super().finish_request(request, client_address)
            return
        try:
            encrypted = self._context.wrap_socket(request, server_side=True)
        except OSError as error:
            log.warning("status: %s refused: %s", client_address[0], error)
            return
        with encrypted:
            super().finish_request(encrypted, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("status: connection with %s broke", client_address[0])


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "nngstream"
    sys_version = ""
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/status":
            self._answer(200, "application/json", to_json(self.server.status()))
        elif path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", metrics(self.server.status()))
        else:
            self._answer(404, "text/plain; charset=utf-8", "there are /status and /metrics\n")

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("status: %s %s", self.client_address[0], format % args)
