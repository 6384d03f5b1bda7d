"""What travels between a job service and its clients: Psi-k's documents, field by field.

Field names and defaults are those of psik 3.1.1 and psik-api 2.0.1. What we add is optional.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

#: A job's id: the unix time of its creation, with milliseconds; also the name of its folder.
JOB_ID = re.compile(r"[0-9]{1,20}(\.[0-9]{1,9})?", re.ASCII)


class JobState(StrEnum):
    """Where a job is. `completed`, `failed` and `canceled` are final."""

    new = "new"
    queued = "queued"
    active = "active"
    completed = "completed"
    failed = "failed"
    canceled = "canceled"

    @property
    def is_final(self) -> bool:
        """Whether a job never leaves this state."""
        return self in (JobState.completed, JobState.failed, JobState.canceled)


def _job_id(value: str) -> str:
    if not JOB_ID.fullmatch(value):
        raise ValueError("a job id is a time stamp such as 1712345678.123")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL character cannot be passed to a program")
    return value


def _variable_name(value: str) -> str:
    if not value or "=" in value:
        raise ValueError("the name of an environment variable is not empty and holds no '='")
    return _no_nul(value)


def _header_name(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value, re.ASCII):
        raise ValueError("not the name of an HTTP header")
    if value.lower() in _OUR_HEADERS:
        raise ValueError(f"the header {value} is set by the service itself")
    return value


def _header_value(value: str) -> str:
    if not value.isascii() or not (value.isprintable() or not value):
        raise ValueError("the value of an HTTP header is printable ASCII")
    return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


_OUR_HEADERS = frozenset(
    {
        "connection", "content-length", "content-type", "expect", "host", "keep-alive", "te", "trailer",
        "transfer-encoding", "upgrade", "x-hub-signature-256",
    }
)  # fmt: skip

JobId = Annotated[str, AfterValidator(_job_id), Field(json_schema_extra={"pattern": r"^[0-9]{1,20}(\.[0-9]{1,9})?$"})]
PlainText = Annotated[str, AfterValidator(_no_nul)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
#: psik 3 writes text, psik-api 2.0.1 a number; we read both and write text.
Info = Annotated[str, BeforeValidator(_text)]


class ResourceSpec(BaseModel):
    """What a job needs.

    Attributes:
        duration: longest run time, in minutes. Fractions are an addition of ours; published servers take whole minutes.
        node_count: nodes.
        process_count: processes, over all nodes.
        processes_per_node: processes on each node.
        cpu_cores_per_process: cores for each process.
        gpu_cores_per_process: GPUs for each process.
        exclusive_node_use: whether nobody else's job may run on the same nodes.
    """

    model_config = ConfigDict(extra="forbid")

    duration: Annotated[int, Field(gt=0, le=527040)] | Annotated[float, Field(gt=0, le=527040, allow_inf_nan=False)] = (
        10
    )
    node_count: int | None = Field(default=None, ge=1, le=1_000_000)
    process_count: int | None = Field(default=None, ge=1, le=100_000_000)
    processes_per_node: int | None = Field(default=None, ge=1, le=100_000)
    cpu_cores_per_process: int = Field(default=1, ge=1, le=100_000)
    gpu_cores_per_process: int = Field(default=0, ge=0, le=100_000)
    exclusive_node_use: bool = True

    @property
    def processes(self) -> int:
        """Number of processes the job starts with its MPI launcher."""
        return self.process_count or (self.node_count or 1) * (self.processes_per_node or 1)


class JobSpec(BaseModel):
    """A job as its user describes it.

    Attributes:
        name: shown in lists and given to the scheduler.
        directory: where the script runs; default is the job's own folder ``work/``. Another one must be allowed by the
            service's configuration.
        script: text of the script. Its ``#!`` line chooses the interpreter, ``/bin/bash`` without one.
        environment: variables added for the script.
        inherit_environment: whether the script also sees the environment of the service.
        resources: what it needs.
        backend: name of one of the service's backends.
        attributes: options for the backend; only those its configuration allows.
        callback: URL told of every change of state; it must be allowed by the service's configuration.
        cb_headers: HTTP headers sent with every callback.
        cb_secret: key of the callbacks' signature. It is written to the job's own folder (mode 0600) and nowhere else.
        client_secret: psik 2 has it, for states that a job's own script reports. Here nobody reports about a job but
            its backend, so it is taken and forgotten.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[PlainText, Field(max_length=256)] | None = None
    directory: Annotated[PlainText, Field(max_length=4096)] | None = None
    script: PlainText
    environment: dict[VariableName, PlainText] = {}
    inherit_environment: bool = True
    resources: ResourceSpec = ResourceSpec()
    backend: str = Field(default="default", max_length=256)
    attributes: dict[PlainText, PlainText] = {}
    callback: Annotated[str, Field(max_length=2048)] | None = None
    cb_headers: dict[Annotated[str, AfterValidator(_header_name)], Annotated[str, AfterValidator(_header_value)]] = {}
    cb_secret: SecretStr | None = None
    client_secret: SecretStr | None = Field(default=None, exclude=True)

    def document(self) -> dict[str, Any]:
        """The specification as a JSON object **with its secret**, as it is sent to a service and kept in ``spec.json``.

        Fields left at their default are omitted, so that older servers accept it.
        """
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        plain["script"] = self.script
        if self.cb_secret is not None:
            plain["cb_secret"] = self.cb_secret.get_secret_value()
        return plain


class Transition(BaseModel):
    """One line of a job's history.

    Attributes:
        time: unix time, seconds.
        jobndx: which attempt to run the job, from 1; 0 before the first.
        state: the state reached.
        info: for `new` the backend (JSON), for `queued` the id the backend gave, for `active` where it runs, for
            `completed` and `failed` the exit code or the reason in words.
    """

    time: float
    jobndx: int
    state: JobState
    info: Info = ""


class JobSummary(BaseModel):
    """A job's latest transition, as lists show it; the same document is a line of history in ``GET /jobs/{id}``.

    Attributes:
        jobid: the job.
        name: the name its specification gives, or an empty text.
        updated: unix time of the transition, seconds.
        jobndx: which attempt to run it, from 1; 0 before the first.
        state: the state reached.
        info: see :class:`Transition`.
        tags: what was put on it to find it again; empty at a published server.
    """

    jobid: str
    name: str
    updated: float
    jobndx: int
    state: JobState
    info: Info = ""
    tags: dict[str, str] = {}

    @property
    def transition(self) -> Transition:
        """The same as a line of history."""
        return Transition(time=self.updated, jobndx=self.jobndx, state=self.state, info=self.info)


class Callback(BaseModel):
    """What a callback URL is told; the header ``x-hub-signature-256`` signs the raw body with the job's `cb_secret`.

    Attributes:
        jobid: the job, by the id of the service that sends this.
        jobndx: which attempt to run it.
        state: the state reached.
        info: see :class:`Transition`.
    """

    jobid: JobId
    jobndx: int
    state: JobState
    info: Info = ""


class LeaseRequest(BaseModel):
    """Body of ``POST /jobs/{id}/lease``.

    Attributes:
        lease_s: seconds from now until the job is ended, unless its lease is renewed again.
    """

    model_config = ConfigDict(extra="forbid")

    lease_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Lease(BaseModel):
    """Its answer.

    Attributes:
        lease_expires: unix time, seconds.
    """

    lease_expires: float


class FileStat(BaseModel):
    """A file of a job.

    Attributes:
        size: bytes.
        atime: last read, unix time.
        mtime: last written, unix time.
        children: for a folder, true or what is inside; false for a file.
    """

    size: int
    atime: int
    mtime: int
    children: bool | dict[str, FileStat] = False


class BackendInfo(BaseModel):
    """Where a service runs jobs.

    Attributes:
        name: what a job specification's `backend` says.
        full_name: a name for people.
        description: a sentence for people.
        system_type: ``local``, ``slurm``, …
        notes: anything its operator wants users to know.
        status: ``active``, ``degraded``, ``unavailable`` or ``other``.
        updated_at: when that was found out (ISO 8601).
        configuration: its settings, without secrets.
    """

    name: str
    full_name: str | None = None
    description: str | None = None
    system_type: str | None = None
    notes: list[str] = []
    status: str
    updated_at: str | None = None
    configuration: dict[str, Any] = {}


class LogPart(BaseModel):
    """A piece of a log.

    Attributes:
        data: the bytes.
        offset: where in the log they begin.
        size: bytes the log had when it was read; ask again from `end` to follow it.
    """

    data: bytes
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next piece begins."""
        return self.offset + len(self.data)
