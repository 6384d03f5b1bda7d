"""Callbacks arrive: signed, in order, whatever happens to receiver and service in between; and delay no job."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from lclstream.jobs.models import JobSpec, JobState

pytestmark = pytest.mark.integration


@pytest.fixture
def telling(service: Any, receiver: Any) -> Any:
    service.settings["callbacks"] = {
        "allow": [receiver.url],
        "retry_first_s": 0.05,
        "retry_most_s": 0.2,
        "refused_most": 3,
        # What is answered too late is sent again, and a machine may be slow.
        "timeout_s": 60,
    }
    return service


def spec(receiver: Any, script: str = "true") -> JobSpec:
    return JobSpec(
        script=script, callback=receiver.url + "/x", cb_secret=SecretStr("hush"), cb_headers={"x-experiment": "mfx1"}
    )


def test_callbacks_are_signed_and_in_order(telling: Any, receiver: Any, wait_until: Callable[..., None]) -> None:
    telling.start()
    client = telling.client()
    jobs = [client.submit(spec(receiver)) for _ in range(10)]
    for jobid in jobs:
        wait_until(lambda jobid=jobid: len(receiver.states(jobid)) >= 3, 60, f"callbacks of {jobid}")
        assert receiver.states(jobid) == ["queued", "active", "completed"]
    for document, headers, body in receiver.received:
        assert headers["x-hub-signature-256"] == "sha256=" + hmac.new(b"hush", body, hashlib.sha256).hexdigest()
        assert headers["x-experiment"] == "mfx1"
        assert headers["content-type"] == "application/json"
        assert document.keys() == {"jobid", "jobndx", "state", "info"}


def test_a_slow_receiver_delays_no_job(telling: Any, receiver: Any, until_final: Any) -> None:
    receiver.takes.clear()
    telling.start()
    client = telling.client()
    jobid = client.submit(spec(receiver))
    assert until_final(client, jobid)[-1].state is JobState.completed
    assert receiver.states(jobid) == []


def test_callbacks_wait_for_a_receiver_that_is_down_and_for_a_restart(
    telling: Any, receiver: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    receiver.answer = 503
    telling.start()
    client = telling.client()
    jobid = client.submit(spec(receiver))
    until_final(client, jobid)
    telling.kill()
    telling.start()
    assert receiver.states(jobid) == []
    receiver.answer = 200
    wait_until(lambda: len(receiver.states(jobid)) >= 3, 60, "callbacks")
    assert receiver.states(jobid) == ["queued", "active", "completed"]


def test_jobs_that_end_with_the_service_are_told_of(
    telling: Any, receiver: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    telling.start("--cancel-jobs-on-exit")
    jobid = telling.client().submit(spec(receiver, "sleep 300"))
    until_state(telling.client(), jobid, JobState.active)
    wait_until(lambda: receiver.states(jobid) == ["queued", "active"], 60, "callbacks of what was before")
    assert telling.stop() == 0
    assert receiver.states(jobid) == ["queued", "active", "canceled"]


def test_a_receiver_that_refuses_is_asked_a_few_times_and_then_left_alone(
    telling: Any, receiver: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    receiver.answer = 404
    telling.start()
    client = telling.client()
    jobid = client.submit(spec(receiver))
    until_final(client, jobid)
    wait_until(lambda: telling.child.output().count("is given up") == 3, 60, "end of the tries")
    receiver.answer = 200
    later = client.submit(spec(receiver))
    wait_until(lambda: len(receiver.states(later)) == 3, 60, "callbacks of another job")
    assert receiver.states(jobid) == []


def test_a_url_no_longer_allowed_is_not_called(
    telling: Any, receiver: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    receiver.answer = 503
    telling.start()
    jobid = telling.client().submit(spec(receiver))
    until_final(telling.client(), jobid)
    telling.kill()
    telling.settings["callbacks"] = {"allow": []}
    receiver.answer = 200
    telling.start()
    wait_until(lambda: telling.child.output().count("callbacks.allow") == 3, 60, "three refusals")
    assert receiver.states(jobid) == []
