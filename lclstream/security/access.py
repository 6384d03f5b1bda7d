"""The access log: one JSON object a request, with the fields of the `certified` package's, as Loki takes them.

::

    {"type": "access", "level": "INFO", "timestamp": "2026-03-01T12:00:00.123+00:00", "name": "lclstream.access",
     "message": "GET /v1/transfers", "pid": 4121, "uptime": 122.21, "method": "GET", "path": "/v1/transfers",
     "statusCode": 200, "process_time": 0.0012, "remote_user": {"commonName": "ada", "userId": "ada"},
     "remote_addr": "127.0.0.1", "remote_port": 40312, "host": "localhost:8446", "user-agent": "lclstream/0.1.0",
     "accept": "application/json", "httpVersion": "1.1", "ssl_cipher": "TLS_AES_256_GCM_SHA384",
     "login": "ada", "issuer": "…,O=s3df", "serial": "3f9c…", "status": 200, "ms": 1.2, "time": 1772366400.1,
     "peer": "127.0.0.1", "refusal": "…, only when the security layer answered"}

Bodies and query strings are never in it: what a stranger puts into a URL is not ours to publish.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import os
import time
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lclstream.security.reloading import PeerCertificate

access_log = logging.getLogger("lclstream.access")

_STARTED = time.monotonic()
#: Characters of a header that are logged.
_LONGEST = 200


class AccessLog:
    """Middleware that writes one JSON line a request: time, who, method, path, status, milliseconds. Never a body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and log its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            access_log.info(json.dumps(_entry(scope, status, time.perf_counter() - started)))


def _entry(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    state = scope.get("state", {})
    peer: PeerCertificate | None = state.get("peer")
    address, port = (scope.get("client") or (None, None))[:2]
    headers = {name: value.decode("latin-1")[:_LONGEST] for name, value in scope["headers"]}
    now = datetime.datetime.now(datetime.UTC)
    subject = peer.certificate.subject if peer is not None else ()
    entry = {
        "type": "access",
        "level": "INFO",
        "name": access_log.name,
        "timestamp": now.isoformat(timespec="milliseconds"),
        "time": now.timestamp(),
        "pid": os.getpid(),
        "uptime": round(time.monotonic() - _STARTED, 2),
        "message": f"{scope['method']} {scope['path']}",
        "login": peer.identity.login if peer is not None else None,
        "issuer": peer.identity.issuer if peer is not None else None,
        "serial": peer.identity.serial if peer is not None else None,
        "remote_user": {
            _FIELDS.get(part.oid.dotted_string, part.oid.dotted_string): str(part.value) for part in subject
        },
        "remote_addr": address,
        "remote_port": port,
        "peer": address,
        "ssl_cipher": state.get("cipher"),
        "host": headers.get(b"host"),
        "user-agent": headers.get(b"user-agent"),
        "accept": headers.get(b"accept"),
        "httpVersion": scope["http_version"],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "statusCode": status,
        "process_time": round(seconds, 6),
        "ms": round(1000 * seconds, 1),
    }
    if "refusal" in state:
        entry["refusal"] = state["refusal"]
    return entry


#: Names of subject fields as `ssl.getpeercert` and the log of `certified` have them.
_FIELDS = {
    "2.5.4.3": "commonName",
    "0.9.2342.19200300.100.1.1": "userId",
    "2.5.4.10": "organizationName",
    "2.5.4.11": "organizationalUnitName",
    "2.5.4.65": "pseudonym",
}


def write_to(path: Path) -> None:
    """Write the access log to this file and nowhere else, one JSON object a line.

    The file is opened again when it was moved away, so that logrotate needs no signal.

    Raises:
        OSError: the file cannot be written.
    """
    handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    for old in list(access_log.handlers):
        access_log.removeHandler(old)
        old.close()
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
