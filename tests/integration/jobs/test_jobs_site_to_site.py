"""A job handed on to another site's service ends there as it would here, and its results come back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from lclstream.jobs.models import JobSpec, JobState
from lclstream.jobs.signatures import sign
from lclstream.security.errors import ServiceError
from lclstream.security.http import client as http_client

pytestmark = pytest.mark.integration

COMPLETE = ["0:new", "1:queued", "1:active", "1:completed"]


def states(history: list[Any]) -> list[str]:
    return [f"{line.jobndx}:{line.state.value}" for line in history]


@pytest.fixture
def both(service: Any, other_site: Any) -> Any:
    """Our service with a backend `olcf`, and the one there, which may call back."""
    other_site.settings["callbacks"] = {"allow": [f"{service.url}/v2/jobs/callback"]}
    service.settings["backends"] = {
        "default": {"type": "local"},
        "olcf": {
            "type": "psik",
            "url": other_site.url,
            "callback_url": f"{service.url}/v2",
            "poll_s": 20,
            "fetch_bytes": 1000,
        },
    }
    other_site.start()
    service.start()
    return service


def test_a_job_runs_at_the_other_site_and_its_results_come_back(both: Any, other_site: Any, until_final: Any) -> None:
    client = both.client()
    script = "cat deep/input; mkdir -p out/a; echo r > out/a/result; head -c 5000 /dev/zero > big; exit 0"
    jobid = client.create(JobSpec(name="far", script=script, backend="olcf"))
    client.upload(jobid, "deep/input", b"from here\n")
    began = time.monotonic()
    client.start(jobid)
    history = until_final(client, jobid)
    assert states(history) == COMPLETE
    # The other service's callbacks were the reason to look: the next look was 20 s away.
    assert time.monotonic() - began < 15
    assert client.logs(jobid)["stdout.1"] == "from here\n"
    assert client.download(jobid, "out/a/result") == b"r\n"
    assert "big (5000 bytes) stays at" in client.logs(jobid)["console"]
    assert (other_site.prefix / history[1].info / "work" / "big").stat().st_size == 5000
    assert both.processes() == []


def test_a_job_is_cancelled_at_the_other_site(
    both: Any, other_site: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = both.client()
    jobid = client.submit(JobSpec(script="sleep 300", backend="olcf"))
    until_state(client, jobid, JobState.active)
    client.cancel(jobid)
    assert states(until_final(client, jobid)) == [*COMPLETE[:3], "1:canceled"]
    wait_until(lambda: other_site.processes() == [], 10, "end of all processes")


def test_what_the_other_site_refuses_is_failed_in_its_words(both: Any, until_final: Any) -> None:
    client = both.client()
    jobid = client.submit(JobSpec(script="true", backend="olcf", attributes={"--qos": "x"}))
    history = until_final(client, jobid)
    assert states(history) == ["0:new", "0:failed"]
    assert "--qos" in history[-1].info
    with pytest.raises(ServiceError, match=r"403.*directory /tmp"):
        client.submit({"script": "true", "backend": "olcf", "directory": "/tmp"})


def test_both_services_may_be_killed_and_nothing_is_lost_or_doubled(
    both: Any, other_site: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = both.client()
    jobid = client.submit(
        JobSpec(script="echo x >> $base/count; while [ ! -e $base/go ]; do sleep 0.05; done; exit 9", backend="olcf")
    )
    until_state(client, jobid, JobState.active)
    there = client.history(jobid)[1].info
    other_site.kill()
    both.kill()
    (other_site.prefix / there / "go").touch()
    both.settings["backends"]["olcf"]["poll_s"] = 0.5
    both.start()
    assert both.client().state(jobid) is JobState.active
    wait_until(lambda: both.client().backends()["olcf"].status == "unavailable", 20, "words about the other site")
    other_site.start()
    history = until_final(both.client(), jobid)
    assert states(history) == [*COMPLETE[:3], "1:failed"]
    assert history[-1].info == "9"
    assert (other_site.prefix / there / "count").read_text() == "x\n"


def test_a_forged_callback_is_refused_and_changes_nothing(both: Any, until_state: Any) -> None:
    client = both.client()
    jobid = client.submit(JobSpec(script="sleep 300", backend="olcf"))
    until_state(client, jobid, JobState.active)
    there = client.history(jobid)[1].info
    body = json.dumps({"jobid": there, "jobndx": 1, "state": "completed", "info": "0"}).encode()
    secret = json.loads((both.prefix / jobid / "control" / "remote.json").read_text())["secret"]
    with http_client(both.url, both.credentials("mallory")) as raw:

        def tell(signature: str | bytes | None) -> int:
            headers: list[tuple[str, Any]] = [("content-type", "application/json")]
            if signature is not None:
                headers.append(("x-hub-signature-256", signature))
            return raw.post("/v2/jobs/callback", content=body, headers=headers).status_code

        assert tell(None) == 403
        assert tell(sign(body, "guess")) == 403
        assert tell("sha256=é".encode()) == 403
        # Even a right signature is only a reason to look: the other service says that the job runs.
        assert tell(sign(body, secret)) == 200
    time.sleep(0.5)
    assert client.state(jobid) is JobState.active
    client.cancel(jobid)
