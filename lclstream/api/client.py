"""Clients of the transfer service, blocking and async, with the same methods.

Example::

    with TransferClient("https://dtn.example.org:8446", Credentials("~/.certified")) as api:
        transfer = api.request(yaml.safe_load(open("lclstreamer.yaml")), lease_s=60)
        while not api.info(transfer.id).phase.pullable: ...

Every method raises :class:`.PeerError` (see :mod:`lclstream.security.errors`): its `retry` says whether the same call
may succeed later. :meth:`TransferClient.request` may be repeated safely when it is given an idempotency key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
from pydantic import TypeAdapter

from lclstream.api.models import JobState, Lease, TransferInfo, TransferPlan, TransferStatus
from lclstream.jobs.tags import query
from lclstream.security import http
from lclstream.security.credentials import Credentials
from lclstream.security.errors import ServiceError

OnNoConsumer = Literal["wait", "spill"]
_STATUSES = TypeAdapter(list[TransferStatus])


class _Routes:
    """Requests and answers of the service, without any I/O: what the two clients have in common."""

    def __init__(self, base_url: str, prefix: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._path = f"{prefix.rstrip('/')}/transfers"

    def request(
        self,
        config: dict[str, Any],
        lease_s: float | None,
        ranks: int | None,
        name: str | None,
        buffers: int | None,
        idempotency_key: str | None,
        on_no_consumer: OnNoConsumer | None = None,
        sentinel: int | None = None,
        dry_run: str | None = None,
        labels: Mapping[str, str] | None = None,
        readers: Sequence[str] = (),
    ) -> dict[str, Any]:
        parameters = {
            "lease_s": lease_s,
            "ranks": ranks,
            "name": name,
            "buffers": buffers,
            "on_no_consumer": on_no_consumer,
            "sentinel": sentinel,
            "dry_run": dry_run,
            "tag": query(labels) if labels else None,
            "reader": [*readers] or None,
        }
        return {
            "method": "POST",
            "url": self._path,
            "json": config,
            "params": {key: value for key, value in parameters.items() if value is not None},
            "headers": {} if idempotency_key is None else {"Idempotency-Key": idempotency_key},
        }

    def info(self, transfer: int) -> dict[str, Any]:
        return {"method": "GET", "url": f"{self._path}/{transfer}"}

    def renew(self, transfer: int, lease_s: float) -> dict[str, Any]:
        return {"method": "POST", "url": f"{self._path}/{transfer}/lease", "json": {"lease_s": lease_s}}

    def cancel(self, transfer: int) -> dict[str, Any]:
        return {"method": "DELETE", "url": f"{self._path}/{transfer}"}

    def list(
        self, index: int, limit: int | None, state: JobState | None, others: bool, labels: Mapping[str, str] | None
    ) -> dict[str, Any]:
        parameters = {
            "index": index,
            "limit": limit,
            "state": None if state is None else state.value,
            "others": "true" if others else None,
            "tag": query(labels) if labels else None,
        }
        return {
            "method": "GET",
            "url": self._path,
            "params": {key: value for key, value in parameters.items() if value is not None},
        }


def _checked(response: httpx.Response) -> Any:
    """The answer's document.

    Raises:
        ServiceError: an error status; a refused configuration is told field by field.
    """
    if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
        detail = _field_by_field(response)
        if detail is not None:
            message = f"{response.request.method} {response.request.url} refused the request: {detail}"
            raise ServiceError(message, status=response.status_code, detail=detail)
    response.raise_for_status()
    return response.json()


def _field_by_field(response: httpx.Response) -> str | None:
    try:
        problems = response.json()["detail"]
        return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
    except (ValueError, KeyError, TypeError):
        return None


class TransferClient:
    """A blocking client; close it, or use it in a ``with``.

    Args:
        base_url: where the service listens, such as ``https://dtn.example.org:8446``.
        credentials: who we are.
        prefix: path before the routes.
        timeout: seconds one call may take.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials | Path | str,
        *,
        prefix: str = "/v1",
        timeout: float = http.TIMEOUT_S,
    ) -> None:
        if not isinstance(credentials, Credentials):
            credentials = Credentials(credentials)
        self._routes = _Routes(base_url, prefix)
        self._http = http.client(self._routes.base_url, credentials, timeout=timeout)

    def request(
        self,
        config: dict[str, Any],
        *,
        lease_s: float | None = None,
        ranks: int | None = None,
        name: str | None = None,
        buffers: int | None = None,
        on_no_consumer: OnNoConsumer | None = None,
        sentinel: int | None = 1,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        readers: Sequence[str] = (),
    ) -> TransferStatus:
        """Ask for a transfer.

        Args:
            config: the engine's configuration; its `data_handlers` are replaced by the service.
            lease_s: end the transfer after that many seconds, unless :meth:`renew` is called in time; None: no lease.
            ranks: MPI ranks of the engine; None: the service's default.
            name: a name to find it by.
            buffers: number of buffers, for more bandwidth: pull from all of the answer's `urls`; None: one.
            on_no_consumer: what the buffer does while nobody pulls: `wait`, which holds up the engine when the memory
                is full, or `spill`, which goes on into files and keeps what is left there; None: wait.
            sentinel: empty messages each ZeroMQ consumer gets at the end, which it cannot see otherwise; None: as the
                site has it.
            idempotency_key: the same key again gives the same transfer, not a second one.
            tags: names and values to find it by; the first request's stay.
            readers: who may pull from encrypted buffers besides us and the members of the experiment: logins of our own
                issuer, or `login@issuer`.

        Raises:
            ServiceError: 422 names the wrong field; 409 the key was used for something else; 429 you have as
                many transfers as you may have; 503 no port is free.
        """
        document = self._call(
            self._routes.request(
                config,
                lease_s,
                ranks,
                name,
                buffers,
                idempotency_key,
                on_no_consumer,
                sentinel,
                labels=tags,
                readers=readers,
            )
        )
        return TransferStatus.model_validate(document)

    def plan(self, config: dict[str, Any], *, ranks: int | None = None, buffers: int | None = None) -> TransferPlan:
        """What :meth:`request` would start; nothing is started.

        Raises:
            ServiceError: as for :meth:`request`.
        """
        document = self._call(
            self._routes.request(config, None, ranks, None, buffers, None, sentinel=1, dry_run="true")
        )
        return TransferPlan.model_validate(document)

    def info(self, transfer: int) -> TransferInfo:
        """One transfer, also after its end.

        Raises:
            ServiceError: 404 there is none of that number, or it is somebody else's.
        """
        return TransferInfo.model_validate(self._call(self._routes.info(transfer)))

    def renew(self, transfer: int, lease_s: float) -> float:
        """Move the end of the lease to `lease_s` seconds from now; returns it as seconds since 1970.

        Raises:
            ServiceError: 404 no such transfer; 409 it has ended.
        """
        return Lease.model_validate(self._call(self._routes.renew(transfer, lease_s))).lease_expires

    def cancel(self, transfer: int) -> None:
        """End a transfer: its jobs are stopped and its ports freed. No effect on one that has ended."""
        self._call(self._routes.cancel(transfer))

    def list(
        self,
        *,
        index: int = 0,
        limit: int | None = None,
        state: JobState | None = None,
        others: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> list[TransferStatus]:
        """Our transfers, newest first.

        Args:
            index: how many of the newest to leave out.
            limit: how many at most; None: all.
            state: only those in this (compatible) state.
            others: also those of others that we may see: as a member of their experiment, or as an operator.
            tags: only those that have all of these.
        """
        return _STATUSES.validate_python(self._call(self._routes.list(index, limit, state, others, tags)))

    def _call(self, request: dict[str, Any]) -> Any:
        with http.explained(self._routes.base_url):
            return _checked(self._http.request(**request))

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncTransferClient:
    """The same for an event loop; close it with :meth:`aclose`, or use it in an ``async with``."""

    def __init__(
        self,
        base_url: str,
        credentials: Credentials | Path | str,
        *,
        prefix: str = "/v1",
        timeout: float = http.TIMEOUT_S,
    ) -> None:
        if not isinstance(credentials, Credentials):
            credentials = Credentials(credentials)
        self._routes = _Routes(base_url, prefix)
        self._http = http.async_client(self._routes.base_url, credentials, timeout=timeout)

    async def request(
        self,
        config: dict[str, Any],
        *,
        lease_s: float | None = None,
        ranks: int | None = None,
        name: str | None = None,
        buffers: int | None = None,
        on_no_consumer: OnNoConsumer | None = None,
        sentinel: int | None = 1,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        readers: Sequence[str] = (),
    ) -> TransferStatus:
        """See :meth:`TransferClient.request`."""
        document = await self._call(
            self._routes.request(
                config,
                lease_s,
                ranks,
                name,
                buffers,
                idempotency_key,
                on_no_consumer,
                sentinel,
                labels=tags,
                readers=readers,
            )
        )
        return TransferStatus.model_validate(document)

    async def plan(
        self, config: dict[str, Any], *, ranks: int | None = None, buffers: int | None = None
    ) -> TransferPlan:
        """See :meth:`TransferClient.plan`."""
        document = await self._call(
            self._routes.request(config, None, ranks, None, buffers, None, sentinel=1, dry_run="true")
        )
        return TransferPlan.model_validate(document)

    async def info(self, transfer: int) -> TransferInfo:
        """See :meth:`TransferClient.info`."""
        return TransferInfo.model_validate(await self._call(self._routes.info(transfer)))

    async def renew(self, transfer: int, lease_s: float) -> float:
        """See :meth:`TransferClient.renew`."""
        return Lease.model_validate(await self._call(self._routes.renew(transfer, lease_s))).lease_expires

    async def cancel(self, transfer: int) -> None:
        """See :meth:`TransferClient.cancel`."""
        await self._call(self._routes.cancel(transfer))

    async def list(
        self,
        *,
        index: int = 0,
        limit: int | None = None,
        state: JobState | None = None,
        others: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> list[TransferStatus]:
        """See :meth:`TransferClient.list`."""
        return _STATUSES.validate_python(await self._call(self._routes.list(index, limit, state, others, tags)))

    async def _call(self, request: dict[str, Any]) -> Any:
        async with http.aexplained(self._routes.base_url):
            return _checked(await self._http.request(**request))

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
