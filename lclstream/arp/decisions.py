"""Which DAG runs an event asks for: event, definitions and knowledge of the run in, DAG runs or reasons out. No I/O.

Every trigger is judged by what the message and the run's documents say, never by what was seen before: messages may
come twice, late, or in another order. That a trigger holds more than once (a run's end is told by later updates, too)
does no harm, because the DAG run's id is the same each time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lclstream.arp.events import Crud, Event, FileEvent, JobEvent, RunEvent
from lclstream.arp.names import dag_run_id
from lclstream.elog.models import FileEntry, RunDocument, RunNumber, Trigger, WorkflowDefinition, unescape_name

#: A definition whose executable starts like this is ours; the rest is a DAG's id.
SCHEME = "airflow:"
_DAG_ID = re.compile(r"[A-Za-z0-9_.-]{1,250}")
#: Triggers about all files of a run, which only the logbook knows.
ASK_THE_LOGBOOK = frozenset({Trigger.ALL_FILES_TRANSFERRED, Trigger.ALL_NONREC_FILES_TRANSFERRED})


@dataclass(frozen=True)
class Scope:
    """What this run processor is for.

    Attributes:
        location: the data centre whose workflows it starts.
        experiments: names or shell patterns (``mfx*``); empty means all.
        recorder_files: files whose path this matches are written by recorders beside the detectors; trigger
            ``ALL_NONREC_FILES_TRANSFERRED`` does not wait for them.
        logins: our own login and those of the others in our group. Their jobs in the logbook show DAG runs there are;
            nobody asks for them by hand.
    """

    location: str
    experiments: tuple[str, ...] = ()
    recorder_files: re.Pattern[str] = re.compile(r"-s0?[89]\d-")
    logins: frozenset[str] = frozenset()

    def covers(self, experiment: str) -> bool:
        """Whether the experiment's events are for us."""
        return not self.experiments or any(fnmatchcase(experiment, pattern) for pattern in self.experiments)


@dataclass(frozen=True)
class Catalogue:
    """What the logbook knows of one run at this moment: its document and its files."""

    run: RunDocument
    files: Sequence[FileEntry]


@dataclass(frozen=True)
class DagRun:
    """A DAG run to make.

    Attributes:
        definition: the workflow definition that asks for it.
        job_id: the logbook's job, for one asked for by hand.
    """

    dag_id: str
    dag_run_id: str
    experiment: str
    run: RunNumber
    trigger: Trigger
    definition: WorkflowDefinition
    run_document: dict[str, Any] | None
    user: str | None
    job_id: str | None = None

    def conf(self, job_id: str | None) -> dict[str, Any]:
        """What the DAG gets. `job_id` is the logbook's job that shows how it goes, None without one.

        NaN and infinities become text: Airflow's database and pages take only JSON as the standard has it.
        """
        conf: dict[str, Any] = {
            "experiment": self.experiment,
            "run": self.run,
            "trigger": self.trigger.value,
            "definition": self.definition.name,
            "location": self.definition.location,
            "user": self.user,
            "job_id": job_id,
            "run_document": self.run_document,
            "parameters": self.definition.parameter_object(),
        }
        plain: dict[str, Any] = without_special_numbers(conf)
        return plain


@dataclass(frozen=True)
class NotForUs:
    """Nothing is to be done, and that is in order; `reason` is for the log."""

    reason: str


@dataclass(frozen=True)
class Invalid:
    """A definition asks for something that cannot be done; `reason` goes to the dead-letter topic."""

    definition: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """What an event asks for: DAG runs, definitions that cannot be followed, and why nothing else."""

    dag_runs: tuple[DagRun, ...] = ()
    invalid: tuple[Invalid, ...] = ()
    not_for_us: NotForUs | None = None


def without_special_numbers(value: Any) -> Any:
    """The same JSON value with NaN, Infinity and -Infinity as text."""
    if isinstance(value, dict):
        return {key: without_special_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_special_numbers(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def precheck(event: Event, scope: Scope) -> NotForUs | None:
    """Why an event is not for us whatever the definitions say; None when they have to be asked."""
    if not scope.covers(event.experiment):
        return NotForUs(f"experiment {event.experiment} is not one of {', '.join(scope.experiments)}")
    if isinstance(event, JobEvent) and event.crud != Crud.CREATE:
        return NotForUs(f"a job's {event.crud.value.lower()} starts nothing")
    if isinstance(event, JobEvent) and event.job.user in scope.logins:
        return NotForUs("the job is our own: it shows a DAG run that a trigger made")
    if isinstance(event, FileEvent) and not event.file.locations:
        return NotForUs("the file is at no location yet")
    if event.crud == Crud.DELETE:
        return NotForUs("a deletion starts nothing")
    return None


def ours(definitions: Iterable[WorkflowDefinition], scope: Scope) -> list[WorkflowDefinition]:
    """The definitions that this run processor follows."""
    return [entry for entry in definitions if entry.executable.startswith(SCHEME) and entry.location == scope.location]


def needs_catalogue(event: Event, definitions: Iterable[WorkflowDefinition]) -> bool:
    """Whether :func:`decide` must know the run's files to judge this event."""
    if isinstance(event, JobEvent):
        return True
    triggers = {entry.trigger for entry in definitions}
    if isinstance(event, FileEvent):
        return bool(triggers & (ASK_THE_LOGBOOK | {Trigger.FIRST_FILE_TRANSFERRED}))
    return event.tells_end and bool(triggers & ASK_THE_LOGBOOK)


def decide(
    event: Event, definitions: Sequence[WorkflowDefinition], scope: Scope, catalogue: Catalogue | None = None
) -> Decision:
    """Which DAG runs an event asks for.

    Args:
        event: what the logbook said.
        definitions: the experiment's workflow definitions; for a job, only its own matters, which it carries.
        scope: what we are for.
        catalogue: the run's document and files where :func:`needs_catalogue` says so.
    """
    refused = precheck(event, scope)
    if refused is not None:
        return Decision(not_for_us=refused)
    if isinstance(event, JobEvent):
        return _by_hand(event, scope, catalogue)
    followed = ours(definitions, scope)
    if not followed:
        return Decision(not_for_us=NotForUs(f"no workflow of {event.experiment} is an Airflow DAG at {scope.location}"))
    due = [entry for entry in followed if _is_due(entry, event, scope, catalogue)]
    if not due:
        return Decision(not_for_us=NotForUs(f"no trigger of {len(followed)} workflow(s) fits"))
    if isinstance(event, RunEvent):
        document: dict[str, Any] | None = event.document
    else:
        document = catalogue.run.document() if catalogue is not None else None
    return _asked(event, [(entry, Trigger(entry.trigger), entry.run_as_user, None) for entry in due], document)


def _by_hand(event: JobEvent, scope: Scope, catalogue: Catalogue | None) -> Decision:
    definition = event.job.definition
    if definition is None:
        return Decision(invalid=(Invalid("?", f"job {event.job.id} comes without its workflow definition"),))
    if not ours([definition], scope):
        return Decision(not_for_us=NotForUs(f"workflow {definition.name!r} is no Airflow DAG at {scope.location}"))
    if event.job.status != "START":
        return Decision(not_for_us=NotForUs(f"job {event.job.id} is {event.job.status} already"))
    document = catalogue.run.document() if catalogue is not None else None
    return _asked(event, [(definition, Trigger.MANUAL, event.job.user, event.job.id)], document)


def _asked(
    event: Event,
    due: Iterable[tuple[WorkflowDefinition, Trigger, str | None, str | None]],
    document: dict[str, Any] | None,
) -> Decision:
    dag_runs: list[DagRun] = []
    invalid: list[Invalid] = []
    for definition, trigger, user, job_id in due:
        dag_id = definition.executable.removeprefix(SCHEME)
        try:
            if _DAG_ID.fullmatch(dag_id) is None:
                raise ValueError(f"executable {definition.executable!r} names no DAG: write airflow:DAG_ID")
            definition.parameter_object()
        except ValueError as error:
            invalid.append(Invalid(definition.name, str(error)))
            continue
        name = dag_run_id(event.experiment, event.number, trigger, definition.name, job_id=job_id)
        dag_runs.append(
            DagRun(dag_id, name, event.experiment, event.number, trigger, definition, document, user, job_id)
        )
    return Decision(tuple(dag_runs), tuple(invalid))


def _is_due(
    definition: WorkflowDefinition, event: RunEvent | FileEvent, scope: Scope, catalogue: Catalogue | None
) -> bool:
    trigger = definition.trigger
    if isinstance(event, RunEvent):
        if trigger == Trigger.START_OF_RUN:
            return event.crud == Crud.CREATE
        if trigger == Trigger.END_OF_RUN:
            return event.tells_end
        if trigger == Trigger.RUN_PARAM_IS_VALUE:
            return _parameter_is_value(definition, event.run)
        if not event.tells_end:
            return False
    elif trigger == Trigger.FIRST_FILE_TRANSFERRED:
        return definition.location in event.file.locations
    if trigger in ASK_THE_LOGBOOK and catalogue is not None:
        return _all_there(definition, scope, catalogue)
    return False


def _all_there(definition: WorkflowDefinition, scope: Scope, catalogue: Catalogue) -> bool:
    """Whether the run has ended and every file that counts is at the definition's location (and there is one)."""
    if catalogue.run.end_time is None:
        return False
    files = list(catalogue.files)
    if definition.trigger == Trigger.ALL_NONREC_FILES_TRANSFERRED:
        files = [file for file in files if not scope.recorder_files.search(file.path)]
    return bool(files) and all(definition.location in file.locations for file in files)


def _parameter_is_value(definition: WorkflowDefinition, run: RunDocument) -> bool:
    """Whether the parameter has the value; the logbook's form gives text, so 9.5 and "9.5" are the same."""
    name = unescape_name(definition.run_param_name or "")
    if not name:
        return False
    # Both are looked at: somebody may have edited a parameter that data taking wrote.
    editable = {unescape_name(key): entry.value for key, entry in run.editable_params.items()}
    taken = {unescape_name(key): value for key, value in run.params.items()}
    return any(name in where and _same(where[name], definition.run_param_value) for where in (editable, taken))


def _same(value: Any, wanted: Any) -> bool:
    left, right = str(value).strip(), str(wanted).strip()
    if isinstance(value, bool) or isinstance(wanted, bool):
        return left.lower() == right.lower()
    if left == right:
        return True
    try:
        return float(left) == float(right)
    except ValueError:
        return False
