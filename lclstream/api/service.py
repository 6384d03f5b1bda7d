"""The FastAPI application: routes of the published service, ours beside them, and the supervisor while it runs."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import from_json
from sqlalchemy.exc import OperationalError

from lclstream import __version__
from lclstream.api import answers, callbacks, launch, readers, wanted
from lclstream.api.config import ApiConfig
from lclstream.api.driver import JobService, StatusReader
from lclstream.api.models import (
    ClientName,
    JobState,
    Lease,
    LeaseRequest,
    TransferInfo,
    TransferPlan,
    TransferStatus,
)
from lclstream.api.states import Event
from lclstream.api.status import HttpsStatusReader
from lclstream.api.store import (
    KeyReusedError,
    NoFreePortError,
    Note,
    Order,
    QuotaError,
    Receipt,
    Role,
    Store,
    states_seen_as,
)
from lclstream.api.supervisor import Supervisor
from lclstream.api.tables import TransferRow
from lclstream.config_file import ConfigError
from lclstream.jobs import tags
from lclstream.jobs.client import AsyncJobClient
from lclstream.jobs.models import Callback, Transition
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.roles import NOBODY, Action, Person, Roles, RolesFile
from lclstream.security.server import peer_identity
from lclstreamer.config import Parameters

log = logging.getLogger(__name__)

#: The largest number SQLite and PostgreSQL give to a row.
_MAX_ID = 2**63 - 1
_BODY_SCHEMA = "EngineConfiguration"

Owner = Annotated[Identity, Depends(peer_identity)]
TransferNumber = Annotated[int, Path(alias="id", ge=1, le=_MAX_ID, description="the transfer's number")]


def create_app(
    config: ApiConfig,
    store: Store,
    *,
    jobs: Callable[[], JobService] | None = None,
    reader: Callable[[str], StatusReader] | None = None,
) -> FastAPI:
    """The service.

    Args:
        config: its configuration.
        store: the transfers; the caller closes it.
        jobs: makes the client of the job service, in the event loop; None: the configured one.
        reader: makes a reader of a buffer's status from its URL; None: over mutual TLS.
    """
    credentials = Credentials(config.credentials)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service: Any = (
            AsyncJobClient(config.job_service.url, credentials, prefix=config.job_service.prefix)
            if jobs is None
            else jobs()
        )
        readers = reader or (lambda url: HttpsStatusReader(url, credentials))
        try:
            async with Supervisor(store, service, config, readers) as supervisor:
                app.state.supervisor = supervisor
                yield
        finally:
            if jobs is None:
                await service.aclose()

    app = FastAPI(
        title="LCLStream API",
        summary="Streams the events of a run to where they are wanted.",
        description="POST an engine configuration, get a URI to pull from. Every call is made with a certificate.",
        version=__version__,
        lifespan=lifespan,
    )
    app.state.config, app.state.store = config, store
    app.state.roles = None if config.roles is None else RolesFile(config.roles)
    app.include_router(transfers, prefix="/v1")
    app.include_router(callback, prefix="/v1")
    app.add_exception_handler(OperationalError, _database_away)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _database_away(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s: database: %s", request.method, request.url.path, error)
    return JSONResponse(
        {"detail": "the service's database does not answer: try again later"}, 503, {"Retry-After": "5"}
    )


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document with the engine's own models as the body of `POST /transfers`."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
        )
        schema = Parameters.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(schema.pop("$defs", {}))
        schema["required"] = [name for name in schema.get("required", []) if name != "data_handlers"]
        schemas[_BODY_SCHEMA] = {**schema, "title": _BODY_SCHEMA}
        schemas["Callback"] = Callback.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas["Callback"].pop("$defs", None)
        app.openapi_schema = document
    return app.openapi_schema


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _config(request: Request) -> ApiConfig:
    config: ApiConfig = request.app.state.config
    return config


def _roles(request: Request) -> Roles:
    file: RolesFile | None = request.app.state.roles
    return NOBODY if file is None else file.current


def _supervisor(request: Request) -> Supervisor:
    supervisor: Supervisor = request.app.state.supervisor
    return supervisor


async def _raw_body(request: Request) -> bytes:
    """The body as it came: a signature is over these bytes, and a document is not read beyond the limit."""
    limit = _config(request).max_request_bytes
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HTTPException(413, f"the request is larger than {limit} bytes")
    return bytes(body)


def _tags(
    tag: Annotated[list[str] | None, Query(description="NAME:VALUE; may be given several times")] = None,
) -> dict[str, str]:
    try:
        return tags.read(tag or ())
    except ValueError as error:
        raise _wrong(("query", "tag"), str(error)) from error


TheStore = Annotated[Store, Depends(_store)]
TheConfig = Annotated[ApiConfig, Depends(_config)]
TheRoles = Annotated[Roles, Depends(_roles)]
TheSupervisor = Annotated[Supervisor, Depends(_supervisor)]
RawBody = Annotated[bytes, Depends(_raw_body)]
Tags = Annotated[dict[str, str], Depends(_tags)]


def _body_of(schema: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _said(text: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}}
    return {"description": text, "content": content}


_REFUSED = {401: _said("no certificate"), 503: _said("the database does not answer")}
transfers = APIRouter(prefix="/transfers", tags=["transfers"], responses=_REFUSED)  # type: ignore[arg-type]
callback = APIRouter(prefix="/callback", tags=["callbacks"], responses=_REFUSED)  # type: ignore[arg-type]


@transfers.post(
    "",
    openapi_extra=_body_of(_BODY_SCHEMA),
    responses={
        403: _said("these data are for others: the text says by which rule"),
        409: _said("the key was used for something else"),
        413: _said("the request is too large"),
        422: {"description": "a field is wrong: `loc` is its path"},
        429: _said("you have as many transfers as you may have"),
        503: _said("no port is free, or the database does not answer"),
    },
)
@transfers.post("/", include_in_schema=False)
def request_transfer(
    body: RawBody,
    owner: Owner,
    store: TheStore,
    config: TheConfig,
    roles: TheRoles,
    supervisor: TheSupervisor,
    labels: Tags,
    lease_s: Annotated[
        float | None,
        Query(gt=0, allow_inf_nan=False, description="end it after that many seconds unless the lease is renewed"),
    ] = None,
    ranks: Annotated[int | None, Query(ge=1, le=10**6, description="MPI ranks of the engine")] = None,
    name: Annotated[str, Query(pattern=r"^[A-Za-z0-9._:-]{0,128}$", description="a name to find it by")] = "",
    buffers: Annotated[int, Query(ge=1, le=1000, description="buffers, each with its own address to pull from")] = 1,
    on_no_consumer: Annotated[
        Literal["wait", "spill"],
        Query(description="what the buffer does while nobody pulls: wait, or go on into files"),
    ] = "wait",
    sentinel: Annotated[
        int | None, Query(ge=0, le=1000, description="empty messages each ZeroMQ consumer gets at the end")
    ] = None,
    reader: Annotated[
        list[str] | None,
        Query(max_length=100, description="LOGIN or LOGIN@ISSUER who may pull as well; may be given several times"),
    ] = None,
    dry_run: Annotated[bool, Query(description="say what would be started, and start nothing")] = False,
    idempotency_key: Annotated[
        str | None,
        Header(pattern=r"^[!-~]{1,255}$", description="the same key again gives the same transfer, not a second one"),
    ] = None,
) -> TransferStatus | TransferPlan:
    """Ask for a transfer: the answer's `url` is where to pull from, as soon as its `phase` is `ready`.

    The body is the engine's configuration. Its `data_handlers` are replaced by the transfer's buffer.
    """
    _check_lease(lease_s, config)
    ranks = ranks or config.engine.ranks
    if ranks > config.engine.max_ranks:
        raise _wrong(
            ("query", "ranks"), f"{ranks} ranks are more than the {config.engine.max_ranks} this service gives"
        )
    if buffers > config.buffer.max_per_transfer:
        most = config.buffer.max_per_transfer
        raise _wrong(("query", "buffers"), f"{buffers} buffers are more than the {most} this service gives")
    if on_no_consumer == "spill" and config.buffer.spill is None:
        raise _wrong(
            ("query", "on_no_consumer"), "this service keeps nothing in files (`buffer.spill` is not configured)"
        )
    document = _object(body)
    try:
        parameters, notes = launch.checked(document, config)
        producers = launch.sending_ranks(parameters, ranks)
    except launch.RequestRefusedError as error:
        raise HTTPException(422, [_problem(place, text) for place, text in error.problems]) from error
    data = wanted.wanted(parameters)
    ruling = wanted.ruling(owner, data, roles, config.open_folders)
    if not ruling:
        log.warning("%s (%s) may not have %s: %s", owner.login, owner.issuer, parameters.source_identifier, ruling.rule)
        raise HTTPException(403, ruling.rule)
    try:
        access = readers.access(owner, data.experiment, reader or (), roles, config)
    except ConfigError as error:
        log.error("no transfer can be started: %s", error)
        raise HTTPException(
            500, "this service's configuration is wrong: its log says how; tell the site's staff"
        ) from error
    except ValueError as error:
        raise _wrong(("query", "reader"), str(error)) from error
    asked = {"config": document, "ranks": ranks, "name": name, "buffers": buffers, "spill": on_no_consumer}
    order = Order(
        owner=owner,
        name=name,
        ranks=ranks,
        producers=producers,
        buffers=buffers,
        lease_s=lease_s,
        key=idempotency_key,
        request=asked | ({"readers": sorted(reader)} if reader else {}),
        config=lambda inputs: launch.with_buffers(document, inputs, config),
        experiment=data.experiment,
        spill=on_no_consumer == "spill",
        sentinel=config.buffer.sentinel if sentinel is None else sentinel,
        quota=config.quota,
        tags=labels,
        access=access,
    )
    if dry_run:
        return answers.plan_of(order, parameters, notes, len(store.leased_ports()), config)
    try:
        row, new = store.create(order, config.ports)
    except KeyReusedError as error:
        raise HTTPException(409, str(error)) from error
    except QuotaError as error:
        raise HTTPException(429, str(error), headers={"Retry-After": "60"}) from error
    except NoFreePortError as error:
        raise HTTPException(503, str(error), headers={"Retry-After": "10"}) from error
    if new:
        for note in notes:
            store.note(row.id, Note(ClientName.consumer, JobState.new, note))
        log.info("transfer %d: requested by %s (%s), %d ranks", row.id, owner.login, owner.issuer, ranks)
    elif lease_s is not None and store.renew(row.id, lease_s) is not None:
        row = store.get(row.id) or row
    supervisor.wake(row.id)
    return answers.status(row)


@transfers.get("")
@transfers.get("/", include_in_schema=False)
def list_transfers(
    caller: Owner,
    store: TheStore,
    roles: TheRoles,
    labels: Tags,
    index: Annotated[int, Query(ge=0, le=_MAX_ID, description="how many of the newest to leave out")] = 0,
    limit: Annotated[int | None, Query(ge=0, le=_MAX_ID, description="how many to give")] = None,
    state: Annotated[JobState | None, Query(description="only those in this state")] = None,
    others: Annotated[bool, Query(description="also those of others that you may see")] = False,
) -> list[TransferStatus]:
    """Your transfers, newest first; with `others` those of your experiments too, and an operator gets all.

    With `tag` only those that have all of these tags.
    """
    person = Person.of(caller)
    owner = None if others and person in roles.operators else caller
    experiments = [name for name, members in roles.experiments.items() if others and person in members]
    states = states_seen_as(state)
    rows = store.list(owner, index=index, limit=limit, states=states, experiments=experiments, tags=labels)
    return [answers.status(row) for row in rows]


_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    403: _said("you may see it, and not do this with it"),
    404: _said("there is none of that number among yours"),
}


@transfers.get("/{id}", responses=_NOT_FOUND)
def get_transfer(
    number: TransferNumber, caller: Owner, store: TheStore, roles: TheRoles, supervisor: TheSupervisor
) -> TransferInfo:
    """One transfer with its log and figures, also after its end."""
    row = _allowed(store, roles, number, caller, Action.see)
    return answers.info(row, store.log(number), supervisor.live(number) or row.buffers)


@transfers.delete("/{id}", responses=_NOT_FOUND)
def cancel_transfer(
    number: TransferNumber, caller: Owner, store: TheStore, roles: TheRoles, supervisor: TheSupervisor
) -> None:
    """End a transfer: jobs are stopped, ports freed. No effect on one that has ended."""
    _allowed(store, roles, number, caller, Action.cancel)
    store.happen(number, Event.cancel, f"cancelled by {caller.login}")
    supervisor.wake(number)


@transfers.post(
    "/{id}/lease", responses={**_NOT_FOUND, 409: _said("the transfer has ended"), 422: {"description": "wrong lease"}}
)
def renew_lease(
    number: TransferNumber,
    lease: LeaseRequest,
    caller: Owner,
    store: TheStore,
    roles: TheRoles,
    config: TheConfig,
    supervisor: TheSupervisor,
) -> Lease:
    """Move the end of the lease to `lease_s` seconds from now."""
    row = _allowed(store, roles, number, caller, Action.change)
    _check_lease(lease.lease_s, config)
    expires = store.renew(number, lease.lease_s)
    if expires is None:
        row = store.get(number) or row
        raise HTTPException(409, f"transfer {number} has ended ({row.state}: {row.info}): ask for a new one")
    supervisor.wake(number)
    return Lease(lease_expires=expires)


_SIGNED: dict[int | str, dict[str, Any]] = {403: _said("no or a wrong signature, or not from whom it should come")}
Signature = Annotated[str | None, Header(alias=callbacks.HEADER, max_length=256)]


@callback.post("/producer", openapi_extra=_body_of("Callback"), responses=_SIGNED)
def producer_callback(
    body: RawBody,
    store: TheStore,
    roles: TheRoles,
    supervisor: TheSupervisor,
    sender: Owner,
    signature: Signature = None,
) -> bool:
    """What the job service says about an engine job. The same again, from the same sender, is without effect."""
    return _callback(Role.engine, body, signature, sender, roles, store, supervisor)


@callback.post("/forwarder", openapi_extra=_body_of("Callback"), responses=_SIGNED)
def forwarder_callback(
    body: RawBody,
    store: TheStore,
    roles: TheRoles,
    supervisor: TheSupervisor,
    sender: Owner,
    signature: Signature = None,
) -> bool:
    """What the job service says about a buffer job. The same again, from the same sender, is without effect."""
    return _callback(Role.buffer, body, signature, sender, roles, store, supervisor)


def _callback(
    role: Role,
    body: bytes,
    signature: str | None,
    sender: Identity,
    roles: Roles,
    store: Store,
    supervisor: Supervisor,
) -> bool:
    try:
        news = Callback.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise HTTPException(422, [_problem(("body", *map(str, one["loc"])), one["msg"]) for one in problems]) from error
    job = store.job_by_id(role, news.jobid)
    # The same answer for an unknown job and a wrong signature: a stranger learns nothing about our jobs.
    if job is None or not callbacks.is_signed(job.spec["cb_secret"], body, signature):
        raise HTTPException(403, f"{callbacks.HEADER} is not the signature of this callback with the job's secret")
    ruling = roles.may(sender, Action.call_back)
    if roles.services and not ruling:
        log.warning("job %s: a callback with the right signature is refused: %s", job.jobid, ruling.rule)
        raise HTTPException(403, ruling.rule)
    transition = Transition(time=store.clock(), jobndx=news.jobndx, state=news.state, info=news.info)
    receipt = store.accept_callback(job.id, body, transition, sender)
    if receipt is Receipt.replayed:
        log.warning("job %s: %s replayed a callback that another one had sent", job.jobid, sender.login)
        raise HTTPException(403, "this callback was received before, from another sender: it is not accepted again")
    if receipt is Receipt.taken:
        supervisor.wake(job.transfer)
    return True


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _wrong(("body",), f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _wrong(
            ("body",), f"the engine's configuration is an object with its sections, not {type(document).__name__}"
        )
    return document


def _check_lease(lease_s: float | None, config: ApiConfig) -> None:
    if lease_s is not None and (lease_s > config.max_lease_s or not math.isfinite(lease_s)):
        raise _wrong(
            ("lease_s",), f"{lease_s:g} s is longer than the {config.max_lease_s:g} s this service gives: renew it"
        )


def _wrong(place: tuple[str, ...], text: str) -> HTTPException:
    return HTTPException(422, [_problem(place, text)])


def _problem(place: tuple[str, ...], text: str) -> dict[str, Any]:
    return {"loc": list(place), "msg": text, "type": "value_error"}


def _allowed(store: Store, roles: Roles, number: int, caller: Identity, action: Action) -> TransferRow:
    """The transfer, if the caller may do that with it."""
    row = store.get(number)
    if row is None:
        raise HTTPException(404, f"you ({caller.login}) have no transfer {number}")
    owner = Person(login=row.owner, issuer=row.issuer)
    if not roles.may(caller, Action.see, owner=owner, experiment=row.experiment):
        # The same words as for a number that was never given: a stranger does not learn which there are.
        raise HTTPException(404, f"you ({caller.login}) have no transfer {number}")
    ruling = roles.may(caller, action, owner=owner, experiment=row.experiment)
    if not ruling:
        raise HTTPException(403, ruling.rule)
    return row
