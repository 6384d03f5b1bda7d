"""A job handed on to another site's service ends there as it would here, and its results come back."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Response

from lclstream.jobs.models import FileStat, JobSpec, JobState, JobSummary
from lclstream.jobs.signatures import sign
from lclstream.security.authority import SiteAuthority
from lclstream.security.errors import ServiceError
from lclstream.security.http import client as http_client
from lclstream.security.server import server_for

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
            "poll_s": 600,
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
    client.start(jobid)
    # The other service's callbacks are the reason to look: the next look is ten minutes away.
    history = until_final(client, jobid)
    assert states(history) == COMPLETE
    assert client.logs(jobid)["stdout.1"] == "from here\n"
    assert client.download(jobid, "out/a/result") == b"r\n"
    assert "big (5000 bytes): `fetch_bytes` allows" in client.logs(jobid)["console"]
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
    wait_until(lambda: other_site.processes() == [], 60, "end of all processes")


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
    wait_until(lambda: both.client().backends()["olcf"].status == "unavailable", 60, "words about the other site")
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


@dataclass
class ScriptedSite:
    """Another site's service with one job, whose history and results a test writes: what schedulers there can do."""

    url: str
    jobid: str = "1712345678.123"
    history: list[tuple[int, str, str]] = field(default_factory=lambda: [(0, "new", "")])
    listings: dict[str, dict[str, FileStat]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)

    def has(self, data: dict[str, bytes], **folders: dict[str, bytes]) -> None:
        """The job left these files, and folders with files."""
        self.listings[""] = {name: FileStat(size=len(text), atime=0, mtime=0) for name, text in data.items()}
        self.data.update(data)
        for folder, files in folders.items():
            self.listings[""][folder] = FileStat(size=0, atime=0, mtime=0, children=True)
            self.listings[folder] = {name: FileStat(size=len(text), atime=0, mtime=0) for name, text in files.items()}
            self.data.update({f"{folder}/{name}": text for name, text in files.items()})

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v2/jobs")
        async def create() -> str:
            return self.jobid

        @app.post("/v2/jobs/{jobid}/start")
        async def start(jobid: str) -> None:
            self.history += [(1, "queued", "17"), (1, "active", "node1")]

        @app.post("/v2/jobs/{jobid}/files")
        async def upload(jobid: str) -> None:
            pass

        @app.get("/v2/jobs/{jobid}")
        async def history(jobid: str) -> list[JobSummary]:
            self.asked[jobid] += 1
            if jobid != self.jobid:
                raise HTTPException(404, "no such job")
            return [
                JobSummary(jobid=jobid, name="", updated=1e9 + at, jobndx=jobndx, state=JobState(state), info=info)
                for at, (jobndx, state, info) in enumerate(self.history)
            ]

        @app.get("/v2/jobs/{jobid}/logs")
        async def logs(jobid: str) -> dict[str, str]:
            return {"console": "", "stdout.1": "said there\n"}

        @app.get("/v2/jobs/{jobid}/files")
        async def files(jobid: str) -> dict[str, FileStat]:
            return self.listings.get("", {})

        @app.get("/v2/jobs/{jobid}/files/{name:path}", response_model=None)
        async def file(jobid: str, name: str) -> Response | dict[str, FileStat]:
            self.asked[name] += 1
            if name in self.data:
                return Response(self.data[name])
            if name in self.listings:
                return self.listings[name]
            raise HTTPException(403, "not allowed")

        return app


@pytest.fixture
def scripted(
    service: Any, sites: dict[str, SiteAuthority], free_port: Callable[..., int], wait_until: Callable[..., None]
) -> Iterator[ScriptedSite]:
    """The other site; our service has a backend `olcf` for it, and runs."""
    port = free_port()
    site = ScriptedSite(f"https://127.0.0.1:{port}")
    server = server_for(site.app(), host="127.0.0.1", port=port, credentials=sites["s3df"].member("scripted"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 60, "start of the scripted site")
        service.settings["backends"] = {
            "default": {"type": "local"},
            "olcf": {"type": "psik", "url": site.url, "poll_s": 0.1},
        }
        service.start()
        yield site
    finally:
        service.close()
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def test_a_job_that_the_scheduler_there_queues_again_is_followed_to_its_end(
    service: Any, scripted: ScriptedSite, until_state: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    client = service.client()
    jobid = client.submit(JobSpec(script="true", backend="olcf"))
    until_state(client, jobid, JobState.active)
    scripted.history.append((2, "queued", "4711"))
    until_state(client, jobid, JobState.queued)
    # The next look must still ask for the job by the id that it has there.
    looks = scripted.asked.total()
    wait_until(lambda: scripted.asked.total() > looks + 1, 60, "two more looks")
    scripted.history += [(2, "active", "node2"), (2, "completed", "0")]
    history = until_final(client, jobid)
    assert states(history) == [*COMPLETE[:3], "2:queued", "2:active", "2:completed"]
    assert [line.info for line in history if line.state is JobState.queued] == [scripted.jobid, scripted.jobid]
    assert "4711" not in scripted.asked


def test_results_that_cannot_be_kept_are_named_and_do_not_keep_a_job_from_its_end(
    service: Any, scripted: ScriptedSite, until_state: Any, until_final: Any
) -> None:
    client = service.client()
    jobid = client.create(JobSpec(script="true", backend="olcf"))
    client.upload(jobid, "out/a", b"a folder here is a file there")
    client.upload(jobid, "in", b"and the other way round")
    client.start(jobid)
    until_state(client, jobid, JobState.active)
    scripted.has({"out": b"x", "back\\slash": b"x", "good": b"kept"}, **{"in": {"a": b"x"}, "fold\\er": {"a": b"x"}})
    del scripted.listings["fold\\er"]
    scripted.history.append((1, "completed", "0"))
    history = until_final(client, jobid)
    assert states(history) == COMPLETE
    assert client.download(jobid, "good") == b"kept"
    assert client.download(jobid, "out/a") == b"a folder here is a file there"
    logs = client.logs(jobid)
    assert logs["stdout.1"] == "said there\n"
    for name in ("out", "back\\slash", "in/a", "fold\\er/"):
        assert f"stays at {scripted.url}, job {scripted.jobid}: {name}: " in logs["console"]
    assert scripted.asked["out"] == 1
