"""A job with a lease ends when nobody renews it, and only then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream.security.errors import ServiceError
from lclstream.security.http import client as http_client

pytestmark = pytest.mark.integration

FOREVER = JobSpec(script="sleep 300")
#: A lease that lasts over a pause of the machine, and that a test can wait for.
LEASE_S = 10.0


def states(history: list[Any]) -> list[str]:
    return [line.state.value for line in history]


def refused(call: Callable[[], object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        call()
    return caught.value


def test_a_job_nobody_looks_after_is_cancelled_with_the_reason_in_its_history(
    running: Any, client: JobClient, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    jobid = client.submit(FOREVER, lease_s=60)
    never_started = client.create(FOREVER, lease_s=0.5)
    # A runner may take longer to start than a short lease lasts.
    until_state(client, jobid, JobState.active)
    client.renew(jobid, 1.0)
    history = until_final(client, jobid)
    assert states(history) == ["new", "queued", "active", "canceled"]
    assert history[-1].info == "its lease of 1 s was not renewed in time"
    assert states(until_final(client, never_started)) == ["new", "canceled"]
    wait_until(lambda: running.processes(jobid) == [], 60, "end of its processes")


def test_a_renewed_job_lives_on_and_one_without_a_lease_needs_none(
    client: JobClient, until_final: Any, until_state: Any
) -> None:
    free = client.submit(FOREVER)
    kept = client.submit(FOREVER, lease_s=LEASE_S)
    began = time.monotonic()
    while time.monotonic() < began + LEASE_S + 1:
        before = time.time()
        assert client.renew(kept, LEASE_S) >= before + LEASE_S
        time.sleep(0.2)
    until_state(client, kept, JobState.active)
    assert client.state(kept) is JobState.active
    # Another length holds from the renewal on; a job that had no lease gets one.
    client.renew(kept, 0.2)
    client.renew(free, 0.2)
    assert until_final(client, kept)[-1].info == "its lease of 0.2 s was not renewed in time"
    assert states(until_final(client, free))[-1] == "canceled"


def test_the_same_request_again_renews_the_lease(client: JobClient, until_state: Any) -> None:
    jobid = client.submit(FOREVER, idempotency_key="leased", lease_s=LEASE_S)
    began = time.monotonic()
    while time.monotonic() < began + LEASE_S + 1:
        assert client.submit(FOREVER, idempotency_key="leased", lease_s=LEASE_S) == jobid
        time.sleep(0.2)
    until_state(client, jobid, JobState.active)
    client.cancel(jobid)


def test_renewals_that_cannot_be_are_refused_in_words(running: Any, client: JobClient, until_final: Any) -> None:
    jobid = client.submit(FOREVER, lease_s=60)
    assert refused(lambda: running.client("bob").renew(jobid, 60)).status == 404
    too_long = refused(lambda: client.renew(jobid, 1e6))
    assert too_long.status == 422
    assert "max_lease_s" in too_long.detail
    assert refused(lambda: client.submit(FOREVER, lease_s=1e6)).status == 422
    with http_client(running.url, running.credentials("bob")) as raw:
        for wrong in (0, -1, "nan", "inf", "soon"):
            assert raw.post(f"/v2/jobs?lease_s={wrong}", json={"script": "true"}).status_code == 422
    client.cancel(jobid)
    history = until_final(client, jobid)
    # What its owner wanted needs no words, and a lease that was still running does not add any.
    assert (states(history)[-1], history[-1].info) == ("canceled", "")
    ended = refused(lambda: client.renew(jobid, 60))
    assert (ended.status, "it is canceled" in ended.detail) == (409, True)


def test_after_a_restart_a_lease_begins_anew_and_still_ends(service: Any, until_final: Any, until_state: Any) -> None:
    service.start()
    client = service.client()
    lease_s = LEASE_S
    kept, lost = client.submit(FOREVER, lease_s=60), client.submit(FOREVER, lease_s=60)
    for jobid in (kept, lost):
        until_state(client, jobid, JobState.active)
    for jobid in (kept, lost):
        client.renew(jobid, lease_s)
    service.kill()
    time.sleep(lease_s + 0.2)  # nobody could renew: that must not end a job
    began = time.time()
    service.start()
    client = service.client()
    assert client.state(lost) is JobState.active
    while not client.state(lost).is_final:
        assert time.time() < began + 60
        client.renew(kept, lease_s)
        time.sleep(0.1)
    history = until_final(client, lost)
    assert states(history) == ["new", "queued", "active", "canceled"]
    assert history[-1].time >= began + lease_s
    assert client.state(kept) is JobState.active


def test_a_reason_outlives_the_service(service: Any, until_final: Any, wait_until: Callable[..., None]) -> None:
    service.settings["backends"] = {"default": {"type": "local", "kill_grace_s": 3}}
    service.start()
    client = service.client()
    jobid = client.submit(JobSpec(script="trap '' TERM; echo on; while :; do sleep 0.1; done"), lease_s=60)
    wait_until(lambda: client.logs(jobid).get("stdout.1") == "on\n", 60, "first words")
    client.renew(jobid, 0.5)
    wait_until((service.prefix / jobid / "control" / "cancel").exists, 60, "end of the lease")
    service.kill()
    service.start()
    assert until_final(service.client(), jobid)[-1].info == "its lease of 0.5 s was not renewed in time"
