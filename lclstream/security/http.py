"""httpx clients that present our certificate, and that explain a failed call instead of showing a traceback."""

from __future__ import annotations

import asyncio
import datetime
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from lclstream import __version__
from lclstream.security.credentials import Credentials
from lclstream.security.errors import (
    AuthenticationError,
    CredentialsError,
    PeerError,
    ServiceError,
    UnreachableError,
)
from lclstream.security.stamp import Stamp, stamp

log = logging.getLogger(__name__)

# Published services of the family refuse requests without these two headers.
_HEADERS = {"user-agent": f"lclstream/{__version__}", "accept": "application/json"}
#: Errors of a connection that ended before the answer.
_DROPPED = (httpx.ReadError, httpx.RemoteProtocolError)
#: Errors before the request was sent.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
#: Mark in a failed request's extensions: the same client had an answer from that service before.
_ANSWERED_BEFORE = "lclstream.answered_before"
#: Mark in a failed request's extensions: our certificate had expired by then.
_EXPIRED = "lclstream.expired"
#: Seconds a call may take unless the caller says otherwise.
TIMEOUT_S = 30.0


class _Live:
    """What a client remembers of its service: whether it ever answered, and which certificate we show it.

    The files of our certificate are looked at before each request, so that a client that lives for days shows a renewed
    certificate at its next connection.
    """

    def __init__(self, base_url: str, credentials: Credentials) -> None:
        self.context = credentials.client_context(base_url)
        self._url = base_url
        self._credentials = credentials
        self._seen = self._stamps()
        self._answered = False

    def before(self) -> None:
        """A request is about to be sent."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        if self._usable():
            self._take()
        self._seen = stamps

    async def abefore(self) -> None:
        """The same without making the event loop wait for the folder, which may be on a network file system."""
        stamps = await asyncio.to_thread(self._stamps)
        if stamps == self._seen:
            return
        if await asyncio.to_thread(self._usable):
            # Not in a thread: connections that begin meanwhile read the context.
            self._take()
        self._seen = stamps

    def _usable(self) -> bool:
        """Whether the folder can be used; a half-written pair must not spoil the context that is in use."""
        try:
            self._credentials.check_key()
            self._credentials.client_context(self._url)
        except (OSError, CredentialsError) as error:  # ssl.SSLError is an OSError
            self._left(error)
            return False
        return True

    def _take(self) -> None:
        try:
            self._credentials.fill_client_context(self.context, self._url)
        except (OSError, CredentialsError) as error:
            self._left(error)

    def _left(self, error: Exception) -> None:
        log.warning(
            "%s: the changed certificate cannot be used (%s); the one read before stays in use",
            self._credentials.folder,
            error,
        )

    def after(self, request: httpx.Request) -> None:
        """The service answered; what breaks from here on, breaks within its answer."""
        self._answered = True
        _note(request, _ANSWERED_BEFORE, True)

    def failed(self, request: httpx.Request) -> None:
        """Note in the request what its error will be explained with."""
        end = self._credentials.expiry()
        if end is not None and end <= datetime.datetime.now(datetime.UTC):
            _note(request, _EXPIRED, f"{self._credentials.certificate} expired at {end.isoformat()}")
        elif self._answered:
            _note(request, _ANSWERED_BEFORE, True)

    def _stamps(self) -> dict[Path, Stamp | None]:
        folder = self._credentials.folder
        paths = [self._credentials.certificate, self._credentials.key]
        for pattern in ("id/*.crt", "known_servers/*.crt", "known_servers/*.yaml"):
            paths += folder.glob(pattern)
        return {path: stamp(path) for path in paths}


class _Transport(httpx.HTTPTransport):
    """httpx's transport, which follows our certificate and remembers whether the service ever answered."""

    def __init__(self, live: _Live) -> None:
        super().__init__(verify=live.context, trust_env=False)
        self._live = live

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request."""
        self._live.before()
        try:
            response = super().handle_request(request)
        except httpx.TransportError:
            self._live.failed(request)
            raise
        self._live.after(request)
        return response


class _AsyncTransport(httpx.AsyncHTTPTransport):
    """The same for an event loop."""

    def __init__(self, live: _Live) -> None:
        super().__init__(verify=live.context, trust_env=False)
        self._live = live

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request."""
        await self._live.abefore()
        try:
            response = await super().handle_async_request(request)
        except httpx.TransportError:
            await asyncio.to_thread(self._live.failed, request)
            raise
        self._live.after(request)
        return response


def client(base_url: str, credentials: Credentials, *, timeout: float = TIMEOUT_S) -> httpx.Client:
    """A blocking client for one service; close it, or use it in a ``with``.

    A renewed certificate in the folder is shown at its next connection.
    """
    return httpx.Client(
        base_url=base_url,
        headers=_HEADERS,
        timeout=timeout,
        transport=_Transport(_Live(base_url, credentials)),
        trust_env=False,
    )


def async_client(base_url: str, credentials: Credentials, *, timeout: float = TIMEOUT_S) -> httpx.AsyncClient:
    """The same for an event loop."""
    return httpx.AsyncClient(
        base_url=base_url,
        headers=_HEADERS,
        timeout=timeout,
        transport=_AsyncTransport(_Live(base_url, credentials)),
        trust_env=False,
    )


def explain(error: httpx.HTTPError, url: str) -> PeerError:
    """The error of ours that says what an httpx error means."""
    if isinstance(error, httpx.HTTPStatusError):
        return refused(error.response)
    answered = bool(_noted(error, _ANSWERED_BEFORE))
    expired = _noted(error, _EXPIRED)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return AuthenticationError(
                f"{url}: we do not trust its certificate ({cause.verify_message}): "
                "add its issuer to known_servers/ of our certificate folder"
            )
        if isinstance(cause, ssl.SSLError) and expired:
            return AuthenticationError(f"{url}: refused our certificate: {expired}: renew it")
        if isinstance(cause, ssl.SSLError) and not (answered and _is_end(cause)):
            return AuthenticationError(
                f"{url}: refused our certificate ({cause.reason}): "
                "its known_clients/ must hold the issuer of ours, or ask that site for an introduction"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, _DROPPED) and expired:
        return AuthenticationError(f"{url}: closed the connection before it answered: {expired}: renew it")
    told = _without_answer(error, url, answered)
    told.answer_lost = not isinstance(error, _NEVER_SENT)
    return told


def refused(response: httpx.Response) -> ServiceError:
    """The error of ours that says what an answer with an error status means."""
    try:
        detail = str(response.json().get("detail", response.text))
    except (ValueError, AttributeError):
        detail = response.text
    message = f"{response.request.method} {response.request.url} answered {response.status_code}: {detail[:2000]}"
    return ServiceError(message, status=response.status_code, detail=detail)


def _without_answer(error: httpx.HTTPError, url: str, answered: bool) -> PeerError:
    if isinstance(error, _DROPPED) and answered:
        return UnreachableError(f"{url}: closed the connection before it answered; it answered before, so it went away")
    if isinstance(error, _DROPPED):
        # In TLS 1.3 a server judges the client's certificate after the client believes the handshake is over.
        return AuthenticationError(
            f"{url}: closed the connection before it answered: most likely our certificate is not accepted there"
        )
    if isinstance(error, httpx.TimeoutException):
        return UnreachableError(f"{url}: no answer in time ({type(error).__name__})")
    return UnreachableError(f"{url}: cannot be reached: {error}. Is it running, and is the address right?")


def _note(request: httpx.Request, key: str, value: object) -> None:
    request.extensions = {**request.extensions, key: value}


def _noted(error: httpx.HTTPError, key: str) -> object:
    try:
        return error.request.extensions.get(key)
    except RuntimeError:  # an error that was never given its request
        return None


def _is_end(error: ssl.SSLError) -> bool:
    """Whether TLS ended without a word, which a process that is killed does too."""
    return isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn httpx errors inside the block into :class:`.PeerError`."""
    try:
        yield
    except httpx.HTTPError as error:
        raise explain(error, url) from error


@asynccontextmanager
async def aexplained(url: str) -> AsyncIterator[None]:
    """The same for ``async with``."""
    with explained(url):
        yield
