"""The logbook's REST calls as data: method, path, what is sent, and how the answer is read.

Both clients of :mod:`.client` send these; nothing here does I/O. Every answer is
``{"success": bool, "value": …, "errormsg": …}``, with HTTP status 200 even when `success` is false.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lclstream.elog.models import (
    Counter,
    ElogEntry,
    FileEntry,
    RunDocument,
    RunNumber,
    WorkflowDefinition,
    WorkflowJob,
)
from lclstream.security.errors import PeerError

Value = TypeVar("Value")


class ElogError(PeerError):
    """The logbook answered, but not with what was asked; never retried.

    Attributes:
        errormsg: the logbook's own words.
    """

    def __init__(self, message: str, *, errormsg: str = "") -> None:
        super().__init__(message)
        self.errormsg = errormsg


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    success: bool
    value: Any = None
    errormsg: str | None = None


@dataclass(frozen=True)
class Call(Generic[Value]):
    """One call: what is sent, and the type its value is read as.

    Attributes:
        empty_is_failure: whether ``success: false`` without a word of explanation means "there is none" (False: the
            value is read as it is, which is None).
    """

    method: str
    path: str
    reads: TypeAdapter[Value]
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    form: Mapping[str, str] | None = None
    empty_is_failure: bool = True

    @property
    def headers(self) -> dict[str, str]:
        """Content type of a JSON body."""
        return {} if self.body is None else {"content-type": "application/json"}

    def read(self, content: bytes, where: str) -> Value:
        """The value in an answer.

        Raises:
            ElogError: the logbook refused, or the answer is not a logbook's.
        """
        try:
            answer = _Answer.model_validate(json.loads(content))
            if not answer.success and (self.empty_is_failure or answer.errormsg or answer.value is not None):
                errormsg = answer.errormsg or "no reason given"
                raise ElogError(f"{self.method} {where}{self.path}: the logbook refused: {errormsg}", errormsg=errormsg)
            return self.reads.validate_python(answer.value)
        except (ValidationError, ValueError) as error:
            raise ElogError(
                f"{self.method} {where}{self.path}: the answer is not the logbook's ({error}): is the URL right?"
            ) from error


_RUN = TypeAdapter(RunDocument)
_RUN_OR_NONE: TypeAdapter[RunDocument | None] = TypeAdapter(RunDocument | None)
_RUNS = TypeAdapter(list[RunDocument])
_RUN_NUMBERS = TypeAdapter(list[RunNumber])
_DEFINITION = TypeAdapter(WorkflowDefinition)
_DEFINITIONS = TypeAdapter(list[WorkflowDefinition])
_JOB = TypeAdapter(WorkflowJob)
_JOBS = TypeAdapter(list[WorkflowJob])
_FILES = TypeAdapter(list[FileEntry])
_ENTRIES = TypeAdapter(list[ElogEntry])
_TRIGGERS = TypeAdapter(list[dict[str, str]])
_NOTHING: TypeAdapter[None] = TypeAdapter(type(None))
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def _json(value: Any) -> bytes:
    # Not httpx's `json=`: it refuses NaN and Infinity, which detectors do measure and the logbook does take.
    return json.dumps(value).encode()


def _ws(root: str, experiment: str, *parts: RunNumber) -> str:
    if not experiment:
        raise ValueError("the experiment's name is empty")
    return "/".join(["", root, quote(experiment, safe=""), "ws", *(quote(str(part), safe="") for part in parts)])


def _time(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _given(**query: str | None) -> dict[str, str]:
    return {name: value for name, value in query.items() if value is not None}


def start_run(
    experiment: str,
    run_type: str,
    run_num: RunNumber | None,
    params: Mapping[str, Any] | None,
    start_time: datetime | None,
    sample: str | None,
) -> Call[RunDocument]:
    """``start_run``: POST when there are parameters, GET otherwise."""
    query = _given(
        run_type=run_type,
        run_num=None if run_num is None else str(run_num),
        start_time=None if start_time is None else _time(start_time),
        sample=sample,
    )
    path = _ws("run_control", experiment, "start_run")
    if params:
        return Call("POST", path, _RUN, query, body=_json(dict(params)))
    return Call("GET", path, _RUN, query)


def end_run(experiment: str, end_time: datetime | None) -> Call[RunDocument]:
    """``end_run`` of the current run."""
    query = _given(end_time=None if end_time is None else _time(end_time))
    return Call("GET", _ws("run_control", experiment, "end_run"), _RUN, query)


def current_run(experiment: str, skip_closed: bool) -> Call[RunDocument | None]:
    """``current_run``: the one that was started last."""
    query = {"skipClosedRuns": "true"} if skip_closed else {}
    path = _ws("run_control", experiment, "current_run")
    return Call("GET", path, _RUN_OR_NONE, query, empty_is_failure=False)


def add_run_params(experiment: str, params: Mapping[str, Any], run_num: RunNumber | None) -> Call[RunDocument]:
    """``add_run_params``."""
    if not params:
        raise ValueError("add_run_params: no parameter given")
    query = _given(run_num=None if run_num is None else str(run_num))
    return Call("POST", _ws("run_control", experiment, "add_run_params"), _RUN, query, body=_json(dict(params)))


def update_editable_param(experiment: str, run_num: RunNumber, name: str, value: Any) -> Call[Any]:
    """``run_table_editable_update``, a form."""
    form = {"runnum": str(run_num), "source": f"editable_params.{name}", "value": str(value)}
    return Call("POST", _ws("lgbk", experiment, "run_table_editable_update"), _ANYTHING, form=form)


def runs(experiment: str, include_params: bool) -> Call[list[RunDocument]]:
    """``runs``."""
    query = {} if include_params else {"includeParams": "false"}
    return Call("GET", _ws("lgbk", experiment, "runs"), _RUNS, query)


def run(experiment: str, run_num: RunNumber) -> Call[RunDocument]:
    """One run's document."""
    return Call("GET", _ws("lgbk", experiment, "runs", run_num), _RUN)


def runs_matching_params(experiment: str, params: Mapping[str, Any]) -> Call[list[RunNumber]]:
    """``get_runs_matching_params``: all of them equal."""
    path = _ws("lgbk", experiment, "get_runs_matching_params")
    return Call("POST", path, _RUN_NUMBERS, body=_json(dict(params)))


def runs_matching_editable(experiment: str, name: str, regex: str) -> Call[list[RunNumber]]:
    """``get_runs_matching_editable``: a regular expression, letter case ignored."""
    query = {"param_name": name, "param_value": regex}
    return Call("GET", _ws("lgbk", experiment, "get_runs_matching_editable"), _RUN_NUMBERS, query)


def runs_with_tag(experiment: str, tag: str) -> Call[list[RunNumber]]:
    """``get_runs_with_tag``."""
    return Call("GET", _ws("lgbk", experiment, "get_runs_with_tag"), _RUN_NUMBERS, {"tag": tag})


def workflow_triggers(experiment: str) -> Call[list[dict[str, str]]]:
    """``workflow_triggers``."""
    return Call("GET", _ws("lgbk", experiment, "workflow_triggers"), _TRIGGERS)


def workflow_definitions(experiment: str) -> Call[list[WorkflowDefinition]]:
    """``workflow_definitions``."""
    return Call("GET", _ws("lgbk", experiment, "workflow_definitions"), _DEFINITIONS)


def create_update_workflow_def(
    experiment: str, definition: WorkflowDefinition | Mapping[str, Any]
) -> Call[WorkflowDefinition]:
    """``create_update_workflow_def``."""
    document = definition.document() if isinstance(definition, WorkflowDefinition) else dict(definition)
    document.setdefault("parameters", "")
    return Call("POST", _ws("lgbk", experiment, "create_update_workflow_def"), _DEFINITION, body=_json(document))


def delete_workflow_definition(experiment: str, def_id: str) -> Call[None]:
    """``DELETE workflow_definitions/{id}``."""
    return Call("DELETE", _ws("lgbk", experiment, "workflow_definitions", def_id), _NOTHING)


def workflow_jobs(experiment: str) -> Call[list[WorkflowJob]]:
    """``workflow_jobs``."""
    return Call("GET", _ws("lgbk", experiment, "workflow_jobs"), _JOBS)


def create_workflow_job(experiment: str, job_name: str, run_num: RunNumber) -> Call[WorkflowJob]:
    """``create_workflow_job``; `job_name` is the definition's name."""
    body = _json({"job_name": job_name, "run_num": run_num})
    return Call("POST", _ws("lgbk", experiment, "create_workflow_job"), _JOB, body=body)


def update_workflow_job(
    experiment: str,
    job_id: str,
    status: str | None,
    counters: Iterable[Counter | Mapping[str, Any]] | None,
    tool_id: str | None,
    log_file_path: str | None,
) -> Call[WorkflowJob]:
    """``update_workflow_job``; what is None stays as it is."""
    body: dict[str, Any] = {"_id": job_id}
    if counters is not None:
        body["counters"] = [entry.document() if isinstance(entry, Counter) else dict(entry) for entry in counters]
    body |= _given(status=status, tool_id=tool_id, log_file_path=log_file_path)
    return Call("POST", _ws("lgbk", experiment, "update_workflow_job"), _JOB, body=_json(body))


def kill_workflow_job(experiment: str, job_id: str) -> Call[WorkflowJob]:
    """``kill_workflow_job``."""
    return Call("GET", _ws("lgbk", experiment, "kill_workflow_job"), _JOB, {"job_id": job_id})


def delete_workflow_job(experiment: str, job_id: str) -> Call[Any]:
    """``delete_workflow_job``: the entry goes, nothing is stopped."""
    return Call("GET", _ws("lgbk", experiment, "delete_workflow_job"), _ANYTHING, {"job_id": job_id})


def register_file(
    experiment: str, path: str, run_num: RunNumber | None, size: int | None, checksum: str | None
) -> Call[Any]:
    """``register_file`` for one file; without a run number it belongs to the current run."""
    body: dict[str, Any] = {"path": path, **_given(checksum=checksum)}
    if run_num is not None:
        body["run_num"] = run_num
    if size is not None:
        body["size"] = size
    return Call("POST", _ws("lgbk", experiment, "register_file"), _ANYTHING, body=_json(body))


def files(experiment: str, run_num: RunNumber) -> Call[list[FileEntry]]:
    """The files of a run."""
    return Call("GET", _ws("lgbk", experiment, run_num, "files"), _FILES)


def file_available_at_location(experiment: str, run_num: RunNumber, path: str, location: str) -> Call[Any]:
    """``file_available_at_location``."""
    query = {"location": location, "file_path": path, "run_num": str(run_num)}
    return Call("GET", _ws("lgbk", experiment, "file_available_at_location"), _ANYTHING, query)


def new_elog_entry(
    experiment: str, text: str, run_num: RunNumber | None, title: str | None, tags: Iterable[str]
) -> Call[Any]:
    """``new_elog_entry``, a form."""
    form = _given(
        log_text=text,
        run_num=None if run_num is None else str(run_num),
        log_title=title,
        log_tags=" ".join(tags) or None,
    )
    return Call("POST", _ws("lgbk", experiment, "new_elog_entry"), _ANYTHING, form=form)


def elog_entries(experiment: str) -> Call[list[ElogEntry]]:
    """The texts of an experiment's logbook."""
    return Call("GET", _ws("lgbk", experiment, "elog"), _ENTRIES)
