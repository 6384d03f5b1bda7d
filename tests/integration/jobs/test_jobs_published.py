"""Our client drives a published psik-api, and our service offers what that one offers.

The published service lives in an environment of its own, because it demands other versions of what we use. Name that
environment's Python in ``LCLSTREAM_PSIK_API_PYTHON``; psik-api 2.0.1 with psik 2.1 is what this was tried with.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream.security.errors import PeerError, ServiceError, UnreachableError
from lclstream.security.http import client as http_client

pytestmark = pytest.mark.integration

_SAY_VERSION = "from importlib.metadata import version; print(version('psik_api'))"
#: Their name of each document: ours.
_DOCUMENTS = {
    "JobSpec": "JobSpec", "ResourceSpec": "ResourceSpec", "Callback": "Callback", "FileStat": "FileStat",
    "JobStepInfo": "JobSummary", "SystemStatus": "BackendInfo",
}  # fmt: skip
_SENT = {"JobSpec", "ResourceSpec", "Callback"}


@dataclass
class Published:
    """A running psik-api."""

    client: JobClient
    document: dict[str, Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, sites: Any) -> Iterator[Published]:
    python = os.environ.get("LCLSTREAM_PSIK_API_PYTHON")
    if python is None:
        pytest.skip("LCLSTREAM_PSIK_API_PYTHON names no Python that has psik-api 2.x")
    asked = subprocess.run([python, "-c", _SAY_VERSION], capture_output=True, text=True, timeout=60, check=False)
    if not asked.stdout.startswith("2."):
        pytest.skip(f"{python} has no psik-api 2.x: {asked.stdout.strip() or asked.stderr.strip()[-200:]}")
    if shutil.which("rc") is None:
        pytest.skip(
            "the published psik runs its jobs with the shell rc, which is not installed here: apt-get install rc"
        )
    folder = tmp_path_factory.mktemp("psik-api")
    config = folder / "psik_api.json"
    settings = {"prefix": str(folder / "jobs"), "backends": {"default": {"type": "local"}}, "authz": "local"}
    config.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{probe.getsockname()[1]}"
    commands = Path(python).parent
    environment = {**os.environ, "PSIK_API_CONFIG": str(config), "PATH": f"{commands}:{os.environ['PATH']}"}
    member = sites["s3df"].member("psik-api").folder
    command = [str(commands / "certified"), "serve", "--config", str(member), "psik_api.main:app", url]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    alice = sites["s3df"].member("alice")
    try:
        with JobClient(url, alice) as client:
            deadline = time.monotonic() + 60
            while True:
                assert server.poll() is None, (folder / "log").read_text()
                try:
                    client.backends()
                    break
                except UnreachableError:
                    assert time.monotonic() < deadline, (folder / "log").read_text()
                    time.sleep(0.1)
            with http_client(url, alice) as raw:
                document = raw.get("/v2/openapi.json").json()
            yield Published(client, document)
    finally:
        server.terminate()
        server.wait(30)


def until(client: JobClient, jobid: str, reached: Callable[[JobState], bool]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if reached(client.state(jobid)):
                return
        except PeerError as error:
            # It answers 500 while the job writes its history.
            if not error.retry:
                raise
        assert time.monotonic() < deadline, client.history(jobid)
        time.sleep(0.1)


def test_our_client_runs_a_job_there_with_files_and_logs_and_a_lease_nobody_keeps(published: Published) -> None:
    client = published.client
    spec = JobSpec(name="far", script="#!/bin/sh\ncat input; echo oops >&2; echo r > result")
    jobid = client.create(spec, idempotency_key="unknown-there", lease_s=60)
    client.upload(jobid, "input", b"from here\n")
    with pytest.raises(ServiceError) as caught:
        client.renew(jobid, 60)
    assert caught.value.status in (404, 405)
    assert client.state(jobid) is JobState.new
    client.start(jobid)
    until(client, jobid, lambda state: state is JobState.completed)
    assert {line.state for line in client.history(jobid)} >= {JobState.new, JobState.active, JobState.completed}
    assert client.scripts(jobid)
    assert any("from here" in text for text in client.logs(jobid).values())
    assert {"input", "result"} <= set(client.files(jobid))
    assert client.download(jobid, "result") == b"r\n"
    assert jobid in [job.jobid for job in client.list(limit=10)]


def test_our_client_cancels_a_job_there(published: Published) -> None:
    jobid = published.client.submit(JobSpec(script="#!/bin/sh\nexec sleep 300"))
    until(published.client, jobid, lambda state: state is JobState.active)
    published.client.cancel(jobid)
    until(published.client, jobid, lambda state: state.is_final)


def test_our_service_offers_every_route_parameter_and_field_of_the_published_one(
    published: Published, running: Any
) -> None:
    with http_client(running.url, running.credentials("alice")) as raw:
        ours = raw.get("/v2/openapi.json").json()
    theirs = published.document
    missing = []
    for path, operations in theirs["paths"].items():
        if path == "/token":
            continue  # theirs only: tokens beside certificates
        there = ours["paths"].get("/v2" + path.replace("{fname}", "{name}"), {})
        for method, operation in operations.items():
            here = there.get(method)
            if here is None:
                missing.append(f"{method} {path}")
                continue
            names = {parameter["name"].lower() for parameter in here.get("parameters", [])}
            wanted = {one["name"].lower().replace("fname", "name") for one in operation.get("parameters", [])}
            missing += [f"{method} {path}: {name}" for name in wanted - names]
            bodies, known = (one.get("requestBody", {}).get("content", {}) for one in (operation, here))
            missing += [f"{method} {path}: body {kind}" for kind in set(bodies) - set(known)]
    schemas, known = theirs["components"]["schemas"], ours["components"]["schemas"]
    for name, mine in _DOCUMENTS.items():
        missing += [
            f"{name}.{field}" for field in schemas[name]["properties"] if field not in known[mine]["properties"]
        ]
        needed, promised = set(known[mine].get("required", [])), set(schemas[name].get("required", []))
        # What one need not send there one need not send here.
        if name in _SENT:
            missing += [f"{name}.{field}: is needed here" for field in needed - promised]
    assert missing == []
