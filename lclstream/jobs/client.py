"""Typed clients of a job service: ours, or the published psik-api 2.x, which lies below ``/v2`` as well.

Every call may raise :class:`lclstream.security.errors.PeerError`: `AuthenticationError` (wrong certificate),
`UnreachableError` (try again later), `ServiceError` with the service's own words and `.status` (404 for a job that is
not there or belongs to somebody else). `.retry` says whether the same call may succeed later; a submission is safe to
repeat when it carries an idempotency key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter

from lclstream.jobs.models import (
    JOB_ID,
    BackendInfo,
    FileStat,
    JobSpec,
    JobState,
    JobSummary,
    Lease,
    LogPart,
    Transition,
)
from lclstream.jobs.tags import query
from lclstream.security.credentials import Credentials
from lclstream.security.http import TIMEOUT_S, aexplained, async_client, client, explained

_summaries = TypeAdapter(list[JobSummary])
_files = TypeAdapter(dict[str, FileStat])
_texts = TypeAdapter(dict[str, str])
_backends = TypeAdapter(dict[str, BackendInfo])
_state = TypeAdapter(JobState)
_id = TypeAdapter(str)
_lease = TypeAdapter(Lease)


@dataclass(frozen=True)
class _Call:
    """One HTTP request, made the same way by both clients."""

    method: str
    path: str
    params: Mapping[str, str | list[str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    files: list[tuple[str, tuple[str, bytes, str]]] | None = None

    def request(self, prefix: str) -> dict[str, Any]:
        return {
            "method": self.method,
            "url": prefix + self.path,
            "params": self.params,
            "headers": self.headers,
            "json": self.json,
            "files": self.files,
        }


def _job(jobid: str, rest: str = "") -> str:
    if not JOB_ID.fullmatch(jobid):
        raise ValueError(f"{jobid!r} is no job id: a job id is a time stamp such as 1712345678.123")
    return f"/jobs/{jobid}{rest}"


def _files_in(jobid: str, folder: str) -> str:
    return _job(jobid, f"/files/{quote(folder)}" if folder else "/files")


def _submission(
    spec: JobSpec | Mapping[str, Any],
    *,
    submit: bool,
    idempotency_key: str | None,
    lease_s: float | None,
    tags: Mapping[str, str] | None,
) -> _Call:
    checked = spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec)
    headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
    params: dict[str, str | list[str]] = {} if submit else {"submit": "false"}
    if lease_s is not None:
        params["lease_s"] = repr(lease_s)
    if tags:
        params["tag"] = query(tags)
    return _Call("POST", "/jobs", params=params, headers=headers, json=checked.document())


def _renewal(jobid: str, lease_s: float) -> _Call:
    return _Call("POST", _job(jobid, "/lease"), json={"lease_s": lease_s})


def _upload(jobid: str, name: str, data: bytes) -> _Call:
    return _Call("POST", _job(jobid, "/files"), files=[("files", (name, data, "application/octet-stream"))])


def _listing(
    index: int,
    limit: int | None,
    state: JobState | None,
    backend: str | None,
    others: bool,
    tags: Mapping[str, str] | None,
) -> _Call:
    params: dict[str, str | list[str]] = {"index": str(index)}
    if limit is not None:
        params["limit"] = str(limit)
    if state is not None:
        params["state"] = state.value
    if backend is not None:
        params["backend"] = backend
    if others:
        params["others"] = "true"
    if tags:
        params["tag"] = query(tags)
    return _Call("GET", "/jobs", params=params)


def _span(name: str | None, offset: int, limit: int | None) -> dict[str, str]:
    params = {} if name is None else {"name": name}
    if offset:
        params["offset"] = str(offset)
    if limit is not None:
        params["limit"] = str(limit)
    return params


def _log_part(response: httpx.Response) -> LogPart:
    return LogPart(
        data=response.content,
        offset=int(response.headers["x-log-offset"]),
        size=int(response.headers["x-log-size"]),
    )


class JobClient:
    """A blocking client; use it in a ``with`` or close it.

    Args:
        base_url: such as ``https://psik.example.org:8447``.
        credentials: our certificate folder.
        prefix: path before ``/jobs``.
        timeout: seconds a call may take.
    """

    def __init__(
        self, base_url: str, credentials: Credentials, *, prefix: str = "/v2", timeout: float = TIMEOUT_S
    ) -> None:
        self.url = base_url.rstrip("/")
        self._prefix = prefix.rstrip("/")
        self._http = client(self.url, credentials, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _do(self, call: _Call) -> httpx.Response:
        with explained(self.url):
            return self._http.request(**call.request(self._prefix)).raise_for_status()

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        lease_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Make a job and start it; returns its id.

        Args:
            spec: the job.
            idempotency_key: the same key with the same specification gives the same job, however often it is sent.
            lease_s: end the job after that many seconds, unless :meth:`renew` is called in time; None: no lease. The
                published service knows no leases and takes no notice.
            tags: names and values to find it by; the first submission's stay. The published service drops them.
        """
        call = _submission(spec, submit=True, idempotency_key=idempotency_key, lease_s=lease_s, tags=tags)
        return _id.validate_json(self._do(call).content)

    def create(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        lease_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Make a job without starting it, so that files can be uploaded first; returns its id."""
        call = _submission(spec, submit=False, idempotency_key=idempotency_key, lease_s=lease_s, tags=tags)
        return _id.validate_json(self._do(call).content)

    def renew(self, jobid: str, lease_s: float) -> float:
        """Let the job's lease end `lease_s` seconds from now, and return when that is as unix time (our service only).

        Raises:
            ServiceError: `status` 409 for a job that has ended or is being cancelled; 404 for one that is not there,
                and for every job of the published service.
        """
        return _lease.validate_json(self._do(_renewal(jobid, lease_s)).content).lease_expires

    def start(self, jobid: str) -> None:
        """Start a job made by :meth:`create`; without effect when it was started already."""
        self._do(_Call("POST", _job(jobid, "/start")))

    def cancel(self, jobid: str) -> None:
        """Ask for the job's end; without effect on a finished job. Its state says when it has really ended."""
        self._do(_Call("DELETE", _job(jobid)))

    def state(self, jobid: str) -> JobState:
        """The job's present state."""
        return _state.validate_json(self._do(_Call("GET", _job(jobid, "/state"))).content)

    def history(self, jobid: str) -> list[Transition]:
        """All states the job reached, oldest first."""
        lines = _summaries.validate_json(self._do(_Call("GET", _job(jobid))).content)
        return [line.transition for line in lines]

    def list(
        self,
        *,
        index: int = 0,
        limit: int | None = None,
        state: JobState | None = None,
        backend: str | None = None,
        others: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> list[JobSummary]:
        """Our jobs, newest first.

        Args:
            index: how many of the newest to skip.
            limit: how many to return at most.
            state: only jobs in this state.
            backend: only jobs of this backend.
            others: also other people's, where we may see them (our service only).
            tags: only those that have all of these (our service only: another one's jobs have none).
        """
        return _summaries.validate_json(self._do(_listing(index, limit, state, backend, others, tags)).content)

    def upload(self, jobid: str, name: str, data: bytes) -> None:
        """Put a file into the folder the job's script runs in; folders in `name` are made."""
        self._do(_upload(jobid, name, data))

    def files(self, jobid: str, folder: str = "") -> dict[str, FileStat]:
        """The files in the folder the job's script runs in, or in a folder below it, by name."""
        return _files.validate_json(self._do(_Call("GET", _files_in(jobid, folder))).content)

    def download(self, jobid: str, path: str) -> bytes:
        """The bytes of one file, by its path in the folder the job's script runs in."""
        return self._do(_Call("GET", _job(jobid, f"/files/{quote(path)}"))).content

    def logs(self, jobid: str, name: str | None = None, offset: int = 0, limit: int | None = None) -> dict[str, str]:
        """The job's logs as text, by name: ``console``, ``stdout.1``, ``stderr.1`` and so on.

        Args:
            jobid: the job.
            name: only this log.
            offset: first byte; a negative one counts from the end.
            limit: most bytes of each log.
        """
        return _texts.validate_json(self._do(_Call("GET", _job(jobid, "/logs"), _span(name, offset, limit))).content)

    def log_part(self, jobid: str, name: str, offset: int = 0, limit: int | None = None) -> LogPart:
        """A piece of one log as bytes, to follow a log while it grows (our service only)."""
        return _log_part(self._do(_Call("GET", _job(jobid, f"/logs/{quote(name)}"), _span(None, offset, limit))))

    def scripts(self, jobid: str) -> dict[str, str]:
        """The scripts the job runs, by name."""
        return _texts.validate_json(self._do(_Call("GET", _job(jobid, "/scripts"))).content)

    def backends(self) -> dict[str, BackendInfo]:
        """Where the service runs jobs, by name."""
        return _backends.validate_json(self._do(_Call("GET", "/backends")).content)


class AsyncJobClient:
    """The same calls for an event loop; use it in an ``async with`` or close it with :meth:`aclose`.

    Args:
        base_url: such as ``https://psik.example.org:8447``.
        credentials: our certificate folder.
        prefix: path before ``/jobs``.
        timeout: seconds a call may take.
    """

    def __init__(
        self, base_url: str, credentials: Credentials, *, prefix: str = "/v2", timeout: float = TIMEOUT_S
    ) -> None:
        self.url = base_url.rstrip("/")
        self._prefix = prefix.rstrip("/")
        self._http = async_client(self.url, credentials, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _do(self, call: _Call) -> httpx.Response:
        async with aexplained(self.url):
            return (await self._http.request(**call.request(self._prefix))).raise_for_status()

    async def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        lease_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """See :meth:`JobClient.submit`."""
        call = _submission(spec, submit=True, idempotency_key=idempotency_key, lease_s=lease_s, tags=tags)
        return _id.validate_json((await self._do(call)).content)

    async def create(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        lease_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """See :meth:`JobClient.create`."""
        call = _submission(spec, submit=False, idempotency_key=idempotency_key, lease_s=lease_s, tags=tags)
        return _id.validate_json((await self._do(call)).content)

    async def renew(self, jobid: str, lease_s: float) -> float:
        """See :meth:`JobClient.renew`."""
        return _lease.validate_json((await self._do(_renewal(jobid, lease_s))).content).lease_expires

    async def start(self, jobid: str) -> None:
        """See :meth:`JobClient.start`."""
        await self._do(_Call("POST", _job(jobid, "/start")))

    async def cancel(self, jobid: str) -> None:
        """See :meth:`JobClient.cancel`."""
        await self._do(_Call("DELETE", _job(jobid)))

    async def state(self, jobid: str) -> JobState:
        """See :meth:`JobClient.state`."""
        return _state.validate_json((await self._do(_Call("GET", _job(jobid, "/state")))).content)

    async def history(self, jobid: str) -> list[Transition]:
        """See :meth:`JobClient.history`."""
        lines = _summaries.validate_json((await self._do(_Call("GET", _job(jobid)))).content)
        return [line.transition for line in lines]

    async def list(
        self,
        *,
        index: int = 0,
        limit: int | None = None,
        state: JobState | None = None,
        backend: str | None = None,
        others: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> list[JobSummary]:
        """See :meth:`JobClient.list`."""
        return _summaries.validate_json((await self._do(_listing(index, limit, state, backend, others, tags))).content)

    async def upload(self, jobid: str, name: str, data: bytes) -> None:
        """See :meth:`JobClient.upload`."""
        await self._do(_upload(jobid, name, data))

    async def files(self, jobid: str, folder: str = "") -> dict[str, FileStat]:
        """See :meth:`JobClient.files`."""
        return _files.validate_json((await self._do(_Call("GET", _files_in(jobid, folder)))).content)

    async def download(self, jobid: str, path: str) -> bytes:
        """See :meth:`JobClient.download`."""
        return (await self._do(_Call("GET", _job(jobid, f"/files/{quote(path)}")))).content

    async def logs(
        self, jobid: str, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> dict[str, str]:
        """See :meth:`JobClient.logs`."""
        call = _Call("GET", _job(jobid, "/logs"), _span(name, offset, limit))
        return _texts.validate_json((await self._do(call)).content)

    async def log_part(self, jobid: str, name: str, offset: int = 0, limit: int | None = None) -> LogPart:
        """See :meth:`JobClient.log_part`."""
        return _log_part(await self._do(_Call("GET", _job(jobid, f"/logs/{quote(name)}"), _span(None, offset, limit))))

    async def scripts(self, jobid: str) -> dict[str, str]:
        """See :meth:`JobClient.scripts`."""
        return _texts.validate_json((await self._do(_Call("GET", _job(jobid, "/scripts")))).content)

    async def backends(self) -> dict[str, BackendInfo]:
        """See :meth:`JobClient.backends`."""
        return _backends.validate_json((await self._do(_Call("GET", "/backends"))).content)
