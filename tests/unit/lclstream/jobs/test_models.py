"""What travels is what Psi-k says, and a secret does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from lclstream.jobs.client import AsyncJobClient, JobClient
from lclstream.jobs.models import Callback, JobSpec, JobState, JobSummary, ResourceSpec, Transition

psik = pytest.importorskip("psik", reason="the published psik goes together with Airflow on Python 3.11 only")


def test_the_published_package_reads_our_specification() -> None:
    spec = JobSpec(
        name="sum",
        script="#!/bin/bash\ntrue",
        environment={"A": "1"},
        inherit_environment=False,
        resources=ResourceSpec(duration=5, node_count=2, processes_per_node=4),
        callback="https://host/cb",
        cb_headers={"x-test": "1"},
        cb_secret=SecretStr("hush"),
    )
    theirs = psik.JobSpec.model_validate(spec.document())
    assert theirs.name == "sum"
    assert theirs.resources.processes_per_node == 4
    assert theirs.cb_secret is not None
    assert theirs.cb_secret.get_secret_value() == "hush"


def test_we_read_the_published_packages_specification() -> None:
    theirs = psik.JobSpec(script="true", resources=psik.ResourceSpec(process_count=3))
    ours = JobSpec.model_validate_json(theirs.model_dump_json())
    assert ours.resources.processes == 3


def test_defaults_are_those_of_the_published_package() -> None:
    theirs = psik.JobSpec(script="true").model_dump()
    ours = JobSpec(script="true").model_dump()
    assert ours == theirs


def test_a_secret_is_not_in_any_text_made_from_a_specification() -> None:
    spec = JobSpec(script="true", cb_secret=SecretStr("hush"))
    assert "hush" not in f"{spec} {spec!r} {spec.model_dump()} {spec.model_dump_json()}"
    assert spec.document()["cb_secret"] == "hush"


@pytest.mark.parametrize(
    "wrong",
    [
        {"script": "a\0b"},
        {"script": "true", "environment": {"A=B": "1"}},
        {"script": "true", "environment": {"": "1"}},
        {"script": "true", "cb_headers": {"Host": "evil"}},
        {"script": "true", "cb_headers": {"x-a": "1\r\nx-b: 2"}},
        {"script": "true", "cb_headers": {"x a": "1"}},
        {"script": "true", "resources": {"duration": 0}},
        {"script": "true", "resources": {"duration": float("nan")}},
        {"script": "true", "resources": {"node_count": -1}},
        {"script": "true", "colour": "blue"},
        {},
    ],
)
def test_a_wrong_specification_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate(wrong)


def test_durations_may_be_fractions_and_whole_ones_stay_whole() -> None:
    assert (
        json.dumps(JobSpec(script="x", resources=ResourceSpec(duration=0.5)).document()["resources"])
        == '{"duration": 0.5}'
    )
    assert (
        json.dumps(JobSpec(script="x", resources=ResourceSpec(duration=20)).document()["resources"])
        == '{"duration": 20}'
    )


def test_info_may_be_a_number_as_in_the_published_2_0_1() -> None:
    line = {"jobid": "1.5", "name": "", "updated": 3.0, "jobndx": 1, "state": "failed", "info": 7}
    assert JobSummary.model_validate(line).transition == Transition(time=3.0, jobndx=1, state=JobState.failed, info="7")


@pytest.mark.parametrize("jobid", ["", "x", "1.2.3", "../1", "1\n", "-1", "1e5"])
def test_a_malformed_job_id_is_refused(jobid: str) -> None:
    with pytest.raises(ValidationError):
        Callback(jobid=jobid, jobndx=1, state=JobState.active)


def test_both_clients_have_the_same_calls() -> None:
    calls = {name for name in vars(JobClient) if not name.startswith("_")} - {"close"}
    assert calls == {name for name in vars(AsyncJobClient) if not name.startswith("_")} - {"aclose"}


def test_the_routes_of_the_published_service_are_all_ours() -> None:
    from lclstream.jobs.app import router

    # Paths and methods of psik-api 2.0.1's own OpenAPI document, without its token routes.
    published = {
        ("GET", "/backends"), ("GET", "/backends/{name}"), ("GET", "/jobs"), ("POST", "/jobs"),
        ("POST", "/jobs/new"), ("POST", "/jobs/callback"), ("POST", "/jobs/{jobid}/start"),
        ("GET", "/jobs/{jobid}"), ("DELETE", "/jobs/{jobid}"), ("GET", "/jobs/{jobid}/state"),
        ("GET", "/jobs/{jobid}/logs"), ("GET", "/jobs/{jobid}/scripts"), ("GET", "/jobs/{jobid}/files"),
        ("POST", "/jobs/{jobid}/files"), ("GET", "/jobs/{jobid}/files/{name:path}"),
    }  # fmt: skip
    ours = {(method, route.path) for route in router.routes for method in route.methods}  # type: ignore[attr-defined]
    assert published <= ours


def test_a_worker_without_server_packages_can_import_the_client() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'starlette', 'sqlalchemy', 'numpy'): sys.modules[name] = None\n"
        "import lclstream.jobs.client\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_a_clients_secret_of_psik_2_is_taken_and_goes_nowhere() -> None:
    spec = JobSpec.model_validate({"script": "true", "client_secret": "hush"})
    assert spec.document() == {"script": "true"}
    assert "hush" not in repr(spec) + spec.model_dump_json()
