from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lclstream.arp.actions import Actions
from lclstream.arp.airflow_rest import AirflowRefusalError, AirflowUnavailableError
from lclstream.arp.decisions import DagRun, Scope, decide
from lclstream.arp.events import Crud, JobEvent, RunEvent
from lclstream.arp.logbook_jobs import (
    KILLED,
    TASKS,
    Follower,
    JobEntries,
    KillError,
    Report,
    keep_following,
    kill,
    report,
)
from lclstream.elog.client import ElogError
from lclstream.elog.models import RunDocument, WorkflowDefinition, WorkflowJob
from lclstream.security.errors import PeerError, UnreachableError

LOGINS = frozenset({"arp", "arp2"})
SCOPE = Scope("s3df", logins=LOGINS)
DEFINITION = WorkflowDefinition.model_validate(
    {"_id": "d1", "name": "stream", "executable": "airflow:stream_run", "trigger": "START_OF_RUN", "location": "s3df"}
)
NAME = "mfx1__r0007__start_of_run__stream"


class Airflow:
    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.tasks: list[str | None] = []
        self.error: Exception | None = None
        self.asked_since: list[datetime] = []
        self.looked_at_tasks = 0

    def create_dag_run(self, dag_id: str, dag_run_id: str, conf: dict[str, Any]) -> bool:
        new = (dag_id, dag_run_id) not in self.runs
        self.runs.setdefault((dag_id, dag_run_id), {"state": "queued", "conf": conf, "note": None})
        return new

    def dag_run(self, dag_id: str, dag_run_id: str) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        if (dag_id, dag_run_id) not in self.runs:
            raise AirflowRefusalError("not found", status=404, detail="not found")
        return {"dag_id": dag_id, "dag_run_id": dag_run_id, **self.runs[(dag_id, dag_run_id)]}

    def fail_dag_run(self, dag_id: str, dag_run_id: str, *, note: str) -> None:
        self.runs[(dag_id, dag_run_id)] |= {"state": "failed", "note": note}

    def changed_dag_runs(self, since: datetime) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        self.asked_since.append(since)
        return [self.dag_run(*key) for key in self.runs]

    def task_states(self, dag_id: str, dag_run_id: str) -> list[str | None]:
        self.looked_at_tasks += 1
        return self.tasks

    def page(self, dag_id: str, dag_run_id: str) -> str:
        return f"https://airflow/{dag_id}/{dag_run_id}"


class Logbook:
    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.error: PeerError | None = None
        self.updates = 0

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def workflow_jobs(self, experiment: str) -> list[WorkflowJob]:
        self._fail()
        return [WorkflowJob.model_validate(job) for job in self.jobs.values()]

    def create_workflow_job(self, experiment: str, name: str, run: int | str) -> WorkflowJob:
        self._fail()
        job = {"_id": f"j{len(self.jobs) + 1}", "run_num": run, "def_id": "d1", "user": "arp", "status": "START"}
        self.jobs[job["_id"]] = job
        return WorkflowJob.model_validate(job)

    def update_workflow_job(self, experiment: str, job_id: str, **changes: Any) -> WorkflowJob:
        self._fail()
        if job_id not in self.jobs:
            raise ElogError("no such job", errormsg="no such job")
        self.updates += 1
        self.jobs[job_id] |= {key: value for key, value in changes.items() if value is not None}
        return WorkflowJob.model_validate(self.jobs[job_id])

    def delete_workflow_job(self, experiment: str, job_id: str) -> None:
        del self.jobs[job_id]

    def of(self, experiment: str, *, fresh: bool) -> list[WorkflowDefinition]:
        return [DEFINITION]


def wanted() -> DagRun:
    document = {"num": 7, "end_time": None}
    (dag_run,) = decide(
        RunEvent("mfx1", Crud.CREATE, RunDocument.model_validate(document), document), [DEFINITION], SCOPE
    ).dag_runs
    return dag_run


def start(airflow: Airflow, logbook: Logbook) -> Any:
    message = b'{"experiment_name": "mfx1", "CRUD": "Create", "value": {"num": 7, "end_time": null}}'
    processor = Actions(SCOPE, logbook, airflow, logbook, JobEntries(logbook, LOGINS))  # type: ignore[arg-type]
    return processor.handle("runs", message)


def follower(airflow: Airflow, logbook: Logbook) -> Follower:
    return Follower(airflow, logbook, SCOPE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "note", "tasks", "shown"),
    [
        ("queued", None, None, Report("SUBMITTED", None)),
        ("running", None, ["success", "running", None], Report("RUNNING", "1 of 3 done, 1 running, 1 waiting")),
        ("success", None, ["success", "skipped"], Report("DONE", "1 of 2 done, 1 skipped")),
        ("failed", None, ["upstream_failed", "failed"], Report("FAILED", "0 of 2 done, 1 failed, 1 upstream failed")),
        ("failed", KILLED + " by alice", [], Report("EXITED", "0 of 0 done")),
        ("failed", "somebody's note", [], Report("FAILED", "0 of 0 done")),
        ("paused", None, [], None),
    ],
)
def test_a_dag_runs_state_in_the_logbooks_words(
    state: str, note: str | None, tasks: list[str | None] | None, shown: Report | None
) -> None:
    assert report({"state": state, "note": note}, tasks) == shown


def test_a_dag_run_gets_one_job_however_often_its_event_comes() -> None:
    airflow, logbook = Airflow(), Logbook()
    for _ in range(2):
        start(airflow, logbook)
    assert list(logbook.jobs) == ["j1"]
    assert airflow.runs[("stream_run", NAME)]["conf"]["job_id"] == "j1"


def test_killed_between_job_and_dag_run_the_next_one_takes_the_job_there_is() -> None:
    airflow, logbook = Airflow(), Logbook()
    assert JobEntries(logbook, LOGINS).entry_for(wanted()) == ("j1", True)  # type: ignore[arg-type]
    start(airflow, logbook)
    assert list(logbook.jobs) == ["j1"]
    assert airflow.runs[("stream_run", NAME)]["conf"]["job_id"] == "j1"


def test_the_job_that_another_of_the_group_made_is_taken() -> None:
    airflow, logbook = Airflow(), Logbook()
    logbook.create_workflow_job("mfx1", "stream", 7)
    logbook.jobs["j1"]["user"] = "arp2"
    start(airflow, logbook)
    assert list(logbook.jobs) == ["j1"]
    assert airflow.runs[("stream_run", NAME)]["conf"]["job_id"] == "j1"


def test_the_job_of_the_one_who_came_second_is_withdrawn() -> None:
    airflow, logbook = Airflow(), Logbook()
    airflow.create_dag_run("stream_run", NAME, {"job_id": "other"})
    assert start(airflow, logbook).existed == [NAME]
    assert logbook.jobs == {}


def test_a_logbook_that_shows_nothing_does_not_keep_a_dag_run_from_being_made() -> None:
    airflow, logbook = Airflow(), Logbook()
    logbook.error = UnreachableError("down")
    assert start(airflow, logbook).made == [NAME]
    assert airflow.runs[("stream_run", NAME)]["conf"]["job_id"] is None


@pytest.mark.parametrize("user", ["arp", "arp2"])
def test_jobs_of_any_of_the_group_are_nobodys_request(user: str) -> None:
    job = WorkflowJob.model_validate({"_id": "j1", "run_num": 7, "user": user, "def": DEFINITION.document()})
    decision = decide(JobEvent("mfx1", Crud.CREATE, job), [], SCOPE)
    assert decision.not_for_us is not None
    assert "our own" in decision.not_for_us.reason


def test_status_and_tasks_are_shown_and_the_dags_own_counters_stay() -> None:
    airflow, logbook = Airflow(), Logbook()
    start(airflow, logbook)
    following = follower(airflow, logbook)
    following.follow()
    assert logbook.jobs["j1"]["status"] == "SUBMITTED"
    logbook.jobs["j1"]["counters"] = [{"key": "events", "value": 120}]
    airflow.runs[("stream_run", NAME)]["state"] = "running"
    airflow.tasks = ["success", "running"]
    following.follow()
    job = logbook.jobs["j1"]
    assert (job["status"], job["tool_id"], job["log_file_path"]) == (
        "RUNNING",
        NAME,
        f"https://airflow/stream_run/{NAME}",
    )
    assert job["counters"] == [{"key": TASKS, "value": "1 of 2 done, 1 running"}, {"key": "events", "value": 120}]


def test_what_did_not_change_is_not_told_again_even_by_one_that_was_just_started() -> None:
    airflow, logbook = Airflow(), Logbook()
    start(airflow, logbook)
    airflow.runs[("stream_run", NAME)]["state"] = "success"
    first = follower(airflow, logbook)
    assert [first.follow(), first.follow()] == [1, 0]
    told, looked = logbook.updates, airflow.looked_at_tasks
    assert follower(airflow, logbook).follow() == 0
    assert (logbook.updates, airflow.looked_at_tasks) == (told, looked)


def test_a_failed_look_is_repeated_from_the_same_time() -> None:
    airflow, logbook = Airflow(), Logbook()
    moment = datetime(2026, 3, 1, tzinfo=UTC)
    following = Follower(airflow, logbook, SCOPE, clock=lambda: moment)  # type: ignore[arg-type]
    airflow.error = AirflowUnavailableError("down")
    with pytest.raises(AirflowUnavailableError):
        following.follow()
    airflow.error = None
    following.follow()
    moment += timedelta(minutes=10)
    following.follow()
    assert airflow.asked_since == [datetime(2026, 2, 28, tzinfo=UTC), datetime(2026, 2, 28, 23, 59, tzinfo=UTC)]


def test_other_peoples_dag_runs_and_removed_jobs_are_left_alone() -> None:
    airflow, logbook = Airflow(), Logbook()
    airflow.create_dag_run("x", "manual", {})
    airflow.create_dag_run("x", "elsewhere", {"job_id": "j1", "location": "olcf", "experiment": "mfx1"})
    airflow.create_dag_run("x", "removed", {"job_id": "gone", "location": "s3df", "experiment": "mfx1"})
    following = follower(airflow, logbook)
    following.follow()
    assert following.follow() == 0
    assert logbook.jobs == {}


def job(user: str, **changes: Any) -> WorkflowJob:
    return WorkflowJob.model_validate(
        {"_id": "j1", "run_num": 7, "user": user, "status": "RUNNING", "def": DEFINITION.document()} | changes
    )


@pytest.mark.parametrize(("user", "name"), [("arp", NAME), ("arp2", NAME), ("bob", "mfx1__r0007__manual__stream__j1")])
def test_killing_a_job_fails_its_dag_run_and_says_who_asked(user: str, name: str) -> None:
    airflow = Airflow()
    airflow.create_dag_run("stream_run", name, {})
    answer = kill(airflow, SCOPE, "mfx1", job(user), "elog")  # type: ignore[arg-type]
    assert (answer["_id"], answer["status"]) == ("j1", "EXITED")
    assert airflow.runs[("stream_run", name)]["state"] == "failed"
    assert report(airflow.runs[("stream_run", name)], []) == Report("EXITED", "0 of 0 done")


def test_a_dag_run_that_has_ended_is_not_killed_any_more() -> None:
    airflow = Airflow()
    airflow.create_dag_run("stream_run", NAME, {})
    airflow.runs[("stream_run", NAME)]["state"] = "success"
    assert kill(airflow, SCOPE, "mfx1", job("arp"), "elog")["status"] == "DONE"  # type: ignore[arg-type]
    assert airflow.runs[("stream_run", NAME)]["note"] is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"def": DEFINITION.document() | {"location": "olcf"}}, "no Airflow DAG at s3df"),
        ({"def": DEFINITION.document() | {"executable": "/bin/x"}}, "no Airflow DAG"),
        ({"def": None}, "no Airflow DAG"),
        ({"def": DEFINITION.document() | {"trigger": "NEW"}}, "not a valid Trigger"),
        ({}, "not found"),
    ],
)
def test_what_cannot_be_killed_is_said(change: dict[str, Any], why: str) -> None:
    with pytest.raises(KillError, match=why):
        kill(Airflow(), SCOPE, "mfx1", job("arp", **change), "elog")  # type: ignore[arg-type]


def test_an_airflow_that_does_not_answer_is_said_to_the_one_who_kills() -> None:
    airflow = Airflow()
    airflow.error = AirflowUnavailableError("down")
    with pytest.raises(KillError, match="could not be asked"):
        kill(airflow, SCOPE, "mfx1", job("arp"), "elog")  # type: ignore[arg-type]


def test_trouble_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    airflow, logbook = Airflow(), Logbook()
    stop, looks = threading.Event(), 0
    airflow.error = AirflowUnavailableError("down")
    caplog.set_level("INFO")

    def leads() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            airflow.error = None
        if looks == 4:
            stop.set()
        return looks != 4

    keep_following(follower(airflow, logbook), leads=leads, stop=stop, every_s=0.001)
    # Services that other tests have started go on, and say what they do.
    texts = [record.message for record in caplog.records if record.name == "lclstream.arp.jobs"]
    assert texts == ["the logbook's jobs are not up to date: down", "the logbook's jobs are up to date again"]
