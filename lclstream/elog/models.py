"""What the logbook's documents look like: runs, files, workflow definitions, jobs, and the envelope they travel in.

Field names are the logbook's own. Unknown fields are kept (``extra="allow"``), because a logbook may say more than we
know and the whole document is handed on. Times are aware; a naive one means UTC, as in the logbook.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

#: A run's number: integers at LCLS, strings at cryo-EM sites.
RunNumber = int | str


def _in_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


#: A time of the logbook: ISO 8601, and UTC where it names no zone.
Time = Annotated[datetime, AfterValidator(_in_utc)]

_FULLWIDTH = {".": "\uff0e", "$": "\uff04"}


def escape_name(name: str) -> str:
    """A parameter's name as the logbook stores and publishes it: ``.`` and ``$`` become U+FF0E and U+FF04."""
    for plain, wide in _FULLWIDTH.items():
        name = name.replace(plain, wide)
    return name


def unescape_name(name: str) -> str:
    """A parameter's name as its owner knows it, such as ``MFX:DG1:01.RBV``."""
    for plain, wide in _FULLWIDTH.items():
        name = name.replace(wide, plain)
    return name


# Python's int() also takes "0007" and "2024_01", which are names, and runs of their own.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,99}")


def run_number(text: str | int) -> RunNumber:
    """A run's number out of a path, an option or a form: an integer if written as one, otherwise the text itself."""
    return int(text) if isinstance(text, int) or _INTEGER.fullmatch(text) else text


class Document(BaseModel):
    """What all documents share: unknown fields are kept, and ``_id`` is `id` in Python."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    def document(self) -> dict[str, Any]:
        """The document as JSON values, under the logbook's own names; fields that were never set are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class EditableParameter(Document):
    """A run parameter that people change in the run table."""

    value: Any = None
    modified_by: str | None = None
    modified_time: Time | None = None


class FileEntry(Document):
    """A file of a run. `locations` says where it is: ``{"SLAC": {"asof": time}}``."""

    id: str | None = Field(default=None, alias="_id")
    path: str
    run_num: RunNumber
    checksum: str | None = None
    create_timestamp: Time | None = None
    modify_timestamp: Time | None = None
    size: int | None = None
    locations: dict[str, dict[str, Any]] = {}


class RunDocument(Document):
    """A run: `end_time` is None while it is open; `duration` is in seconds; `params` have escaped names."""

    id: str | None = Field(default=None, alias="_id")
    num: RunNumber
    type: str = "DATA"
    begin_time: Time | None = None
    end_time: Time | None = None
    params: dict[str, Any] = {}
    editable_params: dict[str, EditableParameter] = {}
    sample: str | None = None
    duration: float | None = None
    file_catalog: list[FileEntry] | None = None

    def parameters(self) -> dict[str, Any]:
        """All parameters under their owners' names; an editable one wins over the same name from data taking."""
        editable = {unescape_name(name): entry.value for name, entry in self.editable_params.items()}
        return {unescape_name(name): value for name, value in self.params.items()} | editable


class Trigger(StrEnum):
    """What makes a workflow start."""

    MANUAL = "MANUAL"
    START_OF_RUN = "START_OF_RUN"
    END_OF_RUN = "END_OF_RUN"
    FIRST_FILE_TRANSFERRED = "FIRST_FILE_TRANSFERRED"
    ALL_FILES_TRANSFERRED = "ALL_FILES_TRANSFERRED"
    ALL_NONREC_FILES_TRANSFERRED = "ALL_NONREC_FILES_TRANSFERRED"
    RUN_PARAM_IS_VALUE = "RUN_PARAM_IS_VALUE"

    @property
    def label(self) -> str:
        """The trigger in words, as the logbook's form shows it."""
        return _TRIGGER_LABELS[self]


_TRIGGER_LABELS = {
    Trigger.MANUAL: "Manually triggered",
    Trigger.START_OF_RUN: "Start of a run",
    Trigger.END_OF_RUN: "End of a run",
    Trigger.FIRST_FILE_TRANSFERRED: "First file transfer",
    Trigger.ALL_FILES_TRANSFERRED: "All files transferred",
    Trigger.ALL_NONREC_FILES_TRANSFERRED: "All non-recorder files transferred",
    Trigger.RUN_PARAM_IS_VALUE: "Run table param has value",
}


class WorkflowDefinition(Document):
    """What to do on a trigger.

    Attributes:
        executable: ``airflow:<dag_id>`` for a DAG; anything else is for another run processor.
        trigger: one of :class:`Trigger`; a name that we do not know is kept, and never holds.
        parameters: a JSON object for the DAG (or its text, which is what the logbook's form makes).
        location: the data centre it runs at, such as ``s3df``.
        run_as_user: whose job it is: the login that wrote the definition, set by the logbook.
        run_param_name, run_param_value: for ``RUN_PARAM_IS_VALUE``: the parameter, and the value it must take.
    """

    id: str | None = Field(default=None, alias="_id")
    name: str
    executable: str
    trigger: Trigger | str
    location: str
    parameters: str | dict[str, Any] | None = ""
    run_as_user: str | None = None
    run_param_name: str | None = None
    run_param_value: Any = None

    def parameter_object(self) -> dict[str, Any]:
        """`parameters` as an object; empty text means ``{}``.

        Raises:
            ValueError: the text is not a JSON object.
        """
        if isinstance(self.parameters, dict):
            return self.parameters
        if self.parameters is None or not self.parameters.strip():
            return {}
        try:
            value = json.loads(self.parameters)
        except ValueError as error:
            raise ValueError(
                f"workflow definition {self.name!r}: parameters are not JSON ({error}): write an object such as "
                '{"stream_config": "/path/run.yaml"}'
            ) from error
        if not isinstance(value, dict):
            raise ValueError(
                f"workflow definition {self.name!r}: parameters must be a JSON object, not {type(value).__name__}"
            )
        return value


class Counter(Document):
    """A line that users watch in the logbook while a job runs; both sides may be HTML fragments."""

    key: str
    value: Any


class WorkflowJob(Document):
    """One execution of a workflow definition for one run. Statuses seen: START SUBMITTED RUNNING DONE EXITED FAILED."""

    id: str = Field(alias="_id")
    run_num: RunNumber
    def_id: str | None = None
    definition: WorkflowDefinition | None = Field(default=None, alias="def")
    user: str | None = None
    status: str = "START"
    submit_time: Time | None = None
    tool_id: str | int | None = None
    log_file_path: str | None = None
    counters: list[Counter] = []
    experiment: str | None = None


class ElogEntry(Document):
    """A text that somebody, or a program, wrote into the logbook."""

    id: str | None = Field(default=None, alias="_id")
    author: str
    content: str
    content_type: str = "TEXT"
    title: str | None = None
    run_num: RunNumber | None = None
    tags: list[str] = []
    insert_time: Time | None = None
    relevance_time: Time | None = None
