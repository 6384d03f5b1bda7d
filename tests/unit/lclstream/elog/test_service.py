from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings

from lclstream.security.http import client

_numbers = count(1)
FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def http(logbook_url: str, sites: dict[str, Any]) -> Iterator[httpx.Client]:
    with client(logbook_url, sites["s3df"].member("alice")) as session:
        yield session


@pytest.fixture
def experiment() -> str:
    """An experiment that no other test writes to."""
    return f"tst{next(_numbers)}"


def value(response: Any) -> Any:
    assert response.status_code == 200, response.text
    document = json.loads(response.content)
    assert document["success"], document
    return document["value"]


def test_a_run_starts_by_get_and_by_post_with_parameters(http: httpx.Client, experiment: str) -> None:
    assert value(http.get(f"/run_control/{experiment}/ws/start_run"))["params"] == {}
    second = value(http.post(f"/run_control/{experiment}/ws/start_run?run_type=DARK", json={"A.B": 1}))
    assert (second["num"], second["type"], second["params"]) == (2, "DARK", {"A\uff0eB": 1})
    assert value(http.get(f"/run_control/{experiment}/ws/end_run"))["num"] == 2


def test_nan_goes_in_and_out_as_a_bare_token(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    answer = http.post(
        f"/run_control/{experiment}/ws/add_run_params",
        content=b'{"x": NaN, "y": -Infinity}',
        headers={"content-type": "application/json"},
    )
    assert b'"x": NaN' in answer.content
    assert b'"y": -Infinity' in answer.content


def test_a_refusal_is_status_200_with_success_false(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    answer = http.get(f"/lgbk/{experiment}/ws/runs/77")
    assert answer.status_code == 200
    assert answer.json() == {"success": False, "errormsg": f"experiment {experiment} has no run 77", "value": None}


def test_an_unknown_experiment_is_404(http: httpx.Client) -> None:
    assert http.get("/lgbk/nobody/ws/runs").status_code == 404
    assert http.get("/experiments/nobody").status_code == 404


def test_no_current_run_is_success_false_without_a_reason(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    http.get(f"/run_control/{experiment}/ws/end_run")
    answer = http.get(f"/lgbk/{experiment}/ws/current_run?skipClosedRuns=true")
    assert answer.json() == {"success": False, "value": None}


def test_several_files_are_registered_at_once_each_with_its_answer(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    files = [{"path": "/a", "run_num": 1}, {"path": "/b", "run_num": 9}]
    first, second = http.post(f"/lgbk/{experiment}/ws/register_file", json=files).json()
    assert first == {"success": True}
    assert not second["success"]
    assert [file["path"] for file in value(http.get(f"/lgbk/{experiment}/ws/1/files"))] == ["/a"]


def test_who_calls_is_read_from_the_certificate(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    definition = {
        "name": "stream",
        "executable": "airflow:stream_run",
        "trigger": "MANUAL",
        "location": "s3df",
        "parameters": "{}",
        "run_as_user": "root",
    }
    path = f"/lgbk/{experiment}/ws"
    assert value(http.post(f"{path}/create_update_workflow_def", json=definition))["run_as_user"] == "alice"
    assert value(http.post(f"{path}/create_workflow_job", json={"job_name": "stream", "run_num": 1}))["user"] == "alice"
    value(http.post(f"{path}/new_elog_entry", data={"log_text": "beam is back", "log_tags": "BEAM GOOD"}))
    entry = value(http.get(f"{path}/elog"))[0]
    assert (entry["author"], entry["tags"]) == ("alice", ["BEAM", "GOOD"])


def test_a_job_at_a_location_without_run_processor_cannot_be_killed(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    path = f"/lgbk/{experiment}/ws"
    definition = {"name": "a", "executable": "x", "trigger": "MANUAL", "location": "s3df", "parameters": ""}
    http.post(f"{path}/create_update_workflow_def", json=definition)
    job = value(http.post(f"{path}/create_workflow_job", json={"job_name": "a", "run_num": 1}))
    answer = http.get(f"{path}/kill_workflow_job", params={"job_id": job["_id"]}).json()
    assert not answer["success"]
    assert "locations.s3df.jid_prefix" in answer["errormsg"]


def test_the_page_shows_runs_with_parameters_and_escapes_what_people_wrote(http: httpx.Client, experiment: str) -> None:
    http.post(f"/run_control/{experiment}/ws/start_run", json={"MFX:DG1.RBV": "<script>alert(1)</script>"})
    http.post(f"/lgbk/{experiment}/ws/register_file", json={"path": "/data/r0001.xtc2"})
    http.post(f"/lgbk/{experiment}/ws/new_elog_entry", data={"log_text": "<b>beam</b>"})
    page = http.get(f"/experiments/{experiment}").text
    for text in ("MFX:DG1.RBV", "&lt;script&gt;", "/data/r0001.xtc2", "&lt;b&gt;beam", "running"):
        assert text in page
    assert "<script>" not in page
    assert f"/experiments/{experiment}" in http.get("/").text


def test_the_status_says_what_waits_and_why(http: httpx.Client, experiment: str, wait_until: Any) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    status = http.get("/status").json()
    assert status["outbox_waiting"] >= 2
    assert status["kafka"] == "127.0.0.1:9"
    wait_until(lambda: http.get("/status").json()["outbox_trouble"], 60, "reason why messages wait")


def test_a_body_that_is_too_large_is_refused(http: httpx.Client, experiment: str) -> None:
    http.get(f"/run_control/{experiment}/ws/start_run")
    answer = http.post(f"/run_control/{experiment}/ws/add_run_params", content=b" " * (17 * 2**20))
    assert answer.status_code == 413


def test_no_request_makes_the_service_fail(logbook_url: str, sites: dict[str, Any]) -> None:
    member = sites["s3df"].member("alice")
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(member.folder / "known_servers" / "org.crt")
        session.cert = (str(member.certificate), str(member.key))
        session.get(f"{logbook_url}/run_control/fuzzed/ws/start_run", timeout=60).raise_for_status()
        schema = schemathesis.openapi.from_dict(session.get(f"{logbook_url}/openapi.json", timeout=60).json())
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) > 30
        for operation in operations:

            @given(case=operation.as_strategy())
            @FEW
            def check(case: Any) -> None:
                if "experiment" in (case.path_parameters or {}):
                    # A name made by chance belongs to no experiment, and every answer would be 404.
                    case.path_parameters["experiment"] = "fuzzed"
                answer = case.call(base_url=logbook_url, session=session, timeout=60, verify=session.verify)
                assert answer.status_code < 500, answer.text

            check()
