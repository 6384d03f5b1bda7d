"""Transfers and jobs that nobody waits for are found by their tags and ended; everything else is left alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException

from lclstream.api.models import TransferPhase
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream_airflow.operators import reconcile
from lclstream_airflow.operators.reconcile import ReconcileOperator, Verdict, verdict
from lclstream_airflow.operators.remote import installation, work_tags
from lclstream_airflow.triggers.polling import OnKill

LASTS = ("task", "run")


@pytest.mark.parametrize(
    ("lasts", "policy", "run_is_live", "task_state", "task_is_there", "said"),
    [
        ("run", "cancel", True, "success", True, Verdict.WANTED),
        ("task", "cancel", True, "success", True, Verdict.ORPHAN),
        *((lasts, "cancel", True, state, True, Verdict.WANTED) for lasts in LASTS for state in (None, "deferred")),
        *((lasts, "cancel", True, state, True, Verdict.ORPHAN) for lasts in LASTS for state in ("failed", "removed")),
        ("task", "cancel", True, None, False, Verdict.ORPHAN),
        ("run", "cancel", False, "success", True, Verdict.ORPHAN),
        ("task", "cancel", False, "deferred", True, Verdict.ORPHAN),
        ("task", "leave", False, None, False, Verdict.LEFT),
    ],
)  # fmt: skip
def test_what_airflow_says_decides(
    lasts: str, policy: str, run_is_live: bool, task_state: str | None, task_is_there: bool, said: Verdict
) -> None:
    assert verdict(lasts, policy, run_is_live, task_state, task_is_there) is said


class Airflow:
    """What a task's runtime says about DAG runs: run id → (run state, {task: state})."""

    def __init__(self, runs: dict[str, tuple[str, dict[str, str | None]]]) -> None:
        self.runs = runs
        self.xcoms: dict[str, Any] = {}
        self.looks = 0

    def get_dr_count(self, dag_id: str, run_ids: list[str], states: list[str]) -> int:
        assert dag_id == "stream_run"
        return sum(self.runs.get(run, ("", {}))[0] in states for run in run_ids)

    def get_task_states(self, dag_id: str, task_ids: list[str], run_ids: list[str]) -> dict[str, Any]:
        self.looks += 1
        return {run: self.runs[run][1] for run in run_ids if run in self.runs}

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[key] = value


def tags(run_id: str, task_id: str = "analyse", **more: str) -> dict[str, str]:
    ours = {
        "airflow": installation(),
        "dag_id": "stream_run",
        "run_id": run_id,
        "task_id": task_id,
        "on_kill": "cancel",
        "lasts": "run",
    }
    return {**ours, **more}


def reconciled(airflow: Airflow, **arguments: Any) -> dict[str, Any]:
    operator = ReconcileOperator(**{"task_id": "end_orphans", "second_look_s": 0.05, **arguments})
    return operator.execute({"ti": airflow})  # type: ignore[typeddict-item]


def test_orphans_are_ended_and_the_rest_is_left_alone(transfers: Any, jobs: JobClient) -> None:
    endless = JobSpec(script="#!/bin/sh\nexec sleep 600")
    started = {
        "waited for": jobs.submit(endless, tags=tags("live")),
        "mapped": jobs.submit(endless, tags=tags("live", map_index="3")),
        "over": jobs.submit(endless, tags=tags("over")),
        "of a mapped task that failed": jobs.submit(endless, tags=tags("live", map_index="4")),
        "left on purpose": jobs.submit(endless, tags=tags("over", on_kill="leave")),
        "of another Airflow": jobs.submit(endless, tags=tags("over", airflow="https://other.example.org")),
        "of no Airflow": jobs.submit(endless),
        "ended": jobs.submit(JobSpec(script="true"), tags=tags("deleted")),
    }
    transfers.first_phase = TransferPhase.producing
    for run_id in ("live", "over", "deleted"):
        transfers.add().tags = tags(run_id, "request_stream", lasts="run")
    asked: dict[str, str | None] = {"request_stream": "success"}
    airflow = Airflow(
        {
            "live": ("running", {"analyse": "deferred", "analyse_3": None, "analyse_4": "failed", **asked}),
            "over": ("failed", {"analyse": "deferred", **asked}),
        }
    )  # fmt: skip
    while jobs.state(started["ended"]) is not JobState.completed:
        time.sleep(0.05)
    try:
        seen = reconciled(airflow, report_only="True")
        assert [orphan["ended"] for orphan in seen["orphans"]] == [False] * 4
        assert airflow.xcoms["ended"] == 0
        assert [one.phase.final for one in transfers.transfers.values()] == [False, False, False]

        result = reconciled(airflow)
        assert {orphan["id"] for orphan in result["orphans"] if orphan["kind"] == "job"} == {
            started["over"], started["of a mapped task that failed"],
        }  # fmt: skip
        assert {orphan["id"] for orphan in result["orphans"] if orphan["kind"] == "transfer"} == {"2", "3"}
        assert (result["checked"], result["wanted"], result["left"]) == (8, 3, 1)
        assert [one.phase.value for one in transfers.transfers.values()] == ["producing", "canceled", "canceled"]
        assert airflow.xcoms["ended"] == 4
        table = airflow.xcoms["report"].splitlines()
        assert len(table) == 5
        assert "stream_run / live / analyse[4]" in airflow.xcoms["report"]
        for name in ("over", "of a mapped task that failed"):
            while not jobs.state(started[name]).is_final:
                time.sleep(0.05)
        assert [name for name, job in started.items() if not jobs.state(job).is_final] == [
            "waited for", "mapped", "left on purpose", "of another Airflow", "of no Airflow",
        ]  # fmt: skip

        again = reconciled(airflow)
        assert again["orphans"] == []
        assert (airflow.xcoms["ended"], airflow.xcoms["report"]) == (0, "")
    finally:
        for job in started.values():
            jobs.cancel(job)


def test_work_that_is_being_cancelled_is_no_orphan(transfers: Any, jobs: JobClient) -> None:
    transfers.first_phase = TransferPhase.producing
    transfer = transfers.add()
    transfer.tags = tags("over", "request_stream")

    class Cancelling(Airflow):
        def get_task_states(self, *arguments: Any, **more: Any) -> dict[str, Any]:
            transfer.phase = TransferPhase.canceled
            return super().get_task_states(*arguments, **more)

    result = reconciled(Cancelling({"over": ("failed", {"request_stream": "failed"})}))
    assert (result["checked"], result["orphans"]) == (1, [])
    assert "cancel" not in transfer.calls


def test_a_service_that_is_away_fails_the_task_after_all_others_were_looked_at(
    transfers: Any, connection: Any, airflow_identity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "START_PATIENCE_S", 0.2)
    connection("psik_default", "psik", "https://127.0.0.1:9", airflow_identity.folder)
    transfers.first_phase = TransferPhase.producing
    transfers.add().tags = tags("gone")
    airflow = Airflow({})
    with pytest.raises(
        AirflowException, match="could not be asked: psik_default; orphans that could not be ended: none"
    ):
        reconciled(airflow)
    assert airflow.xcoms["ended"] == 1


def test_when_airflow_cannot_be_asked_nothing_is_ended(transfers: Any, jobs: JobClient) -> None:
    transfers.first_phase = TransferPhase.producing
    transfers.add().tags = tags("live")

    class Away(Airflow):
        def get_dr_count(self, *arguments: Any, **more: Any) -> int:
            raise RuntimeError("API_SERVER_ERROR")

    with pytest.raises(RuntimeError):
        reconciled(Away({}))
    assert transfers.transfers[1].phase is TransferPhase.producing


def test_tags_say_whose_work_it_is() -> None:
    ti = SimpleNamespace(dag_id="d", run_id="mfx__r0007", task_id="t", map_index=-1, try_number=2)
    context: Any = {"ti": ti}
    assert work_tags(context, OnKill.CANCEL, "run") == {
        "airflow": installation(), "dag_id": "d", "run_id": "mfx__r0007", "task_id": "t", "try": "2",
        "on_kill": "cancel", "lasts": "run",
    }  # fmt: skip
    ti.map_index, ti.run_id = 0, "with\na line break"
    assert work_tags(context, OnKill.LEAVE, "task") == {}, "under a changed name it would look like nobody's"
    ti.run_id = "a"
    assert work_tags(context, OnKill.LEAVE, "task")["map_index"] == "0"
