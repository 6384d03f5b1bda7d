"""A job that a task waits for has a lease, which the wait renews: nobody waits any more, and the job ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred

from lclstream.jobs import client as job_client
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.triggers.psik import PsikJobTrigger


def operator(script: str, **arguments: Any) -> PsikOperator:
    given: dict[str, Any] = {"task_id": "analyse", "job": {"script": f"#!/bin/sh\n{script}"}, "poll_interval": 0.05}
    return PsikOperator(**{**given, **arguments})


def trigger(job_id: str, lease_s: float) -> PsikJobTrigger:
    return PsikJobTrigger(
        conn_id="psik_default", remote_id=job_id, deadline=time.time() + 60, poll_interval=0.05, lease_s=lease_s
    )


def deferred(task: PsikOperator, context: dict[str, Any]) -> PsikJobTrigger:
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context)
    assert isinstance(caught.value.trigger, PsikJobTrigger)
    return caught.value.trigger


def test_a_task_killed_before_its_trigger_starts_leaves_no_job_behind(
    jobs: JobClient, context: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    deferred(operator("exec sleep 300", lease_s=5), context)
    job = context["ti"].xcoms["job_id"]
    # Nobody starts the trigger, and nobody is told.
    wait_until(lambda: jobs.state(job).is_final, 60, "end of the job")
    last = jobs.history(job)[-1]
    assert (last.state, last.info) == (JobState.canceled, "its lease of 5 s was not renewed in time")


def test_waiting_keeps_the_lease(jobs: JobClient) -> None:
    # Long enough for a machine that stands still for some seconds, and shorter than the job.
    lease_s = 6.0
    job = jobs.submit(JobSpec(script="#!/bin/sh\nsleep 10"), lease_s=lease_s)
    assert asyncio.run(trigger(job, lease_s).wait())["status"] == "reached"


def test_the_deferred_task_hands_its_lease_to_the_trigger_that_is_made_anew(
    jobs: JobClient, context: dict[str, Any]
) -> None:
    first = deferred(operator("sleep 0.1", lease_s="30"), context)
    _, arguments = first.serialize()
    assert PsikJobTrigger(**arguments).lease_s == 30.0
    jobs.cancel(context["ti"].xcoms["job_id"])


@pytest.mark.parametrize("arguments", [{"lease_s": None}, {"lease_s": "None"}, {"on_kill_policy": "leave"}])
def test_work_that_outlives_its_task_has_no_lease(
    jobs: JobClient, context: dict[str, Any], tmp_path: Any, arguments: dict[str, Any]
) -> None:
    (tmp_path / "in").write_text("x")
    task = operator("exec sleep 600", input_files={"in": str(tmp_path / "in")}, **arguments)
    renewals = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobClient, "renew", lambda self, jobid, lease_s: renewals.append(jobid))
        assert deferred(task, context).lease_s is None
    assert renewals == []
    jobs.cancel(context["ti"].xcoms["job_id"])


def test_a_service_that_knows_no_leases_is_waited_for_all_the_same(
    jobs: JobClient, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def elsewhere(jobid: str, lease_s: float) -> Any:
        return job_client._Call("POST", f"/jobs/{jobid}/no-such-route", json={"lease_s": lease_s})

    monkeypatch.setattr(job_client, "_renewal", elsewhere)
    (tmp_path / "in").write_text("x")
    task = operator("sleep 0.5", input_files={"in": str(tmp_path / "in")}, deferrable=False)
    assert task.execute(context)["state"] == "completed"
