from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import Response

from lclstream.elog import calls
from lclstream.elog.client import AsyncElogClient, ElogClient, ElogError
from lclstream.elog.config import LocationConfig
from lclstream.security.errors import AuthenticationError, ServiceError, UnreachableError

_numbers = count(1)
DEFINITION = {
    "name": "stream",
    "executable": "airflow:stream_run",
    "trigger": "START_OF_RUN",
    "location": "s3df",
    "parameters": '{"stream_config": "/x.yaml"}',
}


@pytest.fixture
def experiment() -> str:
    return f"cli{next(_numbers)}"


@pytest.fixture
def elog(logbook_url: str, sites: dict[str, Any]) -> Iterator[ElogClient]:
    with ElogClient(logbook_url, sites["s3df"].member("alice")) as client:
        yield client


def test_a_run_from_start_to_end(elog: ElogClient, experiment: str) -> None:
    run = elog.start_run(experiment, "DARK", params={"A.B": 1})
    assert (run.num, run.type, run.end_time, run.parameters()) == (1, "DARK", None, {"A.B": 1})
    elog.add_run_params(experiment, {"threshold": math.nan})
    elog.add_run_params(experiment, {"events": 200}, run_num=1)
    ended = elog.end_run(experiment)
    assert ended.duration is not None
    assert ended.file_catalog == []
    assert elog.current_run(experiment) is not None
    assert elog.current_run(experiment, skip_closed=True) is None
    assert elog.run(experiment, 1).params["events"] == 200
    assert math.isnan(elog.run(experiment, 1).params["threshold"])
    assert [entry.num for entry in elog.runs(experiment)] == [1]


def test_a_run_with_a_name(elog: ElogClient, experiment: str) -> None:
    assert elog.start_run(experiment, run_num="grid 7/12").num == "grid 7/12"
    elog.add_run_params(experiment, {"a": 1}, run_num="grid 7/12")


def test_runs_are_chosen_by_parameters_editables_and_tags(elog: ElogClient, experiment: str) -> None:
    for energy in (9, 10):
        elog.start_run(experiment, params={"energy": energy})
    assert elog.runs_matching_params(experiment, {"energy": 10}) == [2]
    elog.update_editable_param(experiment, 1, "Quality", "Good")
    assert elog.runs_matching_editable(experiment, "Quality", "good") == [1]
    elog.new_elog_entry(experiment, "pedestals", 2, title="dark", tags=["DARK"])
    assert elog.runs_with_tag(experiment, "DARK") == [2]
    assert [(entry.author, entry.title) for entry in elog.elog_entries(experiment)] == [("alice", "dark")]


def test_files_and_where_they_are(elog: ElogClient, experiment: str) -> None:
    elog.start_run(experiment)
    elog.register_file(experiment, "/a.xtc2", size=5, checksum="abc")
    elog.file_available_at_location(experiment, 1, "/a.xtc2", "olcf")
    (file,) = elog.files(experiment, 1)
    assert (file.path, file.size, file.checksum, set(file.locations)) == ("/a.xtc2", 5, "abc", {"olcf"})


def test_definitions_and_jobs(elog: ElogClient, experiment: str) -> None:
    elog.start_run(experiment)
    definition = elog.create_update_workflow_def(experiment, DEFINITION)
    assert definition.run_as_user == "alice"
    definition.location = "olcf"
    assert elog.create_update_workflow_def(experiment, definition).location == "olcf"
    assert [entry.name for entry in elog.workflow_definitions(experiment)] == ["stream"]
    job = elog.create_workflow_job(experiment, "stream", 1)
    assert (job.status, job.user, job.run_num) == ("START", "alice", 1)
    changed = elog.update_workflow_job(
        experiment, job.id, status="RUNNING", counters=[{"key": "events", "value": 7}], tool_id="t1", log_file_path="/l"
    )
    assert (changed.status, changed.counters[0].value, changed.tool_id) == ("RUNNING", 7, "t1")
    assert [entry.id for entry in elog.workflow_jobs(experiment)] == [job.id]
    elog.delete_workflow_job(experiment, job.id)
    assert definition.id is not None
    elog.delete_workflow_definition(experiment, definition.id)
    assert elog.workflow_definitions(experiment) == []
    assert {entry["value"] for entry in elog.workflow_triggers(experiment)} >= {"MANUAL", "START_OF_RUN"}


def test_a_refusal_carries_the_logbooks_words(elog: ElogClient, experiment: str) -> None:
    elog.start_run(experiment)
    with pytest.raises(ElogError, match=f"experiment {experiment} has no run 9") as refused:
        elog.run(experiment, 9)
    assert refused.value.errormsg == f"experiment {experiment} has no run 9"
    assert not refused.value.retry


def test_an_unknown_experiment_is_a_404(elog: ElogClient) -> None:
    with pytest.raises(ServiceError, match="there is no experiment nobody") as missing:
        elog.runs("nobody")
    assert missing.value.status == 404


def test_nonsense_is_refused_before_anything_is_sent(elog: ElogClient) -> None:
    with pytest.raises(ValueError, match="no parameter given"):
        elog.add_run_params("mfx1", {})
    with pytest.raises(ValueError, match="experiment's name is empty"):
        elog.runs("")


def test_both_clients_have_the_same_calls(elog: ElogClient) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")} - {"close", "aclose"}

    assert public(ElogClient) == public(AsyncElogClient)
    assert public(ElogClient) == {
        name
        for name, value in vars(calls).items()
        if callable(value) and getattr(value, "__module__", "") == calls.__name__
    } - {"Call", "ElogError", "_Answer", "_json", "_ws", "_time", "_given"}


def test_the_asynchronous_client_does_the_same(logbook_url: str, sites: dict[str, Any], experiment: str) -> None:
    async def story() -> None:
        async with AsyncElogClient(logbook_url, sites["s3df"].member("alice")) as elog:
            await elog.start_run(experiment, params={"x": 1})
            await elog.create_update_workflow_def(experiment, DEFINITION)
            job = await elog.create_workflow_job(experiment, "stream", 1)
            assert (await elog.update_workflow_job(experiment, job.id, status="DONE")).status == "DONE"
            await elog.add_run_params(experiment, {"y": 2})
            assert (await elog.end_run(experiment)).params == {"x": 1, "y": 2}
            with pytest.raises(ElogError):
                await elog.run(experiment, 5)

    asyncio.run(story())


def test_a_stranger_is_refused(logbook_url: str, sites: dict[str, Any]) -> None:
    with ElogClient(logbook_url, sites["olcf"].member("mallory")) as elog, pytest.raises(AuthenticationError):
        elog.runs("mfx1")


def test_nobody_there_may_be_retried(sites: dict[str, Any], free_port: Callable[[], int]) -> None:
    with ElogClient(f"https://127.0.0.1:{free_port()}", sites["s3df"].member("alice")) as elog:
        with pytest.raises(UnreachableError) as unreachable:
            elog.runs("mfx1")
        assert unreachable.value.retry


def test_an_answer_that_is_not_a_logbooks_is_said() -> None:
    call = calls.runs("mfx1", True)
    for content in (b"<html>login</html>", b'{"value": []}', b'{"success": true, "value": [{"no": "number"}]}'):
        with pytest.raises(ElogError, match="is the URL right"):
            call.read(content, "https://elog")


def test_killing_a_job_asks_the_run_processor_of_its_location(
    serve_logbook: Callable[..., str], sites: dict[str, Any], serve_app: Callable[..., str]
) -> None:
    processor = FastAPI()
    asked: list[tuple[str, Any]] = []

    @processor.post("/jid/ws/{experiment}/kill_job")
    def kill_job(experiment: str, job: dict[str, Any]) -> Response:
        asked.append((experiment, job))
        return Response(json.dumps({"success": True, "value": {**job, "status": "EXITED"}}))

    url = serve_app(processor, sites["s3df"].member("arp"))
    logbook = serve_logbook(locations={"s3df": LocationConfig(jid_prefix=url)})
    with ElogClient(logbook, sites["s3df"].member("alice")) as elog:
        elog.start_run("mfx1")
        elog.create_update_workflow_def("mfx1", DEFINITION)
        job = elog.create_workflow_job("mfx1", "stream", 1)
        assert elog.kill_workflow_job("mfx1", job.id).status == "EXITED"
    assert [(experiment, document["_id"]) for experiment, document in asked] == [("mfx1", job.id)]
