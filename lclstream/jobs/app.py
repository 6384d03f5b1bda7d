"""The REST routes of the job service: Psi-k's, below ``/v2``.

A request's owner is its certificate; another owner's job is not there (404). Answers never hold a secret, and neither
do errors: what a client sent is not repeated to it.
"""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from lclstream import __version__
from lclstream.jobs import confined, tags
from lclstream.jobs.backends import RefusedError
from lclstream.jobs.engine import ConflictError, Engine, NoSuchBackendError, NoSuchJobError
from lclstream.jobs.job import Job
from lclstream.jobs.models import (
    JOB_ID,
    BackendInfo,
    Callback,
    FileStat,
    JobSpec,
    JobState,
    JobSummary,
    Lease,
    LeaseRequest,
)
from lclstream.security.identity import Identity
from lclstream.security.roles import Action
from lclstream.security.server import peer_identity

log = logging.getLogger(__name__)

PREFIX = "/v2"
_CHUNK = 1 << 20
#: The status of each error a request can meet.
_STATUS: dict[type[Exception], int] = {
    NoSuchJobError: 404,
    NoSuchBackendError: 404,
    ConflictError: 409,
    RefusedError: 403,
    confined.OutsideFolderError: 403,
    FileNotFoundError: 404,
    IsADirectoryError: 404,
    NotADirectoryError: 404,
    ValueError: 422,
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The job id is malformed, or the body is no JSON"},
    401: {"description": "No client certificate"},
    403: {"description": "Not allowed: an attribute, directory, callback or file name, or a wrong signature"},
    404: {"description": "Not there, or somebody else's"},
    409: {"description": "It contradicts an earlier request"},
    413: {"description": "The body is larger than the service's limit"},
    429: {"description": "More requests a second than the service's limit"},
    507: {"description": "The service's disk is full"},
}

Caller = Annotated[Identity, Depends(peer_identity)]


# Dependencies are `async` so that they run in the event loop, which owns the engine, and not in a thread.
async def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


Jobs = Annotated[Engine, Depends(_engine)]


def _job_for(action: Action) -> Any:
    """A dependency: the job of the path, when the caller may do this with it."""

    async def find(
        jobid: Annotated[str, Path(description="the job's id", json_schema_extra={"pattern": JOB_ID.pattern})],
        caller: Caller,
        engine: Jobs,
    ) -> Job:
        if not JOB_ID.fullmatch(jobid):
            raise HTTPException(400, "malformed job id: a job id is a time stamp such as 1712345678.123")
        return engine.job(jobid, caller, action)

    return Depends(find)


SeenJob = Annotated[Job, _job_for(Action.see)]
ReadJob = Annotated[Job, _job_for(Action.read)]
ChangedJob = Annotated[Job, _job_for(Action.change)]
EndedJob = Annotated[Job, _job_for(Action.cancel)]
Offset = Annotated[int, Query(ge=-(1 << 62), le=1 << 62, description="first byte; a negative one counts from the end")]
Limit = Annotated[int | None, Query(ge=0, le=1 << 62, description="most bytes")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="the same key with the same job gives the job made the first time",
    ),
]

LeaseSeconds = Annotated[
    float | None,
    Query(gt=0, allow_inf_nan=False, description="end the job after that many seconds unless its lease is renewed"),
]


def _asked(
    tag: Annotated[list[str] | None, Query(description="NAME:VALUE; may be given several times")] = None,
) -> dict[str, str]:
    return tags.read(tag or ())


Tags = Annotated[dict[str, str], Depends(_asked)]

router = APIRouter(responses=_ERRORS)


def _both_ways(
    method: Callable[..., Callable[[Callable[..., Awaitable[Any]]], Any]], path: str, **options: Any
) -> Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]:
    """A route with and without a slash at its end, as the published service has it."""

    def add(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        method(path, **options)(function)
        method(path + "/", include_in_schema=False, **options)(function)
        return function

    return add


# --- jobs


@_both_ways(router.post, "/jobs", tags=["jobs"])
async def post_job(
    spec: JobSpec,
    caller: Caller,
    engine: Jobs,
    labels: Tags,
    submit: Annotated[bool, Query(description="whether the job is started at once")] = True,
    lease_s: LeaseSeconds = None,
    idempotency_key: IdempotencyKey = None,
) -> str:
    """Make a job, and start it unless `submit` is false. Returns its id."""
    job = await engine.make(spec, caller, start=submit, idempotency_key=idempotency_key, lease_s=lease_s, tags=labels)
    return job.stamp


@router.post("/jobs/new", tags=["jobs"])
async def new_job(
    spec: JobSpec,
    caller: Caller,
    engine: Jobs,
    labels: Tags,
    lease_s: LeaseSeconds = None,
    idempotency_key: IdempotencyKey = None,
) -> str:
    """Make a job without starting it. Returns its id."""
    job = await engine.make(spec, caller, start=False, idempotency_key=idempotency_key, lease_s=lease_s, tags=labels)
    return job.stamp


@router.post("/jobs/callback", tags=["jobs"])
async def callback(
    request: Request, told: Callback, caller: Caller, engine: Jobs,
    x_hub_signature_256: Annotated[str | None, Header()] = None,
) -> str:  # fmt: skip
    """Take a callback about a job this service forwarded to another one.

    It is believed only as a reason to look: the job's state is then asked from the service that runs it.
    """
    if not engine.told(told, await request.body(), x_hub_signature_256):
        raise HTTPException(403, "no job was forwarded under this id, or x-hub-signature-256 is missing or wrong")
    return "OK"


@_both_ways(router.get, "/jobs", tags=["jobs"])
async def get_jobs(
    caller: Caller,
    engine: Jobs,
    labels: Tags,
    index: Annotated[int, Query(ge=0, description="how many of the newest to skip")] = 0,
    limit: Annotated[int | None, Query(ge=0, description="how many to return at most")] = None,
    backend: Annotated[str | None, Query(description="only jobs of this backend")] = None,
    state: Annotated[JobState | None, Query(description="only jobs in this state")] = None,
    others: Annotated[bool, Query(description="also those of others that you may see")] = False,
) -> list[JobSummary]:
    """The caller's jobs, newest first, each with its latest transition; with `others` an operator gets all.

    With `tag` only those that have all of these tags.
    """
    jobs = [
        job
        for job in engine.jobs(caller, others=others)
        if (backend is None or job.backend == backend)
        and (state is None or job.state is state)
        and tags.match(job.tags, labels)
    ]
    return [job.summary() for job in jobs[index : None if limit is None else index + limit]]


@router.post("/jobs/{jobid}/start", tags=["jobs"])
async def start_job(job: ChangedJob, engine: Jobs) -> None:
    """Start a job that was made without; without effect when it was started already."""
    engine.start_job(job)


@router.post("/jobs/{jobid}/lease", tags=["jobs"])
async def renew_lease(job: ChangedJob, lease: LeaseRequest, engine: Jobs) -> Lease:
    """Let the job's lease end `lease_s` seconds from now; a job without a lease gets one."""
    return Lease(lease_expires=engine.renew(job, lease.lease_s))


@router.get("/jobs/{jobid}", tags=["jobs"])
async def get_job(job: SeenJob) -> list[JobSummary]:
    """The job's history, oldest first."""
    return [job.summary(line) for line in job.history]


@router.get("/jobs/{jobid}/state", tags=["jobs"])
async def get_state(job: SeenJob) -> JobState:
    """The job's present state."""
    return job.state


@router.delete("/jobs/{jobid}", tags=["jobs"])
async def delete_job(job: EndedJob, engine: Jobs) -> None:
    """Ask for the job's end; without effect when it has ended. Its state says when it really has."""
    engine.cancel(job)


# --- logs, scripts, files


@_both_ways(router.get, "/jobs/{jobid}/logs", tags=["files"])
async def get_logs(
    job: SeenJob,
    engine: Jobs,
    name: Annotated[str | None, Query(description="only this log")] = None,
    offset: Offset = 0,
    limit: Limit = None,
) -> dict[str, str]:
    """The job's logs as text, by name: `console`, `stdout.1`, `stderr.1` and so on.

    Without `offset` and `limit` the end of a log that is larger than the service's limit.
    """
    most = engine.config.limits.log_bytes
    if offset == 0 and limit is None:
        offset = -most

    def read() -> dict[str, str]:
        names = [name] if name is not None else [*confined.listing(job.folder.log)]
        return {one: _part(job, one, offset, limit, most)[0].decode(errors="replace") for one in names}

    return await run_in_threadpool(read)


@router.get(
    "/jobs/{jobid}/logs/{name}",
    tags=["files"],
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def get_log(job: SeenJob, engine: Jobs, name: str, offset: Offset = 0, limit: Limit = None) -> Response:
    """A piece of one log as bytes; the headers `x-log-offset` and `x-log-size` say which, and how long it is now."""
    data, start, size = await run_in_threadpool(_part, job, name, offset, limit, engine.config.limits.log_bytes)
    headers = {"x-log-offset": str(start), "x-log-size": str(size)}
    return Response(data, media_type="application/octet-stream", headers=headers)


def _part(job: Job, name: str, offset: int, limit: int | None, most: int) -> tuple[bytes, int, int]:
    with confined.open_to_read(job.folder.log, name) as file:
        size = os.fstat(file.fileno()).st_size
        start = min(size, offset) if offset >= 0 else max(0, size + offset)
        file.seek(start)
        return file.read(most if limit is None else min(limit, most)), start, size


@_both_ways(router.get, "/jobs/{jobid}/scripts", tags=["files"])
async def get_scripts(job: ReadJob, engine: Jobs) -> dict[str, str]:
    """The scripts the job runs, by name."""

    def read() -> dict[str, str]:
        texts = {}
        for name in confined.listing(job.folder.scripts):
            with confined.open_to_read(job.folder.scripts, name) as file:
                texts[name] = file.read(engine.config.limits.body_bytes).decode(errors="replace")
        return texts

    return await run_in_threadpool(read)


def _root(job: Job) -> pathlib.Path:
    return pathlib.Path(job.directory)


@_both_ways(router.get, "/jobs/{jobid}/files", tags=["files"])
async def get_files(job: ReadJob) -> dict[str, FileStat]:
    """The files in the folder the job's script runs in."""
    return await run_in_threadpool(confined.listing, _root(job))


@_both_ways(router.post, "/jobs/{jobid}/files", tags=["files"])
async def post_files(job: ChangedJob, files: list[UploadFile]) -> None:
    """Put files into the folder the job's script runs in; folders in their names are made."""
    for file in files:
        # Refuse all names before the first file is written.
        confined.parts_of(file.filename or "")
    for file in files:
        await run_in_threadpool(_store, job, file.filename or "", file.file)


def _store(job: Job, name: str, source: BinaryIO) -> None:
    with confined.replacing(_root(job), name) as target:
        shutil.copyfileobj(source, target, _CHUNK)


@router.get(
    "/jobs/{jobid}/files/{name:path}",
    tags=["files"],
    response_model=None,
    responses={
        200: {
            "description": "The file's bytes, or what the folder holds",
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": {"type": "object"}},
            },
        }
    },
)
async def get_file(job: ReadJob, name: str) -> Response:
    """One file, or what a folder holds."""
    try:
        file = await run_in_threadpool(confined.open_to_read, _root(job), name)
    except IsADirectoryError:
        found = await run_in_threadpool(confined.listing, _root(job), name)
        return JSONResponse({key: status.model_dump() for key, status in found.items()})
    size = os.fstat(file.fileno()).st_size
    return StreamingResponse(
        _bytes_of(file, size), media_type="application/octet-stream", headers={"content-length": str(size)}
    )


def _bytes_of(file: BinaryIO, size: int) -> Iterator[bytes]:
    with file:
        while size > 0 and (data := file.read(min(size, _CHUNK))):
            size -= len(data)
            yield data


# --- backends


@_both_ways(router.get, "/backends", tags=["backends"])
async def get_backends(
    caller: Caller, engine: Jobs, name: Annotated[str | None, Query(description="only this one")] = None
) -> dict[str, BackendInfo]:
    """Where jobs run."""
    return engine.backends() if name is None else {name: _backend(engine, name)}


@router.get("/backends/{name}", tags=["backends"])
async def get_backend(caller: Caller, engine: Jobs, name: str) -> BackendInfo:
    """Where jobs run, one of them."""
    return _backend(engine, name)


def _backend(engine: Engine, name: str) -> BackendInfo:
    try:
        return engine.backends()[name]
    except KeyError:
        raise HTTPException(404, "no such backend") from None


# --- the application


async def _explained(request: Request, error: Exception) -> Response:
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            detail = error.strerror or "" if isinstance(error, OSError) and error.strerror else str(error)
            return _detail(status, detail)
    assert isinstance(error, OSError)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _detail(507, "the service's disk is full")
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST):
        return _detail(422, error.strerror or str(error))
    log.exception("%s %s", request.method, request.url.path, exc_info=error)
    return _detail(500, "the service could not do this; its log says why")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Without what was sent: it may hold the callback's secret.
    problems = [
        {"loc": [_printable(part) for part in one["loc"]], "msg": _printable(one["msg"]), "type": one["type"]}
        for one in error.errors()
    ]
    malformed = any(one["type"] == "json_invalid" for one in problems)
    return JSONResponse({"detail": problems}, 400 if malformed else 422)


def _printable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _detail(status: int, text: str) -> Response:
    return JSONResponse({"detail": _printable(text)}, status)


def create_app(engine: Engine) -> FastAPI:
    """The application; the engine runs from its start to its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="LCLStream jobs",
        summary="Batch jobs and their files, as Psi-k describes them",
        version=__version__,
        lifespan=lifespan,
        docs_url=f"{PREFIX}/docs",
        openapi_url=f"{PREFIX}/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.engine = engine
    app.include_router(router, prefix=PREFIX)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in (*_STATUS, OSError):
        app.add_exception_handler(kind, _explained)
    return app
