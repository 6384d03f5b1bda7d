"""Jobs at a facility with the IRI API, through our job service; the facility is a small one, its jobs are processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

from lclstream.jobs.models import JobSpec, JobState, ResourceSpec
from lclstream.security.errors import ServiceError

pytestmark = pytest.mark.integration

TOKEN = "facility-t0ken"


class Facility:
    """The compute routes of the IRI facility API, version 2, as its public description has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.keys: dict[str, str] = {}
        self.has_keys = True
        self.submissions = 0
        #: Statuses to answer the next requests with: before anything is done, and after a job was started.
        self.fail_before: list[int] = []
        self.fail_after: list[int] = []
        #: Routes run in threads: nobody looks at a job between the end of its process and the word that it is canceled.
        self._looking = threading.Lock()
        self.app = self._app()

    def _state(self, number: str) -> dict[str, Any]:
        job, process = self.jobs[number], self.processes[number]
        with self._looking:
            code = process.poll()
            if job["state"] == "active" and code is not None:
                job["state"] = "completed" if code == 0 else "failed"
                job["exit_code"] = code
        status = {"state": job["state"], "time": time.time(), "exit_code": job.get("exit_code")}
        return {"id": number, "status": {name: value for name, value in status.items() if value is not None}}

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, call: Any) -> Response:
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                return Response(json.dumps({"title": "Unauthorized", "status": 401}), 401)
            if self.fail_before:
                return Response(json.dumps({"detail": "scripted"}), self.fail_before.pop(0))
            response: Response = await call(request)
            return response

        @app.post("/api/v2/compute/job/{resource}")
        async def launch(resource: str, request: Request) -> Any:
            spec = await request.json()
            known = {
                "executable", "arguments", "directory", "name", "inherit_environment", "environment", "stdout_path",
                "stderr_path", "resources", "attributes",
            }  # fmt: skip
            if resource != "cpu" or set(spec) - known:
                raise HTTPException(422, f"resource {resource}, unknown fields {set(spec) - known}")
            key = request.headers.get("idempotency-key")
            if key and not self.has_keys:
                raise HTTPException(501, "no idempotency store is configured")
            if key in self.keys:
                return {"id": self.keys[key]}
            if spec["attributes"].get("queue_name") == "nowhere":
                raise HTTPException(400, "no queue nowhere")
            self.submissions += 1
            number = f"job-{self.submissions}"
            if key:
                self.keys[key] = number
            with open(spec["stdout_path"], "ab") as out:
                self.processes[number] = subprocess.Popen(
                    [spec["executable"], *spec["arguments"]], cwd=spec["directory"], stdout=out, stderr=out,
                    stdin=subprocess.DEVNULL, env={"PATH": os.environ["PATH"], **spec["environment"]},
                    start_new_session=True,
                )  # fmt: skip
            self.jobs[number] = {"spec": spec, "state": "active"}
            if self.fail_after:
                raise HTTPException(self.fail_after.pop(0), "scripted")
            return {"id": number, "status": {"state": "queued"}}

        @app.get("/api/v2/compute/status/{resource}/{number}")
        def status(resource: str, number: str, historical: bool = True) -> Any:
            if number not in self.jobs:
                raise HTTPException(404, "no such job")
            return self._state(number)

        @app.post("/api/v2/compute/status/{resource}")
        def statuses(resource: str, limit: int = 100, offset: int = 0, include_spec: bool = False) -> Any:
            found = [{**self._state(one), "job_spec": self.jobs[one]["spec"]} for one in self.jobs]
            return found[offset : offset + limit]

        @app.delete("/api/v2/compute/cancel/{resource}/{number}", status_code=204)
        def cancel(resource: str, number: str) -> None:
            if number not in self.jobs:
                raise HTTPException(404, "no such job")
            with self._looking:
                if self.processes[number].poll() is None:
                    os.killpg(self.processes[number].pid, 15)
                    self.processes[number].wait(20)
                    self.jobs[number]["state"] = "canceled"

        return app

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait(20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Facility, str]]:
    """A facility, and its address."""
    facility = Facility(tmp_path_factory.mktemp("facility"))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(facility.app, log_config=None, lifespan="off", timeout_keep_alive=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield facility, f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listening.close()
    facility.close()


@pytest.fixture(scope="module")
def site(place: tuple[Facility, str], make_service: Callable[[str], Any]) -> Any:
    """Our job service, whose backend is that facility."""
    facility, url = place
    service = make_service("iri")
    token = service.folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    service.settings["backends"] = {
        "default": {
            "type": "iri", "url": url, "resource": "cpu", "token_file": str(token), "poll_s": 0.1,
            "mpirun": "srun -n 1", "directory": str(facility.folder), "project_name": "m1234",
            "allow_attributes": ["--partition", "--constraint"],
        }
    }  # fmt: skip
    service.start()
    service.token = token
    return service


@pytest.fixture
def facility(place: tuple[Facility, str]) -> Facility:
    facility = place[0]
    facility.has_keys = True
    facility.fail_before.clear()
    facility.fail_after.clear()
    return facility


def states(history: list[Any]) -> list[str]:
    return [line.state.value for line in history]


def test_a_script_runs_at_the_facility_in_a_folder_of_its_own(site: Any, facility: Facility, until_final: Any) -> None:
    client = site.client()
    script = '#!/usr/bin/env bash\necho "it\'s $COLOUR $mpirun"; [ "$PWD" = "$base" ] && echo \'in "place"\'\n'
    spec = JobSpec(
        name="far away", script=script, environment={"COLOUR": "blue"}, attributes={"--constraint": "gpu"},
        resources=ResourceSpec(duration=5, node_count=2, gpu_cores_per_process=4),
    )  # fmt: skip
    job = client.submit(spec)
    history = until_final(client, job)
    assert states(history) == ["new", "queued", "active", "completed"]
    asked = facility.jobs[history[1].info]["spec"]
    assert asked["attributes"] == {"duration": 300, "account": "m1234", "custom_attributes": {"constraint": "gpu"}}
    assert asked["resources"] == {
        "node_count": 2, "cpu_cores_per_process": 1, "gpu_cores_per_process": 4, "exclusive_node_use": True,
    }  # fmt: skip
    assert Path(asked["stdout_path"]).read_text() == 'it\'s blue srun -n 1\nin "place"\n'
    assert asked["stdout_path"] in client.logs(job)["console"]


def test_a_failure_keeps_its_exit_code(site: Any, facility: Facility, until_final: Any) -> None:
    client = site.client()
    history = until_final(client, client.submit(JobSpec(script="exit 7")))
    assert (states(history)[-1], history[-1].info) == ("failed", "7")


def test_a_job_is_cancelled_there(site: Any, facility: Facility, until_final: Any, until_state: Any) -> None:
    client = site.client()
    job = client.submit(JobSpec(script="sleep 300"))
    until_state(client, job, JobState.active)
    client.cancel(job)
    history = until_final(client, job)
    assert states(history)[-1] == "canceled"
    assert facility.processes[history[1].info].poll() is not None


@pytest.mark.parametrize("has_keys", [True, False])
def test_a_submission_without_an_answer_is_found_and_not_repeated(
    site: Any, facility: Facility, until_final: Any, has_keys: bool
) -> None:
    facility.has_keys = has_keys
    before = facility.submissions
    facility.fail_after = [503]
    client = site.client()
    assert states(until_final(client, client.submit(JobSpec(script="true"))))[-1] == "completed"
    assert facility.submissions == before + 1


def test_a_facility_that_stumbles_is_asked_again(site: Any, facility: Facility, until_final: Any) -> None:
    facility.fail_before = [503, 429, 502]
    client = site.client()
    assert states(until_final(client, client.submit(JobSpec(script="true"))))[-1] == "completed"


def test_an_expired_token_only_delays(site: Any, facility: Facility, until_final: Any, wait_until: Any) -> None:
    client = site.client()
    site.token.write_text("expired")
    job = client.submit(JobSpec(script="true"))
    # Meanwhile the file may have been read half-written, which is another trouble.
    wait_until(lambda: "401" in "".join(client.backends()["default"].notes), 60, "trouble with the token")
    notes = client.backends()["default"]
    assert notes.status == "unavailable"
    assert "token" not in json.dumps(notes.configuration)
    site.token.write_text(TOKEN)
    assert states(until_final(client, job))[-1] == "completed"


def test_what_the_facility_refuses_is_told_in_its_words(site: Any, facility: Facility, until_final: Any) -> None:
    client = site.client()
    history = until_final(client, client.submit(JobSpec(script="true", attributes={"--partition": "nowhere"})))
    assert states(history) == ["new", "failed"]
    assert "no queue nowhere" in history[-1].info
    with pytest.raises(ServiceError, match=r"403.*--constraint, --partition"):
        client.submit(JobSpec(script="true", attributes={"--qos": "debug"}))


def test_files_nobody_would_take_there_are_refused(site: Any, facility: Facility, until_final: Any) -> None:
    client = site.client()
    job = client.create(JobSpec(script="cat input"))
    client.upload(job, "input", b"7")
    before = facility.submissions
    client.start(job)
    history = until_final(client, job)
    assert states(history) == ["new", "failed"]
    assert "nothing takes them to this facility" in history[-1].info
    assert facility.submissions == before


def test_a_job_is_found_again_after_the_service_was_killed(
    site: Any, facility: Facility, until_final: Any, until_state: Any
) -> None:
    client = site.client()
    job = client.submit(JobSpec(script="while [ ! -e go ]; do sleep 0.1; done; exit 4"))
    until_state(client, job, JobState.active)
    before = facility.submissions
    site.kill()
    site.start()
    (facility.folder / job / "go").touch()
    history = until_final(client, job)
    assert (states(history)[-1], history[-1].info) == ("failed", "4")
    assert facility.submissions == before
