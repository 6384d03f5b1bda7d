"""How much, how long and how often a peer may ask: limits of a service, refused with words.

==========  =====================================================================================
413         the body is larger than `body_bytes`; it is refused before it is read
408         the peer stopped sending in the middle of a body, for `stall_s`
503         no answer began within `answer_s`
429         the peer asks more often than `rate`; `retry-after` says when to come back
==========  =====================================================================================

A peer that stops *taking* an answer for `stall_s` is hung up on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lclstream.security.gate import refuse
from lclstream.security.rate import Rate, TokenBuckets
from lclstream.security.reloading import PeerCertificate

log = logging.getLogger(__name__)

#: Seconds for which the rest of a refused body is thrown away, so that the peer sees the answer and not a reset.
_LINGER_S = 2.0


class RouteLimits(BaseModel):
    """Other limits for one route.

    Attributes:
        path: the route as the service declares it, such as ``/v2/jobs/{jobid}/files``.
        method: only for this method; all when None.
        body_bytes: largest body; as elsewhere when None.
        answer_s: seconds until the answer begins; as elsewhere when None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(pattern="^/")
    method: str | None = None
    body_bytes: int | None = Field(default=None, ge=0)
    answer_s: float | None = Field(default=None, gt=0)


class Limits(BaseModel):
    """Limits of a service.

    Attributes:
        body_bytes: largest request body in bytes; None: not limited.
        answer_s: seconds from a request's head until its answer begins, the upload included; None: not limited.
        stall_s: seconds a peer may pause within a body or an answer.
        rate: how often one identity may ask; None: not limited.
        routes: other limits for some routes; the first that fits counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int | None = Field(default=4 << 20, ge=0)
    answer_s: float | None = Field(default=60.0, gt=0)
    stall_s: float = Field(default=60.0, gt=0)
    rate: Rate | None = None
    routes: tuple[RouteLimits, ...] = ()


#: What holds for a service that sets no limits: only a stalled peer is cut off.
UNLIMITED = Limits(body_bytes=None, answer_s=None)


class _RefusedError(Exception):
    """Ends the application's work on a request that is refused while its body is read."""


class LimitRequests:
    """Middleware that keeps a service's :class:`Limits`.

    An application that is cut off at `answer_s` is cancelled; a thread it started goes on to its end.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self._limits = limits
        self._buckets = TokenBuckets(limits.rate) if limits.rate is not None else None
        self._routes = [(compile_path(route.path)[0], route) for route in limits.routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request within its limits."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._buckets is not None:
            wait = self._buckets.take(_caller(scope))
            if wait > 0:
                rate = self._buckets_rate()
                detail = f"more than {rate.per_s:g} requests a second: come back in {wait:.1f} s (rule: rate)"
                await refuse(scope, send, 429, detail, headers={"retry-after": str(math.ceil(wait))})
                return
        body_bytes, answer_s = self._limits_of(scope)
        await _Exchange(scope, receive, send, body_bytes, answer_s, self._limits.stall_s).run(self.app)

    def _buckets_rate(self) -> Rate:
        assert self._limits.rate is not None
        return self._limits.rate

    def _limits_of(self, scope: Scope) -> tuple[int | None, float | None]:
        limits = self._limits
        for pattern, route in self._routes:
            if route.method in (None, scope["method"]) and pattern.match(scope["path"]):
                return (
                    limits.body_bytes if route.body_bytes is None else route.body_bytes,
                    limits.answer_s if route.answer_s is None else route.answer_s,
                )
        return limits.body_bytes, limits.answer_s


def _caller(scope: Scope) -> tuple[str, str]:
    peer: PeerCertificate | None = scope.get("state", {}).get("peer")
    if peer is not None:
        return peer.identity.login, peer.identity.issuer
    return (scope.get("client") or ("",))[0], ""


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, body_bytes: int | None, answer_s: float | None, stall_s: float
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body_bytes = body_bytes
        self._answer_s = answer_s
        self._stall_s = stall_s
        self._got = 0
        self._more = True
        self._began = False
        self._refusal: tuple[int, str] | None = None
        self._deadline: asyncio.Timeout | None = None

    async def run(self, app: ASGIApp) -> None:
        announced = _content_length(self._scope)
        if self._body_bytes is not None and announced is not None and announced > self._body_bytes:
            self._too_large(f"{announced} bytes were announced")
        else:
            try:
                async with asyncio.timeout(self._answer_s) as self._deadline:
                    await app(self._scope, self._receive_some, self._send_some)
            except _RefusedError:
                pass
            except TimeoutError:
                if self._deadline is None or not self._deadline.expired():
                    raise
                if self._refusal is None:
                    self._refusal = (503, f"no answer within {self._answer_s:g} s (rule: answer_s); try again later")
        if self._refusal is not None and not self._began:
            await self._refuse(*self._refusal)

    def _too_large(self, found: str) -> None:
        detail = f"the body is too large: {found}, and at most {self._body_bytes} are taken (rule: body_bytes)"
        self._refusal = (413, detail)

    async def _receive_some(self) -> Message:
        if self._refusal is not None:
            raise _RefusedError
        if not self._more:
            # The body is here; the application only waits for the peer to go, as long as it likes.
            return await self._receive()
        try:
            async with asyncio.timeout(self._stall_s):
                message = await self._receive()
        except TimeoutError:
            self._refusal = (408, f"nothing of the body arrived for {self._stall_s:g} s (rule: stall_s)")
            raise _RefusedError from None
        if message["type"] == "http.request":
            self._more = message.get("more_body", False)
            self._got += len(message.get("body", b""))
            if self._body_bytes is not None and self._got > self._body_bytes:
                self._too_large(f"{self._got} bytes have arrived")
                raise _RefusedError
        return message

    async def _send_some(self, message: Message) -> None:
        if self._refusal is not None and not self._began:
            # A framework that turned our refusal into an error of its own: ours says why.
            return
        self._began = True
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(None)
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            log.info("%s took nothing of its answer for %g s: hung up", _caller(self._scope)[0], self._stall_s)
            hang_up: Callable[[], Any] | None = self._scope.get("state", {}).get("hang_up")
            if hang_up is None:
                raise
            hang_up()

    async def _refuse(self, status: int, detail: str) -> None:
        await refuse(self._scope, self._send, status, detail, last=False)
        # A peer that is still sending would see a reset connection instead of the answer, were it closed now.
        try:
            async with asyncio.timeout(_LINGER_S):
                while self._more:
                    message = await self._receive()
                    self._more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            pass
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return None
