"""The logbook's REST interface as a FastAPI application over :class:`.Logbook`.

The event loop belongs to the server, each call runs in a worker thread with a database transaction of its own, and the
outbox has one more thread, started and stopped with the application. Who calls is read from the certificate.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Literal

import httpx
from fastapi import APIRouter, Body, Depends, FastAPI, Form, HTTPException, Path, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lclstream import __version__
from lclstream.elog import page
from lclstream.elog.config import EXPERIMENT_PATTERN, ElogConfig
from lclstream.elog.database import open_database
from lclstream.elog.logbook import Logbook, RefusedError, UnknownExperimentError
from lclstream.elog.models import RunNumber, Time, Trigger
from lclstream.elog.outbox import Outbox
from lclstream.security.credentials import Credentials
from lclstream.security.errors import PeerError
from lclstream.security.http import client, explained
from lclstream.security.identity import Identity
from lclstream.security.server import Limits, peer_identity

#: A run's parameters are many, but they are numbers and words.
LIMITS = Limits(body_bytes=16 * 2**20, answer_s=60)


class _LogbookJson(Response):
    """JSON as Python writes it: NaN and Infinity are bare tokens, which is what the logbook's clients know."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class _Envelope(BaseModel):
    """Every answer of the logbook."""

    success: bool
    value: Any = None
    errormsg: str | None = None


def _storable(value: Any) -> Any:
    # A lone surrogate is legal in JSON and cannot be stored, logged or published as UTF-8.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text holds half a surrogate pair, which is no character") from error
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("text holds a NUL character")
    return value


_Text = Annotated[str, Field(max_length=100_000), AfterValidator(_storable)]
_Number = Annotated[RunNumber, AfterValidator(_storable)]
_Parameters = Annotated[dict[str, Any], AfterValidator(_storable)]


class _FileBody(BaseModel):
    """A file to register; unknown fields are kept."""

    model_config = ConfigDict(extra="allow")

    path: _Text = Field(min_length=1)
    run_num: _Number | None = None
    checksum: _Text | None = None
    size: int | None = Field(default=None, ge=0)
    create_timestamp: Time | None = None
    modify_timestamp: Time | None = None


class _DefinitionBody(BaseModel):
    """A workflow definition; with `_id` it replaces the one there."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    id: _Text | None = Field(default=None, alias="_id")
    name: _Text = Field(min_length=1, max_length=200)
    executable: _Text = Field(min_length=1)
    trigger: Trigger
    location: _Text = Field(min_length=1)
    parameters: _Text | _Parameters
    run_param_name: _Text | None = None
    run_param_value: Any = None


class _JobBody(BaseModel):
    """A definition, by name, to execute for a run."""

    job_name: _Text
    run_num: _Number


class _CounterBody(BaseModel):
    key: _Text
    value: Any


class _JobUpdateBody(BaseModel):
    """What changed about a job."""

    id: _Text = Field(alias="_id")
    status: _Text | None = None
    counters: list[_CounterBody] | None = None
    tool_id: _Text | int | None = None
    log_file_path: _Text | None = None


_Experiment = Annotated[str, Path(pattern=EXPERIMENT_PATTERN, examples=["mfx100852324"])]
_RunInPath = Annotated[str, Path(min_length=1, max_length=200), AfterValidator(_storable)]
_Caller = Annotated[Identity, Depends(peer_identity)]
_QueryText = Annotated[str, Query(min_length=1, max_length=4096), AfterValidator(_storable)]
_OptionalQueryText = Annotated[str | None, Query(min_length=1, max_length=4096), AfterValidator(_storable)]
_OptionalQueryTime = Annotated[Time | None, Query()]


def _ok(value: Any = None) -> _LogbookJson:
    return _LogbookJson({"success": True, "value": value})


def _logbook(request: Request) -> Logbook:
    logbook: Logbook = request.app.state.logbook
    return logbook


_Book = Annotated[Logbook, Depends(_logbook)]
_runs = APIRouter(dependencies=[Depends(peer_identity)])


def _start_by_get(
    book: _Book,
    experiment: _Experiment,
    run_type: _QueryText = "DATA",
    run_num: _OptionalQueryText = None,
    start_time: _OptionalQueryTime = None,
    sample: _OptionalQueryText = None,
) -> Response:
    """Start a run; an open one is ended first."""
    return _ok(book.start_run(experiment, run_type=run_type, run_num=run_num, start_time=start_time, sample=sample))


def _start_by_post(
    book: _Book,
    experiment: _Experiment,
    run_type: _QueryText = "DATA",
    run_num: _OptionalQueryText = None,
    start_time: _OptionalQueryTime = None,
    sample: _OptionalQueryText = None,
    params: Annotated[_Parameters | None, Body()] = None,
) -> Response:
    """Start a run with parameters; an open one is ended first."""
    return _ok(
        book.start_run(
            experiment, run_type=run_type, run_num=run_num, params=params, start_time=start_time, sample=sample
        )
    )


def _end_run(book: _Book, experiment: _Experiment, end_time: _OptionalQueryTime = None) -> Response:
    """End the current run."""
    return _ok(book.end_run(experiment, end_time))


def _current_run(
    book: _Book, experiment: _Experiment, skip_closed: Annotated[bool, Query(alias="skipClosedRuns")] = False
) -> Response:
    """The run that was started last."""
    run = book.current_run(experiment, skip_closed=skip_closed)
    return _LogbookJson({"success": run is not None, "value": run})


def _add_run_params(
    book: _Book, experiment: _Experiment, params: Annotated[_Parameters, Body()], run_num: _OptionalQueryText = None
) -> Response:
    """Put parameters on a run, the current one unless `run_num` says otherwise."""
    return _ok(book.add_run_params(experiment, params, run_num)) if params else _ok()


def _run_table_editable_update(
    book: _Book,
    caller: _Caller,
    experiment: _Experiment,
    runnum: Annotated[_Text, Form(min_length=1)],
    source: Annotated[_Text, Form(min_length=1)],
    value: Annotated[_Text, Form()],
) -> Response:
    """Change an editable parameter: `source` is ``editable_params.NAME``."""
    name = source.removeprefix("editable_params.").removesuffix(".value")
    if not source.startswith("editable_params.") or not name:
        raise RefusedError(f"source {source!r}: only editable parameters can be changed (editable_params.NAME)")
    return _ok(book.update_editable(experiment, runnum, name, value, caller.login))


def _all_runs(
    book: _Book, experiment: _Experiment, include_params: Annotated[bool, Query(alias="includeParams")] = True
) -> Response:
    """All runs, the latest first."""
    return _ok(book.runs(experiment, include_params=include_params))


def _one_run(book: _Book, experiment: _Experiment, run_num: _RunInPath) -> Response:
    """One run."""
    return _ok(book.run(experiment, run_num))


def _runs_matching_params(book: _Book, experiment: _Experiment, params: Annotated[_Parameters, Body()]) -> Response:
    """Numbers of the runs whose parameters all have these values."""
    if not params:
        raise RefusedError("name at least one parameter and its value")
    return _ok(book.runs_matching_params(experiment, params))


def _runs_matching_editable(
    book: _Book, experiment: _Experiment, param_name: _QueryText, param_value: _QueryText
) -> Response:
    """Numbers of the runs whose editable parameter matches a regular expression."""
    return _ok(book.runs_matching_editable(experiment, param_name, param_value))


def _runs_with_tag(book: _Book, experiment: _Experiment, tag: _QueryText) -> Response:
    """Numbers of the runs that a text with this tag belongs to."""
    return _ok(book.runs_with_tag(experiment, tag))


def _files(book: _Book, experiment: _Experiment, run_num: _RunInPath) -> Response:
    """The files of a run."""
    return _ok(book.files(experiment, run_num))


def _register_file(
    book: _Book, experiment: _Experiment, info: Annotated[_FileBody | list[_FileBody], Body()]
) -> Response:
    """Say that a file exists, or several."""
    if isinstance(info, list):
        results: list[dict[str, Any]] = []
        for entry in info:
            try:
                book.register_file(experiment, entry.model_dump(mode="json", exclude_unset=True))
                results.append({"success": True})
            except RefusedError as error:
                results.append({"success": False, "errormsg": str(error)})
        return _LogbookJson(results)
    book.register_file(experiment, info.model_dump(mode="json", exclude_unset=True))
    return _ok()


def _file_available(
    book: _Book, experiment: _Experiment, location: _QueryText, file_path: _QueryText, run_num: _QueryText
) -> Response:
    """Say that a file has arrived at a location."""
    book.file_available(experiment, run_num, file_path, location)
    return _ok()


def _definitions(book: _Book, experiment: _Experiment) -> Response:
    """Workflow definitions."""
    return _ok(book.definitions(experiment))


def _triggers(experiment: _Experiment) -> Response:
    """What a definition's trigger may be."""
    return _ok([{"value": trigger.value, "label": trigger.label} for trigger in Trigger])


def _write_definition(
    book: _Book, caller: _Caller, experiment: _Experiment, definition: Annotated[_DefinitionBody, Body()]
) -> Response:
    """Write a workflow definition."""
    document = definition.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return _ok(book.write_definition(experiment, document, caller.login))


def _delete_definition(book: _Book, experiment: _Experiment, def_id: _RunInPath) -> Response:
    """Delete a workflow definition."""
    book.delete_definition(experiment, def_id)
    return _ok()


def _jobs(book: _Book, experiment: _Experiment) -> Response:
    """Workflow jobs."""
    return _ok(book.jobs(experiment))


def _create_job(book: _Book, caller: _Caller, experiment: _Experiment, job: Annotated[_JobBody, Body()]) -> Response:
    """Ask for a workflow to be executed for a run."""
    return _ok(book.create_job(experiment, job.job_name, job.run_num, caller.login))


def _update_job(book: _Book, experiment: _Experiment, job: Annotated[_JobUpdateBody, Body()]) -> Response:
    """Say how a job goes."""
    changes = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return _ok(book.update_job(experiment, job.id, changes))


def _delete_job(book: _Book, experiment: _Experiment, job_id: _QueryText) -> Response:
    """Remove a job's entry; nothing is stopped."""
    return _ok(book.delete_job(experiment, job_id))


def _kill_job(request: Request, book: _Book, experiment: _Experiment, job_id: _QueryText) -> Response:
    """Ask the run processor of the job's location to stop it."""
    kill: Callable[[str, dict[str, Any]], dict[str, Any]] = request.app.state.kill
    job = book.job(experiment, job_id)
    changes = kill(experiment, job)
    return _ok(book.update_job(experiment, job_id, {"status": changes.get("status", job["status"])}))


def _new_entry(
    book: _Book,
    caller: _Caller,
    experiment: _Experiment,
    log_text: Annotated[_Text, Form()],
    run_num: Annotated[_Text | None, Form()] = None,
    log_title: Annotated[_Text | None, Form()] = None,
    log_tags: Annotated[_Text | None, Form()] = None,
) -> Response:
    """Write a text; tags are words separated by blanks, `run_num` may be ``current``."""
    entry = book.write_entry(
        experiment,
        log_text,
        caller.login,
        run_num=run_num or None,
        title=log_title,
        tags=(log_tags or "").split(),
    )
    return _ok(entry)


def _entries(book: _Book, experiment: _Experiment) -> Response:
    """The texts in the logbook."""
    return _ok(book.entries(experiment))


_ROUTES: list[tuple[str, str, Callable[..., Response]]] = [
    ("GET", "/run_control/{experiment}/ws/start_run", _start_by_get),
    ("POST", "/run_control/{experiment}/ws/start_run", _start_by_post),
    ("GET POST", "/run_control/{experiment}/ws/end_run", _end_run),
    ("GET", "/run_control/{experiment}/ws/current_run", _current_run),
    ("GET", "/lgbk/{experiment}/ws/current_run", _current_run),
    ("POST", "/run_control/{experiment}/ws/add_run_params", _add_run_params),
    ("POST", "/lgbk/{experiment}/ws/add_run_params", _add_run_params),
    ("POST", "/lgbk/{experiment}/ws/run_table_editable_update", _run_table_editable_update),
    ("GET", "/lgbk/{experiment}/ws/runs", _all_runs),
    ("GET", "/lgbk/{experiment}/ws/runs/{run_num}", _one_run),
    ("POST", "/lgbk/{experiment}/ws/get_runs_matching_params", _runs_matching_params),
    ("GET", "/lgbk/{experiment}/ws/get_runs_matching_editable", _runs_matching_editable),
    ("GET", "/lgbk/{experiment}/ws/get_runs_with_tag", _runs_with_tag),
    ("GET", "/lgbk/{experiment}/ws/{run_num}/files", _files),
    ("POST", "/lgbk/{experiment}/ws/register_file", _register_file),
    ("GET POST", "/lgbk/{experiment}/ws/file_available_at_location", _file_available),
    ("GET", "/lgbk/{experiment}/ws/workflow_definitions", _definitions),
    ("DELETE", "/lgbk/{experiment}/ws/workflow_definitions/{def_id}", _delete_definition),
    ("GET", "/lgbk/{experiment}/ws/workflow_triggers", _triggers),
    ("POST", "/lgbk/{experiment}/ws/create_update_workflow_def", _write_definition),
    ("GET", "/lgbk/{experiment}/ws/workflow_jobs", _jobs),
    ("POST", "/lgbk/{experiment}/ws/create_workflow_job", _create_job),
    ("POST", "/lgbk/{experiment}/ws/update_workflow_job", _update_job),
    ("GET POST", "/lgbk/{experiment}/ws/delete_workflow_job", _delete_job),
    ("GET POST", "/lgbk/{experiment}/ws/kill_workflow_job", _kill_job),
    ("POST", "/lgbk/{experiment}/ws/new_elog_entry", _new_entry),
    ("GET", "/lgbk/{experiment}/ws/elog", _entries),
]
for _methods, _path, _function in _ROUTES:
    for _method in _methods.split():
        # Names of our own: one function serves several paths, and OpenAPI wants each operation named once.
        _name = "_".join([_method.lower(), *(part.strip("{}") for part in _path.split("/") if part)])
        _runs.add_api_route(_path, _function, methods=[_method], response_model=_Envelope, operation_id=_name)


class Killer:
    """Asks a location's run processor to stop a job, as the original does (``POST jid/ws/{experiment}/kill_job``).

    Args:
        config: the service's configuration, for the locations' URLs.
        credentials: our certificate.
    """

    def __init__(self, config: ElogConfig, credentials: Credentials) -> None:
        self._locations = config.locations
        self._credentials = credentials

    def __call__(self, experiment: str, job: dict[str, Any]) -> dict[str, Any]:
        """What the run processor says of the job after it was told to stop it.

        Raises:
            RefusedError: the location has no run processor, or it did not do it.
        """
        location = job["def"]["location"]
        known = self._locations.get(location)
        if known is None or known.jid_prefix is None:
            raise RefusedError(
                f"location {location!r} has no run processor that jobs can be killed at: "
                f"set locations.{location}.jid_prefix in the logbook's configuration"
            )
        try:
            with client(known.jid_prefix, self._credentials) as http, explained(known.jid_prefix):
                content = json.dumps(job).encode()
                answer = http.post(
                    f"/jid/ws/{experiment}/kill_job", content=content, headers={"content-type": "application/json"}
                )
                answer.raise_for_status()
                document = answer.json()
        except (PeerError, ValueError, httpx.InvalidURL) as error:
            raise RefusedError(f"the run processor of {location} did not stop the job: {error}") from error
        if not document.get("success"):
            raise RefusedError(f"the run processor of {location} did not stop the job: {document.get('errormsg')}")
        value: dict[str, Any] = document["value"]
        return value


def create_app(config: ElogConfig) -> FastAPI:
    """The application; its outbox runs while the application's lifespan does.

    Raises:
        CredentialsError: the certificate folder cannot be used.
        sqlalchemy.exc.SQLAlchemyError: the database cannot be used.
    """
    credentials = Credentials(config.credentials)
    engine = open_database(config.database)
    outbox = Outbox(engine, config.kafka.bootstrap_servers)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        outbox.start()
        try:
            yield
        finally:
            outbox.close()
            engine.dispose()

    app = FastAPI(title="LCLStream logbook", version=__version__, lifespan=lifespan)
    app.state.logbook = Logbook(
        engine, experiments=config.experiments, locations=config.locations, announce=outbox.announce
    )
    app.state.outbox = outbox
    app.state.credentials = credentials
    app.state.kill = Killer(config, credentials)

    @app.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> Response:
        return _LogbookJson({"success": False, "errormsg": str(error), "value": None})

    @app.exception_handler(UnknownExperimentError)
    async def unknown(_request: Request, error: UnknownExperimentError) -> Response:
        return _LogbookJson({"detail": f"there is no experiment {error}"}, status_code=404)

    app.include_router(_runs)
    _add_pages(app)
    return app


class _Status(BaseModel):
    """How the service is."""

    name: Literal["elog"] = "elog"
    version: str = __version__
    experiments: int
    outbox_waiting: int
    outbox_oldest: datetime | None
    outbox_delivered: int
    outbox_trouble: str | None
    kafka: str


def _status(request: Request) -> _Status:
    outbox: Outbox = request.app.state.outbox
    waiting, oldest = _logbook(request).waiting()
    return _Status(
        experiments=len(_logbook(request).experiments()),
        outbox_waiting=waiting,
        outbox_oldest=None if oldest is None else datetime.fromtimestamp(oldest).astimezone(),
        outbox_delivered=outbox.delivered,
        outbox_trouble=outbox.trouble,
        kafka=outbox.bootstrap_servers,
    )


def _add_pages(app: FastAPI) -> None:
    @app.get("/status", dependencies=[Depends(peer_identity)])
    def status(request: Request) -> _Status:
        """Messages that wait for the broker, and why."""
        return _status(request)

    @app.get("/", response_class=HTMLResponse, dependencies=[Depends(peer_identity)])
    def experiments(request: Request) -> str:
        """All experiments, for people."""
        book = _logbook(request)
        state = _status(request)
        latest = {name: book.current_run(name) for name in book.experiments()}
        return page.experiments(latest, waiting=state.outbox_waiting, trouble=state.outbox_trouble)

    @app.get("/experiments/{experiment}", response_class=HTMLResponse, dependencies=[Depends(peer_identity)])
    def experiment_page(request: Request, experiment: _Experiment) -> str:
        """The runs of an experiment, for people."""
        book = _logbook(request)
        try:
            runs = book.runs(experiment)
            return page.experiment(
                experiment,
                runs=runs,
                files={run["num"]: book.files(experiment, str(run["num"])) for run in runs[: page.MAX_RUNS]},
                jobs=book.jobs(experiment),
                definitions=book.definitions(experiment),
                entries=book.entries(experiment),
            )
        except UnknownExperimentError as error:
            raise HTTPException(404, f"there is no experiment {experiment}") from error
