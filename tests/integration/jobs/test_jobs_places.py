"""A machine's places are given to jobs in the order in which they came, and old jobs make room."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream.security.errors import ServiceError

pytestmark = pytest.mark.integration

HELD = JobSpec(script="echo $base >> $base/../order; while [ ! -e $base/go ]; do sleep 0.05; done")
COMPLETE = ["new", "queued", "active", "completed"]


def states(history: list[Any]) -> list[str]:
    return [line.state.value for line in history]


@pytest.fixture
def narrow(service: Any) -> Any:
    """A service with two places."""
    service.settings["backends"] = {"default": {"type": "local", "max_jobs": 2, "kill_grace_s": 0.5}}
    service.start()
    return service


def active(client: JobClient) -> set[str]:
    return {job.jobid for job in client.list(state=JobState.active)}


def test_jobs_beyond_the_limit_wait_in_order_also_over_a_restart(
    narrow: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    client = narrow.client()
    jobs = [client.submit(HELD) for _ in range(7)]
    wait_until(lambda: active(client) == set(jobs[:2]), 60, "two jobs that run")
    wait_until(lambda: all(client.state(job) is JobState.queued for job in jobs[2:]), 60, "five that wait")
    assert client.history(jobs[2])[-1].info == "waits: 2 jobs run here at a time"
    # One that waits is cancelled, and takes no place when its turn comes.
    client.cancel(jobs[3])
    assert states(until_final(client, jobs[3])) == ["new", "queued", "canceled"]
    narrow.kill()
    (narrow.prefix / jobs[0] / "go").touch()
    narrow.start()
    client = narrow.client()
    assert states(until_final(client, jobs[0])) == COMPLETE
    wait_until(lambda: active(client) == {jobs[1], jobs[2]}, 60, "the next in the row")

    def order() -> list[str]:
        return [line.rsplit("/", 1)[1] for line in (narrow.prefix / "order").read_text().splitlines()]

    for ended, number in enumerate((2, 4, 1, 5, 6), start=1):
        # Never more than two, whoever ends.
        assert len(active(client)) <= 2
        wait_until(lambda number=number: client.state(jobs[number]) is JobState.active, 60, f"start of {number}")
        # One that has its place writes its line when its script runs, which may be later than that of the next one.
        wait_until(lambda ended=ended: len(order()) == min(6, 2 + ended), 60, "scripts of those that have a place")
        (narrow.prefix / jobs[number] / "go").touch()
        assert states(until_final(client, jobs[number])) == COMPLETE
    assert sorted(order()[:2]) == sorted(jobs[:2])
    assert order()[2:] == [jobs[2], *jobs[4:]]


def test_a_job_that_ends_badly_gives_its_place_back(
    narrow: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = narrow.client()
    first, second, third, fourth = (client.submit(HELD) for _ in range(4))
    wait_until(lambda: active(client) == {first, second}, 60, "two jobs that run")
    os.kill(int(client.history(first)[1].info), signal.SIGKILL)
    client.cancel(second)
    assert states(until_final(client, first))[-1] == "failed"
    assert states(until_final(client, second))[-1] == "canceled"
    wait_until(lambda: active(client) == {third, fourth}, 60, "the next two")


def test_folders_of_old_jobs_are_removed_and_of_no_others(
    service: Any, receiver: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    receiver.answer = 503
    service.settings["callbacks"] = {"allow": [receiver.url], "retry_first_s": 0.05, "retry_most_s": 0.1}
    service.start()
    client = service.client()
    done = [client.submit(JobSpec(script="true"), idempotency_key=f"key{n}") for n in range(3)]
    runs, waits = client.submit(HELD), client.create(JobSpec(script="true"))
    untold = client.submit(JobSpec(script="true", callback=receiver.url, cb_secret=SecretStr("x")))
    for job in (*done, untold):
        until_final(client, job)
    until_state(client, runs, JobState.active)
    service.kill()
    service.settings["keep"] = {"jobs": 1}
    service.start()
    client = service.client()

    def listed() -> set[str]:
        return {job.jobid for job in client.list()}

    # One of the four that ended is kept; that nobody took its callbacks keeps another, if it is not that one.
    kept = {runs, waits, untold}
    wait_until(lambda: len(listed() - kept) <= 1, 60, "removal of the old ones")
    assert kept <= listed()
    gone = [job for job in done if job not in listed()]
    assert len(gone) >= 2
    for job in gone:
        assert not (service.prefix / job).exists()
        with pytest.raises(ServiceError) as caught:
            client.state(job)
        assert caught.value.status == 404
        told = f"job {job} of alice is removed: completed since 2"
        wait_until(lambda told=told: told in service.child.output(), 60, "word of the removal")
    # The key of a removed job makes a new one.
    again = client.submit(JobSpec(script="true"), idempotency_key=f"key{done.index(gone[0])}")
    assert again not in done
