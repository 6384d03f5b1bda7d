"""What the logbook does: runs, files, definitions, jobs and texts, each change with the Kafka message that tells it.

Every change and its message are written in one transaction, so there is neither a change nobody hears of nor a message
about something that did not happen. Any thread may call; the database orders the writers.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from lclstream.elog.config import EXPERIMENT_PATTERN, LocationConfig
from lclstream.elog.database import Definition, Entry, Experiment, File, Job, LatestRun, Message, Run
from lclstream.elog.models import RunNumber, Trigger, escape_name, run_number

Document = dict[str, Any]

#: Largest run number a 64-bit column takes.
_MAX_RUN = 2**63 - 1
#: Bytes of a message that a change may make. Producers take 1,000,000, brokers little more, and one that is not taken
#: holds up all others. The rest is for what comes without being asked whether it fits, such as a run's end.
MAX_MESSAGE_BYTES = 900_000
_UPDATABLE_JOB_FIELDS = ("status", "counters", "tool_id", "log_file_path")


class RefusedError(Exception):
    """The logbook does not do that; the message says why. Answered as ``success: false``."""


class UnknownExperimentError(Exception):
    """There is no such experiment. Answered as 404."""


def now() -> datetime:
    """The time, aware, in UTC."""
    return datetime.now(UTC)


def _new_id() -> str:
    return secrets.token_hex(12)


def _text(num: RunNumber) -> str:
    return str(num)


def checked_run_number(value: str | int) -> RunNumber:
    """A run number that can be stored.

    Raises:
        RefusedError: it is not positive, too large, or empty.
    """
    num = run_number(value)
    if isinstance(num, int) and not 1 <= num <= _MAX_RUN:
        raise RefusedError(f"run number {num} is not possible: it must be between 1 and {_MAX_RUN}, or a name")
    if num == "":
        raise RefusedError("the run number is empty")
    return num


class _Book:
    """One experiment within one transaction."""

    def __init__(self, session: Session, experiment: Experiment) -> None:
        self.session = session
        self.row = experiment
        self.name = experiment.name
        self.published = False

    def publish(self, topic: str, crud: str, value: Document) -> None:
        """Write a message about a change.

        Raises:
            RefusedError: the message would be too large for a broker.
        """
        size = self._send(topic, crud, value, MAX_MESSAGE_BYTES)
        if size > MAX_MESSAGE_BYTES:
            raise RefusedError(
                f"the {topic} message of experiment {self.name} would have {size} bytes, and Kafka takes at most "
                f"{MAX_MESSAGE_BYTES}: write large values to a file and give its path"
            )

    def publish_end(self, run: Document, said: Document) -> None:
        """Write the message about a run's end, which is never refused: without its list of files if need be."""
        if self._send("runs", "Update", run | said, MAX_MESSAGE_BYTES) > MAX_MESSAGE_BYTES:
            self._send("runs", "Update", run | {"duration": said["duration"]})

    def _send(self, topic: str, crud: str, value: Document, at_most: float = math.inf) -> int:
        """Put a message into the outbox unless it has more bytes than that; how many it has."""
        payload = json.dumps({"experiment_name": self.name, "CRUD": crud, "value": value})
        # ASCII: as many bytes as characters.
        if len(payload) <= at_most:
            self.session.add(Message(topic=topic, payload=payload, created=time.time()))
            # Messages go out by their number, so each gets it at once.
            self.session.flush()
            self.published = True
        return len(payload)

    def run(self, num: RunNumber) -> Run:
        found = self.session.scalar(select(Run).where(Run.experiment == self.name, Run.num_text == _text(num)))
        if found is None:
            raise RefusedError(f"experiment {self.name} has no run {num}")
        return found

    def current(self) -> Run | None:
        latest = self.session.get(LatestRun, self.name)
        if latest is not None:
            return self.session.get(Run, latest.run_id)
        # A database from before the table of latest runs: the highest number, and names come after numbers.
        order = (Run.num_int.is_(None).desc(), Run.num_int.desc(), Run.num_text.desc())
        return self.session.scalar(select(Run).where(Run.experiment == self.name).order_by(*order).limit(1))

    def run_or_current(self, num: RunNumber | None) -> Run:
        if num is not None:
            return self.run(num)
        current = self.current()
        if current is None:
            raise RefusedError(f"experiment {self.name} has no run yet")
        return current

    def files(self, num: RunNumber) -> list[Document]:
        rows = self.session.scalars(select(File).where(File.experiment == self.name, File.run_text == _text(num)))
        return sorted((row.document for row in rows), key=lambda file: str(file["create_timestamp"]), reverse=True)

    def definition(self, def_id: str) -> Definition:
        found = self.session.get(Definition, def_id)
        if found is None or found.experiment != self.name:
            raise RefusedError(f"experiment {self.name} has no workflow definition with id {def_id}")
        return found

    def job(self, job_id: str) -> Job:
        found = self.session.scalar(select(Job).where(Job.id == job_id, Job.experiment == self.name))
        if found is None:
            raise RefusedError(f"experiment {self.name} has no workflow job with id {job_id}")
        return found

    def full_job(self, job: Job) -> Document:
        return job.document | {"experiment": self.name, "def": self.definition(job.def_id).document}


class Logbook:
    """All experiments of a logbook.

    Args:
        engine: the database, with its tables.
        experiments: the only experiments there are; None makes one when its first run or definition comes.
        locations: data centres; none means every name is accepted.
        announce: called after a transaction that left messages in the outbox.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        experiments: list[str] | None = None,
        locations: Mapping[str, LocationConfig] | None = None,
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._fixed = experiments is not None
        self._locations = dict(locations or {})
        self._announce = announce
        for name in experiments or ():
            with self._open(name, create=True):
                pass

    @contextmanager
    def _open(self, experiment: str, *, create: bool = False) -> Iterator[_Book]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            row = session.scalar(select(Experiment).where(Experiment.name == experiment).with_for_update())
            made = row is None and create and re.fullmatch(EXPERIMENT_PATTERN, experiment) is not None
            if row is None and not made:
                raise UnknownExperimentError(experiment)
            if row is None:
                row = Experiment(name=experiment, last_run=0)
                session.add(row)
                session.flush()
            book = _Book(session, row)
            if made:
                book.publish("experiments", "Create", {"_id": experiment, "name": experiment})
            yield book
        if book.published:
            self._announce()

    @contextmanager
    def _reading(self, experiment: str) -> Iterator[_Book]:
        with self._open(experiment) as book:
            yield book

    @contextmanager
    def _writing(self, experiment: str) -> Iterator[_Book]:
        with self._open(experiment, create=not self._fixed) as book:
            yield book

    # Runs

    def start_run(
        self,
        experiment: str,
        *,
        run_type: str = "DATA",
        run_num: str | None = None,
        params: Mapping[str, Any] | None = None,
        start_time: datetime | None = None,
        sample: str | None = None,
    ) -> Document:
        """Start a run. An open one is ended first, so its `Update` comes before the new one's `Create`."""
        with self._writing(experiment) as book:
            current = book.current()
            if current is not None and current.document["end_time"] is None:
                self._end(book, current, now())
            if run_num is None:
                num: RunNumber = book.row.last_run + 1
            else:
                num = checked_run_number(run_num)
            if isinstance(num, int):
                # Numbers that were given by hand are not given again.
                book.row.last_run = max(book.row.last_run, num)
            taken = select(Run.id).where(Run.experiment == book.name, Run.num_text == _text(num))
            if book.session.scalar(taken) is not None:
                raise RefusedError(f"experiment {book.name} already has a run {num}")
            document: Document = {
                "_id": _new_id(),
                "num": num,
                "type": run_type,
                "begin_time": (start_time or now()).isoformat(),
                "end_time": None,
                "params": {escape_name(name): value for name, value in (params or {}).items()},
                "editable_params": {},
            }
            if sample:
                document["sample"] = sample
            book.session.add(
                Run(
                    id=document["_id"],
                    experiment=book.name,
                    num_int=num if isinstance(num, int) else None,
                    num_text=_text(num),
                    document=document,
                )
            )
            book.session.merge(LatestRun(experiment=book.name, run_id=document["_id"]))
            book.publish("runs", "Create", document)
            return document

    def _end(self, book: _Book, run: Run, end_time: datetime) -> Document:
        run.document = run.document | {"end_time": end_time.isoformat()}
        begin = datetime.fromisoformat(run.document["begin_time"])
        # Duration and files belong to the message and the answer; the stored document has neither.
        said = {"duration": (end_time - begin).total_seconds(), "file_catalog": book.files(run.document["num"])}
        book.publish_end(run.document, said)
        return run.document | said

    def end_run(self, experiment: str, end_time: datetime | None = None) -> Document:
        """End the current run. Ending it again sets a new end, as in the original."""
        with self._writing(experiment) as book:
            return self._end(book, book.run_or_current(None), end_time or now())

    def current_run(self, experiment: str, *, skip_closed: bool = False) -> Document | None:
        """The run that was started last."""
        with self._reading(experiment) as book:
            run = book.current()
            if run is None or (skip_closed and run.document["end_time"] is not None):
                return None
            return run.document

    def add_run_params(self, experiment: str, params: Mapping[str, Any], run_num: str | None = None) -> Document:
        """Put parameters on a run, ended or not."""
        with self._writing(experiment) as book:
            run = book.run_or_current(None if run_num is None else run_number(run_num))
            added = {escape_name(name): value for name, value in params.items()}
            run.document = run.document | {"params": run.document["params"] | added}
            book.publish("runs", "Update", run.document)
            return run.document

    def update_editable(self, experiment: str, run_num: str, name: str, value: str, user: str) -> Document:
        """Change a parameter that people edit."""
        with self._writing(experiment) as book:
            run = book.run(run_number(run_num))
            entry = {"value": value, "modified_by": user, "modified_time": now().isoformat()}
            editable = run.document["editable_params"] | {escape_name(name): entry}
            run.document = run.document | {"editable_params": editable}
            book.publish("runs", "Update", run.document)
            return run.document

    def runs(self, experiment: str, *, include_params: bool = True) -> list[Document]:
        """All runs, the latest first."""
        with self._reading(experiment) as book:
            order = (Run.num_int.is_(None).desc(), Run.num_int.desc(), Run.num_text.desc())
            rows = book.session.scalars(select(Run).where(Run.experiment == book.name).order_by(*order))
            left_out = set() if include_params else {"params", "editable_params"}
            return [{key: value for key, value in row.document.items() if key not in left_out} for row in rows]

    def run(self, experiment: str, run_num: str) -> Document:
        """One run."""
        with self._reading(experiment) as book:
            return book.run(run_number(run_num)).document

    def runs_matching_params(self, experiment: str, params: Mapping[str, Any]) -> list[RunNumber]:
        """Numbers of the runs whose parameters all have these values."""
        wanted = {escape_name(name): value for name, value in params.items()}
        absent = object()
        return [
            run["num"]
            for run in self.runs(experiment)
            if all(run["params"].get(name, absent) == value for name, value in wanted.items())
        ]

    def runs_matching_editable(self, experiment: str, name: str, regex: str) -> list[RunNumber]:
        """Numbers of the runs whose editable parameter matches, letter case ignored."""
        try:
            pattern = re.compile(regex, re.IGNORECASE)
        except re.error as error:
            raise RefusedError(f"param_value {regex!r} is not a regular expression: {error}") from error
        entries = ((run["num"], run["editable_params"].get(escape_name(name))) for run in self.runs(experiment))
        return [num for num, entry in entries if entry is not None and pattern.search(str(entry["value"]))]

    def runs_with_tag(self, experiment: str, tag: str) -> list[RunNumber]:
        """Numbers of the runs that a text with this tag belongs to."""
        found = {
            entry["run_num"]
            for entry in self.entries(experiment)
            if tag in entry.get("tags", ()) and entry.get("run_num") is not None
        }
        return sorted(found, key=lambda num: (isinstance(num, str), num))

    # Files

    def register_file(self, experiment: str, info: Mapping[str, Any]) -> Document:
        """Say that a file exists; the same path of the same run replaces what was known of it."""
        with self._writing(experiment) as book:
            given = {key: value for key, value in info.items() if value is not None}
            run = book.run_or_current(None if "run_num" not in given else run_number(given["run_num"]))
            num = run.document["num"]
            row = book.session.scalar(
                select(File).where(
                    File.experiment == book.name, File.run_text == _text(num), File.path == given["path"]
                )
            )
            stamp = now().isoformat()
            document = (
                {"create_timestamp": stamp, "modify_timestamp": stamp, "locations": {}} | given | {"run_num": num}
            )
            document["_id"] = row.id if row is not None else _new_id()
            if row is None:
                row = File(id=document["_id"], experiment=book.name, run_text=_text(num), path=given["path"])
                book.session.add(row)
            row.document = document
            book.publish("file_catalog", "Create", document)
            return document

    def file_available(self, experiment: str, run_num: str, path: str, location: str) -> Document:
        """Say that a registered file has arrived at a location."""
        self._check_location(location)
        with self._writing(experiment) as book:
            row = book.session.scalar(
                select(File).where(
                    File.experiment == book.name, File.run_text == _text(run_number(run_num)), File.path == path
                )
            )
            if row is None:
                raise RefusedError(f"run {run_num} of experiment {book.name} has no file {path}: register it first")
            locations = row.document["locations"] | {location: {"asof": now().isoformat()}}
            row.document = row.document | {"locations": locations}
            book.publish("file_catalog", "Update", row.document)
            return row.document

    def files(self, experiment: str, run_num: str) -> list[Document]:
        """The files of a run."""
        with self._reading(experiment) as book:
            return book.files(run_number(run_num))

    def _check_location(self, location: str) -> None:
        if self._locations and location not in self._locations:
            raise RefusedError(f"location {location!r} is not one of {', '.join(sorted(self._locations))}")

    # Workflow definitions and jobs

    def definitions(self, experiment: str) -> list[Document]:
        """Workflow definitions, by name."""
        with self._reading(experiment) as book:
            rows = book.session.scalars(
                select(Definition).where(Definition.experiment == book.name).order_by(Definition.name)
            )
            return [row.document for row in rows]

    def write_definition(self, experiment: str, definition: Mapping[str, Any], user: str) -> Document:
        """Write a definition, which becomes this user's."""
        if user == "root" or (len(user) == 6 and user.endswith("opr")):
            raise RefusedError(
                f"cannot create a workflow definition for the user {user}: it would run with too many rights"
            )
        self._check_location(definition["location"])
        if definition["trigger"] == Trigger.RUN_PARAM_IS_VALUE and not (
            definition.get("run_param_name") and "run_param_value" in definition
        ):
            raise RefusedError("trigger RUN_PARAM_IS_VALUE needs run_param_name and run_param_value")
        with self._writing(experiment) as book:
            def_id = definition.get("_id")
            same_name = book.session.scalar(
                select(Definition.id).where(Definition.experiment == book.name, Definition.name == definition["name"])
            )
            if same_name is not None and same_name != def_id:
                raise RefusedError(
                    f"there already is a workflow definition {definition['name']!r}: give its _id to change it"
                )
            if def_id is None:
                row = Definition(id=_new_id(), experiment=book.name)
                book.session.add(row)
            else:
                row = book.definition(def_id)
            row.name = definition["name"]
            row.document = {**definition, "_id": row.id, "run_as_user": user}
            return row.document

    def delete_definition(self, experiment: str, def_id: str) -> None:
        """Delete a definition that no job refers to."""
        with self._writing(experiment) as book:
            row = book.definition(def_id)
            jobs = book.session.scalar(select(func.count()).select_from(Job).where(Job.def_id == def_id))
            if jobs:
                raise RefusedError(f"{jobs} jobs refer to this workflow definition: delete them first")
            book.session.delete(row)

    def jobs(self, experiment: str) -> list[Document]:
        """Workflow jobs: the latest runs first, and of a run in the order they were asked for."""
        with self._reading(experiment) as book:
            rows = book.session.scalars(select(Job).where(Job.experiment == book.name).order_by(Job.sequence))
            documents = [book.full_job(row) for row in rows]
        return sorted(documents, key=lambda job: (isinstance(job["run_num"], str), job["run_num"]), reverse=True)

    def job(self, experiment: str, job_id: str) -> Document:
        """One workflow job, with its definition."""
        with self._reading(experiment) as book:
            return book.full_job(book.job(job_id))

    def create_job(self, experiment: str, name: str, run_num: RunNumber, user: str) -> Document:
        """Ask for a definition to be executed for a run."""
        with self._writing(experiment) as book:
            num = book.run(run_number(run_num)).document["num"]
            definition = book.session.scalar(
                select(Definition).where(Definition.experiment == book.name, Definition.name == name)
            )
            if definition is None:
                raise RefusedError(f"experiment {book.name} has no workflow definition {name!r}")
            document = {
                "_id": _new_id(),
                "run_num": num,
                "def_id": definition.id,
                "user": user,
                "status": "START",
                "submit_time": now().isoformat(),
                "counters": [],
            }
            row = Job(id=document["_id"], experiment=book.name, def_id=definition.id, document=document)
            book.session.add(row)
            book.session.flush()
            full = book.full_job(row)
            book.publish("workflow_jobs", "Create", full)
            return full

    def update_job(self, experiment: str, job_id: str, changes: Mapping[str, Any]) -> Document:
        """Change status, counters, tool_id or log_file_path; empty values change nothing, as in the original."""
        with self._writing(experiment) as book:
            row = book.job(job_id)
            row.document = row.document | {key: changes[key] for key in _UPDATABLE_JOB_FIELDS if changes.get(key)}
            full = book.full_job(row)
            book.publish("workflow_jobs", "Update", full)
            return full

    def delete_job(self, experiment: str, job_id: str) -> Document:
        """Remove a job's entry."""
        with self._writing(experiment) as book:
            row = book.job(job_id)
            book.session.delete(row)
            book.publish("workflow_jobs", "Delete", row.document)
            return row.document

    # Texts

    def write_entry(
        self, experiment: str, text: str, user: str, *, run_num: str | None, title: str | None, tags: list[str]
    ) -> Document:
        """Write a text."""
        if not text.strip():
            raise RefusedError("log_text is empty")
        with self._writing(experiment) as book:
            stamp = now().isoformat()
            document: Document = {
                "_id": _new_id(),
                "relevance_time": stamp,
                "insert_time": stamp,
                "author": user,
                "content": text,
                "content_type": "TEXT",
            }
            if run_num is not None:
                wanted = None if run_num == "current" else run_number(run_num)
                document["run_num"] = book.run_or_current(wanted).document["num"]
            if title:
                document["title"] = title
            if tags:
                document["tags"] = tags
            book.session.add(Entry(id=document["_id"], experiment=book.name, document=document))
            book.publish("elog", "Create", document)
            return document

    def entries(self, experiment: str) -> list[Document]:
        """Texts, the earliest first."""
        with self._reading(experiment) as book:
            rows = book.session.scalars(select(Entry).where(Entry.experiment == book.name).order_by(Entry.sequence))
            return [row.document for row in rows]

    # All experiments

    def experiments(self) -> list[str]:
        """Names of all experiments, sorted."""
        with Session(self._engine) as session:
            return list(session.scalars(select(Experiment.name).order_by(Experiment.name)))

    def waiting(self) -> tuple[int, float | None]:
        """How many messages the broker does not have yet, and when the oldest was written (Unix seconds)."""
        with Session(self._engine) as session:
            count, oldest = session.execute(select(func.count(Message.id), func.min(Message.created))).one()
            return count, oldest
