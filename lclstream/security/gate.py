"""The middleware every request passes before it reaches a service: is this certificate still good, now?"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from lclstream.security.reloading import LiveCredentials, PeerCertificate

log = logging.getLogger(__name__)


class CertificateGate:
    """Refuses (401) a certificate that was revoked, has expired or lost its issuer since the connection was made.

    The handshake judges a certificate once, and a connection may live for days.
    """

    def __init__(self, app: ASGIApp, live: LiveCredentials) -> None:
        self.app = app
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or say which certificate, issuer and rule forbid it."""
        if scope["type"] == "http":
            state = scope.get("state", {})
            peer: PeerCertificate | None = state.get("peer")
            if state.get("peer_certificate") is not None:
                refusal = "the certificate names nobody: its subject has neither UID nor CN (rule: identity)"
                if peer is not None:
                    refusal = self._live.refusal(peer) or ""
                if refusal:
                    log.warning("%s refused: %s", (scope.get("client") or ("?",))[0], refusal)
                    await refuse(scope, send, 401, refusal)
                    return
        await self.app(scope, receive, send)


async def refuse(
    scope: Scope, send: Send, status: int, detail: str, *, headers: Mapping[str, str] | None = None, last: bool = True
) -> None:
    """Answer a request with an error, in the form services give theirs, and close the connection.

    Args:
        scope: the request; the access log finds the reason in it.
        send: where the answer goes.
        status: HTTP status code.
        detail: why, for the caller.
        headers: further headers.
        last: whether the answer is complete; else one more empty message must follow.
    """
    scope.setdefault("state", {})["refusal"] = detail
    body = json.dumps({"detail": detail}).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **(headers or {}),
    }
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": not last})
