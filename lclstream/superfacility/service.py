"""The REST routes of the Superfacility stand-in, below ``/api/v1.2``, and the token route ``/c2id/token``.

As at NERSC, what goes wrong *on the machine* is an answer 200 with ``"status": "ERROR"``; what is wrong with a request
is an HTTP error. ``status`` and ``meta`` are open to everybody, everything else wants a token.
"""

from __future__ import annotations

import base64
import datetime
import logging
import os
import pwd
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, Header, HTTPException, Query, Request, UploadFile
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from lclstream import __version__
from lclstream.config_file import ConfigError
from lclstream.jobs.engine import Engine, NoSuchJobError
from lclstream.superfacility import standing
from lclstream.superfacility.compute import Compute, SubmissionError
from lclstream.superfacility.config import API_PATH, TOKEN_PATH, SuperfacilityConfig
from lclstream.superfacility.files import FileRefusedError, UserFiles
from lclstream.superfacility.tokens import ASSERTION_TYPE, RefusedClientError, Tokens

log = logging.getLogger(__name__)

_NO_COMMANDS = "this service runs no commands of its own: submit a job"


class Service:
    """What the routes work with.

    Args:
        config: the configuration.
        engine: runs the jobs.

    Raises:
        ConfigError: a client's key cannot be used.
    """

    def __init__(self, config: SuperfacilityConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.compute = Compute(engine, config)
        self.users = {client.id: client.user for client in config.clients}
        self.tokens = Tokens(config.public_keys(), audience=config.base_url + TOKEN_PATH, lifetime_s=config.token_s)
        self.files = config.files.expanduser().resolve()

    def standing(self) -> dict[str, standing.Standing]:
        """How the machines stand now."""
        try:
            return standing.read(self.config.status, self.config.machines)
        except ConfigError as error:
            log.error("%s", error)
            raise HTTPException(503, "the file of machine states cannot be used; the service's log says why") from error


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Ours = Annotated[Service, Depends(_service)]


def _user(ours: Ours, authorization: Annotated[str, Header()] = "") -> UserFiles:
    """The user a token belongs to."""
    scheme, _, token = authorization.partition(" ")
    client = ours.tokens.client_of(token) if scheme.lower() == "bearer" else None
    if client is None:
        raise HTTPException(401, "no token, or one that is not good (any more)", {"www-authenticate": "Bearer"})
    return UserFiles(ours.files, ours.users[client])


User = Annotated[UserFiles, Depends(_user)]


def _known(machine: str, ours: Ours) -> str:
    if machine not in ours.config.machines:
        raise HTTPException(404, f"machine {machine!r}: this service has {', '.join(sorted(ours.config.machines))}")
    if ours.standing()[machine].status == "unavailable":
        raise HTTPException(503, f"{machine} is unavailable")
    return machine


Machine = Annotated[str, Depends(_known)]

open_routes = APIRouter()
api = APIRouter()


@open_routes.post(TOKEN_PATH)
async def token(
    ours: Ours,
    grant_type: Annotated[str, Form()] = "",
    client_assertion_type: Annotated[str, Form()] = "",
    client_assertion: Annotated[str, Form()] = "",
) -> JSONResponse:
    """A token for a client that signs an assertion with its key."""
    try:
        if grant_type != "client_credentials":
            return JSONResponse({"error": "unsupported_grant_type"}, 400)
        if client_assertion_type != ASSERTION_TYPE:
            raise RefusedClientError("client_assertion_type: a signed JWT is needed (private_key_jwt)")
        answer = ours.tokens.issue(client_assertion)
    except RefusedClientError as error:
        return JSONResponse({"error": "invalid_client", "error_description": str(error)}, 401)
    return JSONResponse(answer, headers={"cache-control": "no-store"})


# --- meta, status: without a token


@open_routes.get(f"{API_PATH}/meta/changelog")
def changelog() -> list[dict[str, str]]:
    """What has changed."""
    return [{"date": "2026-01-01", "change": f"stand-in of lclstream {__version__}"}]


@open_routes.get(f"{API_PATH}/meta/config")
def configuration(ours: Ours) -> list[dict[str, str]]:
    """Limits."""
    return [{"key": "download_bytes", "value": str(ours.config.download_bytes)}]


@open_routes.get(f"{API_PATH}/status")
def all_states(ours: Ours) -> list[dict[str, Any]]:
    """How all machines stand."""
    return [_state(name, one) for name, one in ours.standing().items()]


@open_routes.get(f"{API_PATH}/status/outages")
def all_outages(ours: Ours) -> list[list[dict[str, Any]]]:
    """Outages of all machines."""
    return [_outages(name, one) for name, one in ours.standing().items()]


@open_routes.get(f"{API_PATH}/status/outages/planned")
def all_planned(ours: Ours) -> list[list[dict[str, Any]]]:
    """Planned outages of all machines."""
    return [_outages(name, one, planned=True) for name, one in ours.standing().items()]


@open_routes.get(f"{API_PATH}/status/outages/planned/{{name}}")
def planned(name: str, ours: Ours) -> list[dict[str, Any]]:
    """Planned outages of one machine."""
    return _outages(name, _one(name, ours), planned=True)


@open_routes.get(f"{API_PATH}/status/outages/{{name}}")
def outages(name: str, ours: Ours) -> list[dict[str, Any]]:
    """Outages of one machine."""
    return _outages(name, _one(name, ours))


@open_routes.get(f"{API_PATH}/status/notes")
def all_notes(ours: Ours) -> list[list[dict[str, Any]]]:
    """Notes on all machines."""
    return [_notes(name, one) for name, one in ours.standing().items()]


@open_routes.get(f"{API_PATH}/status/notes/{{name}}")
def notes(name: str, ours: Ours) -> list[dict[str, Any]]:
    """Notes on one machine."""
    return _notes(name, _one(name, ours))


@open_routes.get(f"{API_PATH}/status/{{name}}")
def state(name: str, ours: Ours) -> dict[str, Any]:
    """How one machine stands."""
    return _state(name, _one(name, ours))


def _one(name: str, ours: Service) -> standing.Standing:
    known = ours.standing()
    if name not in known:
        raise HTTPException(404, f"resource {name!r}: this service has {', '.join(sorted(known))}")
    return known[name]


def _state(name: str, one: standing.Standing) -> dict[str, Any]:
    return {
        "name": name,
        "full_name": name.capitalize(),
        "description": one.description,
        "system_type": "compute",
        "notes": one.notes,
        "status": one.status,
        "updated_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def _outages(name: str, one: standing.Standing, *, planned: bool = False) -> list[dict[str, Any]]:
    return [
        {"name": name, **outage.model_dump(mode="json")}
        for outage in one.outages
        if not planned or outage.status == "Planned"
    ]


def _notes(name: str, one: standing.Standing) -> list[dict[str, Any]]:
    return [{"name": name, "notes": text, "active": True} for text in one.notes]


# --- account


@api.get("/account")
@api.get("/account/")
def account(user: User, username: str | None = None) -> dict[str, Any]:
    """Who the token's user is."""
    if username not in (None, user.name):
        raise HTTPException(404, "users can only see themselves here")
    me = pwd.getpwuid(os.getuid())
    return {"uid": me.pw_uid, "name": user.name, "firstname": user.name, "lastname": "", "email": None}


@api.get("/account/projects")
def projects(user: User, ours: Ours) -> list[dict[str, Any]]:
    """The user's projects."""
    return [
        {"id": number, "repo_name": one.name, "description": one.description, "iris_role": "user"}
        for number, one in enumerate(ours.config.projects, 1)
        if user.name in one.users
    ]


@api.get("/account/roles")
def roles(user: User, ours: Ours) -> list[dict[str, Any]]:
    """The user's roles: one a project."""
    return projects(user, ours)


@api.get("/account/groups")
def groups(user: User) -> dict[str, Any]:
    """The user's groups: none."""
    return {"groups": []}


@api.get("/account/clients")
def clients(user: User, ours: Ours) -> list[dict[str, Any]]:
    """The user's clients; theirs do not expire."""
    return [
        {"name": one.id, "clientId": one.id, "expiresAt": "never", "comments": None}
        for one in ours.config.clients
        if one.user == user.name
    ]


# --- jobs and tasks: the event loop owns the engine, so none of these may run in a thread


@api.post("/compute/jobs/{machine}")
async def submit(
    machine: Machine,
    user: User,
    ours: Ours,
    job: Annotated[str, Form()],
    is_path: Annotated[bool, Form(alias="isPath")],
    args: Annotated[list[str] | None, Form()] = None,
) -> dict[str, Any]:
    """Submit a script; the task says what its job's number is."""
    try:
        task = await ours.compute.submit(user, machine, job, is_path, args or [])
    except (SubmissionError, FileRefusedError) as error:
        return {"task_id": "", "status": "ERROR", "error": _words(error)}
    return {"task_id": task, "status": "OK", "error": None}


@api.get("/compute/jobs/{machine}")
@api.get("/compute/jobs/{machine}/{number}")
async def jobs(
    machine: Machine,
    user: User,
    ours: Ours,
    number: str | None = None,
    sacct: bool = False,
    cached: bool = True,
    kwargs: Annotated[list[str] | None, Query()] = None,
) -> dict[str, Any]:
    """Jobs, as `squeue` or `sacct` shows them; `kwargs` are ``jobid=1,2``, ``user=…``, ``partition=…``, ``name=…``."""
    wanted = {"jobid": {number}} if number is not None else {}
    for one in kwargs or []:
        name, _, values = one.partition("=")
        if name not in ("jobid", "user", "partition", "name"):
            return {"status": "ERROR", "output": [], "error": f"{name}: not known here"}
        wanted[name] = set(values.split(","))
    return {"status": "OK", "output": await ours.compute.query(user.name, machine, wanted, ended=sacct), "error": None}


@api.delete("/compute/jobs/{machine}/{number}")
async def cancel(machine: Machine, number: str, user: User, ours: Ours) -> dict[str, Any]:
    """Ask for a job's end."""
    try:
        ours.compute.cancel(user.name, machine, number)
    except NoSuchJobError as error:
        return {"task_id": "", "status": "ERROR", "error": str(error)}
    return {"task_id": "", "status": "OK", "error": None}


@api.get("/tasks")
async def tasks(user: User, ours: Ours) -> dict[str, Any]:
    """The user's tasks."""
    return {"tasks": ours.compute.tasks(user.name)}


@api.get("/tasks/{task}")
async def task(task: str, user: User, ours: Ours) -> dict[str, Any]:
    """One task."""
    try:
        return ours.compute.task(user.name, task)
    except NoSuchJobError as error:
        raise HTTPException(404, f"no task {task}") from error


# --- files


@api.get("/utilities/ls/{machine}/{path:path}")
def listing(machine: Machine, path: str, user: User) -> dict[str, Any]:
    """What is in a folder, or one file's line."""
    try:
        return {"status": "OK", "entries": user.listing(path), "error": None}
    except FileRefusedError as error:
        return {"status": "ERROR", "entries": [], "error": f"ls: {_words(error)}"}


@api.get("/utilities/download/{machine}/{path:path}")
def download(machine: Machine, path: str, user: User, ours: Ours, binary: bool = False) -> dict[str, Any]:
    """A file: its text, or base64 of its bytes with `binary`."""
    try:
        data = user.read(path, ours.config.download_bytes)
        text = base64.b64encode(data).decode() if binary else data.decode()
    except FileRefusedError as error:
        return {"status": "ERROR", "file": None, "is_binary": binary, "error": _words(error)}
    except UnicodeDecodeError:
        return {"status": "ERROR", "file": None, "is_binary": False, "error": f"{path}: is no text: ask with binary"}
    return {"status": "OK", "file": text, "is_binary": binary, "error": None}


@api.put("/utilities/upload/{machine}/{path:path}")
async def upload(machine: Machine, path: str, user: User, file: UploadFile) -> dict[str, Any]:
    """Put a file."""
    try:
        await run_in_threadpool(user.write, path, file.file)
    except FileRefusedError as error:
        return {"status": "ERROR", "output": None, "error": _words(error)}
    return {"status": "OK", "output": None, "error": None}


@api.post("/utilities/command/{machine}")
def command(machine: Machine, user: User) -> dict[str, Any]:
    """No commands are run here."""
    return {"task_id": "", "status": "ERROR", "error": _NO_COMMANDS}


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else None) or str(error)


def create_app(config: SuperfacilityConfig, engine: Engine) -> FastAPI:
    """The application; the engine runs from its start to its end.

    Raises:
        ConfigError: a client's key cannot be used.
    """
    service = Service(config, engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="Superfacility stand-in",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=f"{API_PATH}/openapi.json",
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(open_routes)
    app.include_router(api, prefix=API_PATH)
    return app
