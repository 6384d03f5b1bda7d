"""Jobs outlive the service, and the service tells the truth about them afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from lclstream.jobs.models import JobSpec, JobState, ResourceSpec

pytestmark = pytest.mark.integration


def states(history: list[Any]) -> list[str]:
    return [line.state.value for line in history]


def test_jobs_survive_a_killed_service(
    service: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    service.start()
    client = service.client()
    ends_before = client.submit(JobSpec(script="while [ ! -e $base/go ]; do sleep 0.05; done; exit 5"))
    ends_after = client.submit(JobSpec(script="while [ ! -e $base/go ]; do sleep 0.05; done; echo done"))
    canceled = client.submit(JobSpec(script="sleep 300"))
    waits = client.create(JobSpec(script="echo later"))
    for jobid in (ends_before, ends_after, canceled):
        until_state(client, jobid, JobState.active)
    service.kill()
    # The first job ends while nobody looks.
    (service.prefix / ends_before / "go").touch()
    wait_until(lambda: service.processes(ends_before) == [], 60, "end of the first job")
    service.start()
    client = service.client()
    history = until_final(client, ends_before)
    assert states(history) == ["new", "queued", "active", "failed"]
    assert history[-1].info == "5"
    assert client.state(ends_after) is JobState.active
    client.cancel(canceled)
    assert states(until_final(client, canceled)) == ["new", "queued", "active", "canceled"]
    (service.prefix / ends_after / "go").touch()
    assert states(until_final(client, ends_after)) == ["new", "queued", "active", "completed"]
    assert client.logs(ends_after)["stdout.1"] == "done\n"
    client.start(waits)
    assert states(until_final(client, waits)) == ["new", "queued", "active", "completed"]


def test_the_end_of_a_job_of_an_earlier_run_is_seen_at_once(service: Any, until_state: Any, until_final: Any) -> None:
    service.start()
    jobid = service.client().submit(JobSpec(script="while [ ! -e $base/go ]; do sleep 0.02; done"))
    until_state(service.client(), jobid, JobState.active)
    service.kill()
    service.start()
    client = service.client()
    (service.prefix / jobid / "go").touch()
    end = until_final(client, jobid)[-1]
    assert time.time() - end.time < 20


def test_a_service_killed_at_any_moment_loses_and_doubles_nothing(service: Any, until_final: Any) -> None:
    service.start()
    jobs = []
    for round_ in range(4):
        client = service.client()
        jobs += [
            client.submit(JobSpec(script="echo x >> $base/count; exit 0"), idempotency_key=f"{round_}-{number}")
            for number in range(4 + round_)
        ]
        service.kill()
        service.start()
    client = service.client()
    for jobid in jobs:
        assert states(until_final(client, jobid)) == ["new", "queued", "active", "completed"]
        assert (service.prefix / jobid / "count").read_text() == "x\n"


def test_a_killed_runner_is_a_failed_job_and_leaves_no_process(
    service: Any, until_state: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    service.start()
    client = service.client()
    jobid = client.submit(JobSpec(script="setsid sleep 300 & sleep 300 & sleep 300"))
    until_state(client, jobid, JobState.active)
    os.kill(int(client.history(jobid)[1].info), signal.SIGKILL)
    history = until_final(client, jobid)
    assert states(history) == ["new", "queued", "active", "failed"]
    assert "runner was killed" in history[-1].info
    wait_until(lambda: service.processes() == [], 60, "end of all processes")


def test_a_runner_killed_while_nobody_looks_is_a_failed_job_too(
    service: Any, until_state: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    service.start()
    client = service.client()
    jobid = client.submit(JobSpec(script="setsid sleep 300 & sleep 300"))
    until_state(client, jobid, JobState.active)
    service.kill()
    os.kill(_runner(service, jobid), signal.SIGKILL)
    service.start()
    assert states(until_final(service.client(), jobid))[-1] == "failed"
    wait_until(lambda: service.processes() == [], 60, "end of all processes")


def _runner(service: Any, jobid: str) -> int:
    rows = (service.prefix / jobid / "status.csv").read_text().splitlines()
    return int(rows[1].split(",")[3])


def test_a_duration_holds_while_the_service_is_away(
    service: Any, until_state: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    service.start()
    client = service.client()
    jobid = client.submit(JobSpec(script="sleep 300", resources=ResourceSpec(duration=0.1)))
    until_state(client, jobid, JobState.active)
    service.kill()
    wait_until(lambda: service.processes() == [], 60, "end of the job by itself")
    service.start()
    assert "exceeded" in until_final(service.client(), jobid)[-1].info


def test_jobs_keep_running_when_the_service_is_stopped(service: Any, until_state: Any, until_final: Any) -> None:
    service.start()
    client = service.client()
    jobid = client.submit(JobSpec(script="while [ ! -e $base/go ]; do sleep 0.05; done"))
    until_state(client, jobid, JobState.active)
    assert service.stop() == 0
    assert service.processes() != []
    (service.prefix / jobid / "go").touch()
    service.start()
    assert states(until_final(service.client(), jobid)) == ["new", "queued", "active", "completed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_told_so_ends_its_jobs_when_it_stops(
    service: Any, until_state: Any, wait_until: Callable[..., None], number: signal.Signals
) -> None:
    service.start("--cancel-jobs-on-exit")
    client = service.client()
    jobid = client.submit(JobSpec(script="setsid sleep 300 & sleep 300"))
    until_state(client, jobid, JobState.active)
    assert service.stop(number) == 0
    # The runner's last words are what the service waits for; it ends itself a moment later.
    wait_until(lambda: service.processes() == [], 60, "end of all processes")
    assert (service.prefix / jobid / "status.csv").read_text().splitlines()[-1].split(",")[2] == "canceled"
