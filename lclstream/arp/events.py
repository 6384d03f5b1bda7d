"""Kafka messages of the logbook, read into events. Pure: bytes in, event out.

Messages may hold bare NaN and Infinity and fields we do not know; run numbers may be names. A message that cannot be
read raises :class:`UnreadableError`; one that is well-formed and not our business is :class:`Irrelevant`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from lclstream.elog.models import FileEntry, RunDocument, RunNumber, WorkflowJob

#: Topics of the logbook that say something about runs.
RUNS: Final = "runs"
FILES: Final = "file_catalog"
JOBS: Final = "workflow_jobs"


#: How long after its end an update of a run still counts as news of the end; clocks may differ, and messages wait.
SOON = timedelta(days=1)


class UnreadableError(ValueError):
    """A message that is not what the logbook sends on this topic."""


class Crud(StrEnum):
    """What happened to the document."""

    CREATE = "Create"
    UPDATE = "Update"
    DELETE = "Delete"


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="ignore")

    experiment_name: str
    CRUD: str
    value: dict[str, Any]


@dataclass(frozen=True)
class RunEvent:
    """A run started (``Create``), ended, or changed.

    Attributes:
        document: the logbook's own.
        sent: the message's own time; None on a broker that keeps none.
    """

    experiment: str
    crud: Crud
    run: RunDocument
    document: dict[str, Any]
    sent: datetime | None = None

    @property
    def number(self) -> RunNumber:
        """The run's number."""
        return self.run.num

    @property
    def tells_end(self) -> bool:
        """Whether this is news of the run's end, and not a change of a run that ended long before.

        Every update holds `end_time`, and results are put onto runs of years ago. Only the one at the end has
        `duration`; one soon after is taken for the same, should that have been lost or be without it. The message's own
        time decides, so that it is judged alike however late or often it is delivered.
        """
        end = self.run.end_time
        if end is None:
            return False
        if self.crud == Crud.CREATE or self.run.duration is not None or self.sent is None:
            return True
        return self.sent - end < SOON


@dataclass(frozen=True)
class FileEvent:
    """A file was registered, or arrived at a location."""

    experiment: str
    crud: Crud
    file: FileEntry

    @property
    def number(self) -> RunNumber:
        """Number of the run the file belongs to."""
        return self.file.run_num


@dataclass(frozen=True)
class JobEvent:
    """A workflow job was asked for, changed, or removed."""

    experiment: str
    crud: Crud
    job: WorkflowJob

    @property
    def number(self) -> RunNumber:
        """Number of the run the job is for."""
        return self.job.run_num


@dataclass(frozen=True)
class Irrelevant:
    """A well-formed message that no workflow can ask for; `reason` says why."""

    experiment: str
    reason: str


Event = RunEvent | FileEvent | JobEvent


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "(message)"
    return f"{where}: {problem['msg']}"


def read(topic: str, payload: bytes | None, sent: datetime | None = None) -> Event | Irrelevant:
    """The event in a message; `sent` is the message's own time.

    Raises:
        UnreadableError: it is not JSON, not an envelope of the logbook's, or its document lacks what it must have.
    """
    if payload is None:
        raise UnreadableError("the message is empty")
    try:
        content = json.loads(payload)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON: {error}") from error
    try:
        envelope = _Envelope.model_validate(content)
    except ValidationError as error:
        raise UnreadableError(f"not a message of the logbook: {_first_problem(error)}") from error
    experiment = envelope.experiment_name
    if topic not in (RUNS, FILES, JOBS):
        return Irrelevant(experiment, f"topic {topic} says nothing about runs")
    try:
        crud = Crud(envelope.CRUD)
    except ValueError:
        return Irrelevant(experiment, f"CRUD {envelope.CRUD!r} is nothing a workflow waits for")
    try:
        if topic == RUNS:
            return RunEvent(experiment, crud, RunDocument.model_validate(envelope.value), envelope.value, sent)
        if topic == FILES:
            return FileEvent(experiment, crud, FileEntry.model_validate(envelope.value))
        return JobEvent(experiment, crud, WorkflowJob.model_validate(envelope.value))
    except ValidationError as error:
        raise UnreadableError(f"value.{_first_problem(error)}") from error
