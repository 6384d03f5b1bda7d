"""The Superfacility parts, with the published client, against a stand-in whose jobs are local processes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowOptionalProviderFeatureException,
    TaskDeferred,
)

pytest.importorskip("lclstream.superfacility.client", reason="needs pip install 'lclstream[superfacility]'")

from lclstream.security.errors import ServiceError, UnreachableError
from lclstream.superfacility.client import SuperfacilityClient
from lclstream_airflow.hooks import superfacility as superfacility_hook
from lclstream_airflow.hooks.superfacility import SuperfacilityHook
from lclstream_airflow.operators import remote
from lclstream_airflow.operators import superfacility as module
from lclstream_airflow.operators.superfacility import SuperfacilityOperator
from lclstream_airflow.triggers.superfacility import SuperfacilityJobTrigger, SuperfacilityStandingTrigger


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TAKE_OVER_PAUSE_S", 0.05)
    monkeypatch.setattr(module, "SETTLE_S", 0.05)


@pytest.fixture
def nersc(superfacility: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, with the connection `superfacility_default` to it."""
    define(monkeypatch, superfacility)
    superfacility.home.mkdir(parents=True, exist_ok=True)
    return superfacility


def define(monkeypatch: pytest.MonkeyPatch, service: Any, **extra: Any) -> None:
    document = {
        "conn_type": "superfacility", "host": service.url, "extra": {"key_file": str(service.key), **extra},
    }  # fmt: skip
    monkeypatch.setenv("AIRFLOW_CONN_SUPERFACILITY_DEFAULT", json.dumps(document))


def operator(service: Any, body: str, **arguments: Any) -> SuperfacilityOperator:
    given: dict[str, Any] = {
        "task_id": "analyse",
        "script": f"#!/bin/bash\n#SBATCH --time=5\n{body}\n",
        "folder": str(service.home),
        "poll_interval": 0.2,
        "deferrable": False,
    }
    return SuperfacilityOperator(**{**given, **arguments})


def ask(work: Callable[[SuperfacilityClient], Any]) -> Any:
    return SuperfacilityHook().call(work)


def jobs_of(context: dict[str, Any]) -> list[Any]:
    """The jobs of this test's task, by their names."""
    return list(ask(lambda client: client.find("perlmutter", context["ti"].task_id)))


@pytest.fixture
def task(context: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """A context of its own for each test: the stand-in is shared, and its jobs are found by the names of tasks."""
    context["ti"].task_id = f"t{abs(hash(request.node.nodeid)) % 10**9}"
    context["ti"].max_tries = 1
    return context


def test_a_job_is_submitted_waited_for_and_brings_its_results(
    nersc: Any, task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_text("seven\n")
    body = 'cat input.txt; echo "{\\"events\\": 7, \\"of\\": \\"$OF\\"}" > result.json; cp input.txt keep.dat'
    done = operator(
        nersc, body, input_files={"input.txt": str(tmp_path / "input.txt")}, environment={"OF": "it's $HOME"},
        result_file="result.json", output_files=["*.dat"], output_folder=str(tmp_path / "kept"),
    ).execute(task)  # fmt: skip
    assert done["state"] == "COMPLETED"
    assert done["result"] == {"events": 7, "of": "it's $HOME"}
    assert done["files"] == [str(tmp_path / "kept" / "keep.dat")]
    assert (tmp_path / "kept" / "keep.dat").read_text() == "seven\n"
    assert task["ti"].xcoms["job_id"] == done["job_id"]
    assert done["job_id"] in task["ti"].xcoms["job_link"]
    assert "[slurm-" in (said := capsys.readouterr().out)
    assert "] seven" in said


def test_a_wait_is_deferred_and_its_trigger_sees_the_end(nersc: Any, task: dict[str, Any]) -> None:
    work = operator(nersc, "exit 3", deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        work.execute(task)
    trigger = deferred.value.trigger
    assert isinstance(trigger, SuperfacilityJobTrigger)
    path, arguments = trigger.serialize()
    json.dumps(arguments)
    assert path.endswith("SuperfacilityJobTrigger")
    event = asyncio.run(SuperfacilityJobTrigger(**arguments).wait())
    assert event["status"] == "ended"
    with pytest.raises(AirflowException, match=r"FAILED \(exit code 3:0\)"):
        work.execute_complete(task, event)


def test_a_log_that_cannot_be_read_does_not_end_the_wait_for_its_job(
    nersc: Any, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise ServiceError("the file service is away", status=503, detail="")

    monkeypatch.setattr(SuperfacilityClient, "size", away)
    assert operator(nersc, "sleep 1", patience_s=0.1).execute(task)["state"] == "COMPLETED"


def test_a_failed_job_shows_its_last_words(nersc: Any, task: dict[str, Any]) -> None:
    with pytest.raises(AirflowException, match=r"(?s)is FAILED.*ends with:\nout of beam$"):
        operator(nersc, "echo out of beam; exit 1", follow_log=False).execute(task)


def test_a_task_that_runs_again_finds_its_job(nersc: Any, task: dict[str, Any]) -> None:
    first = operator(nersc, "sleep 300", deferrable=True)
    with pytest.raises(TaskDeferred):
        first.execute(task)
    again = operator(nersc, "sleep 300", deferrable=True)
    with pytest.raises(TaskDeferred):
        again.execute(task)
    try:
        assert len(jobs_of(task)) == 1
        assert again._remote_id == first._remote_id
    finally:
        again.on_kill()


def test_another_script_ends_the_old_job_and_starts_a_new_one(nersc: Any, task: dict[str, Any]) -> None:
    first = operator(nersc, "sleep 300", deferrable=True)
    with pytest.raises(TaskDeferred):
        first.execute(task)
    second = operator(nersc, "sleep 301", deferrable=True)
    with pytest.raises(TaskDeferred):
        second.execute(task)
    assert second._remote_id != first._remote_id
    second.on_kill()
    wait_for(lambda: all(job.is_final for job in jobs_of(task)))
    assert {job.state for job in jobs_of(task)} == {"CANCELLED"}


def test_of_two_submissions_of_one_request_one_stays(nersc: Any, task: dict[str, Any]) -> None:
    work = operator(nersc, "sleep 300")
    work.prepare(task)
    _, name = work._names("key")
    one, other = (ask(lambda client: client.submit("perlmutter", work._script(name))) for _ in range(2))
    found = work.start("key")
    assert found.id == min(one, other, key=int)
    wait_for(lambda: sum(not job.is_final for job in jobs_of(task)) == 1)
    work.cancel(found.id)


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["worker", "trigger"])
def test_a_kill_cancels_the_job(nersc: Any, task: dict[str, Any], how: str) -> None:
    work = operator(nersc, "sleep 300", deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        work.execute(task)
    if how == "worker":
        work.on_kill()
    else:
        asyncio.run(deferred.value.trigger.on_kill())
    wait_for(lambda: [job.state for job in jobs_of(task)] == ["CANCELLED"])


def test_a_kill_amid_a_wait_in_the_worker_cancels_the_job(nersc: Any, task: dict[str, Any]) -> None:
    # A signal's handler runs in the middle of the wait's own event loop.
    work = operator(nersc, "sleep 300")
    killed: list[float] = []

    def trigger(remote_id: str, deadline: float) -> Any:
        made = SuperfacilityOperator.trigger(work, remote_id, deadline)
        real = made.look

        async def look(client: Any) -> Any:
            payload = await real(client)
            if work._remote_id is not None and not killed:
                killed.append(time.time())
                work.on_kill()
            return payload

        made.look = look  # type: ignore[method-assign]
        return made

    work.trigger = trigger  # type: ignore[assignment,method-assign]
    with pytest.raises(AirflowException, match="CANCELLED"):
        work.execute(task)
    assert killed


def test_an_outage_is_waited_out(nersc: Any, task: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    nersc.say("unavailable", notes=["Cooling"])
    work = operator(nersc, "true", deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        work.execute(task)
    trigger = deferred.value.trigger
    assert isinstance(trigger, SuperfacilityStandingTrigger)
    assert deferred.value.method_name == "submit_after_outage"

    async def until_back() -> Any:
        wait = asyncio.create_task(trigger.wait())
        done, _ = await asyncio.wait([wait], timeout=0.7)
        assert not done
        nersc.say("active")
        return await asyncio.wait_for(wait, 60)

    event = asyncio.run(until_back())
    work.deferrable = False
    capsys.readouterr()
    assert work.submit_after_outage(task, event)["state"] == "COMPLETED"
    assert "cannot be called outside" not in capsys.readouterr().out


def test_an_outage_fails_the_task_when_told_to(nersc: Any, task: dict[str, Any]) -> None:
    outage = {"start_at": "2026-01-01T00:00:00Z", "end_at": "2099-01-01T00:00:00Z", "description": "Cooling"}
    nersc.say("unavailable", outages=[outage])
    work = operator(nersc, "true", outage_policy="fail")
    with pytest.raises(
        AirflowException, match=r"perlmutter is unavailable \(until 2099.*Cooling; nothing was submitted"
    ):
        work.execute(task)
    nersc.say("active")
    assert jobs_of(task) == []


def test_an_outage_that_lasts_too_long_fails_the_task(nersc: Any, task: dict[str, Any]) -> None:
    nersc.say("unavailable")
    with pytest.raises(AirflowException, match=r"machine perlmutter took longer than it was given; nothing was"):
        operator(nersc, "true", outage_timeout_s=0.3).execute(task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "here"}, "folder: 'here'"),
        ({"folder": "/a b"}, "folder: '/a b'"),
        ({"script": "echo"}, "script: 'echo' must be an absolute path"),
        ({"script": "#!/bin/sh\n#SBATCH -J mine\ntrue"}, "#SBATCH -J: leave it out"),
        ({"script": "#!/bin/sh\n#SBATCH --output=x\ntrue"}, "--output=x: leave it out"),
        ({"script": "#!/usr/bin/env python3\nprint()", "environment": {"A": "1"}}, "is no shell"),
        ({"environment": {"A B": "1"}}, "'A B' is no name"),
        ({"input_files": {"../x": "/etc/hosts"}}, "'../x': a plain file name"),
        ({"input_files": {"x": "/not/there"}}, "/not/there cannot be read"),
        ({"output_files": ["*"]}, "output_files needs output_folder"),
    ],
)
def test_what_is_wrong_fails_before_anything_is_sent(
    nersc: Any, task: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(AirflowFailException) as failed:
        operator(nersc, "true", **arguments).execute(task)
    assert message in str(failed.value)


def test_a_script_the_scheduler_refuses_is_not_tried_again(nersc: Any, task: dict[str, Any]) -> None:
    with pytest.raises(AirflowFailException, match="one node"):
        operator(nersc, "true", script="#!/bin/sh\n#SBATCH -N 3\ntrue\n").execute(task)


def test_a_missing_result_is_explained(nersc: Any, task: dict[str, Any]) -> None:
    with pytest.raises(AirflowFailException, match=r"is completed, but it has not written nothing\.json"):
        operator(nersc, "true", result_file="nothing.json").execute(task)


def test_numbers_that_json_does_not_know_become_text(nersc: Any, task: dict[str, Any]) -> None:
    body = """echo '{"chi2": NaN, "slope": -Infinity, "events": 7}' > special.json"""
    done = operator(nersc, body, result_file="special.json").execute(task)
    assert done["result"] == {"chi2": "NaN", "slope": "-Infinity", "events": 7}
    json.dumps([done, task["ti"].xcoms], allow_nan=False)


def test_the_test_button_says_who_answers(nersc: Any) -> None:
    good, words = SuperfacilityHook().test_connection()
    assert good, words
    assert words == f"{nersc.api_url} answers to ada; perlmutter is active."


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"host": "api.nersc.gov"}, "key_file (extra) is None"),
        ({"host": "http://api.nersc.gov", "extra": {"key_file": "/k"}}, "must not travel in plain text"),
        ({"extra": {"key_file": "/k", "token_url": "http://x.example.org/t"}}, "token_url (extra)"),
        ({"host": "https://x.example.org/api", "extra": {"key_file": "/k"}}, "without a path"),
        ({"extra": {"key_file": "/not/there"}}, "key file /not/there does not exist"),
        ({"extra": {"key_file": "/k", "prefix": "api"}}, "prefix (extra)"),
    ],
)
def test_the_test_button_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SUPERFACILITY_DEFAULT", json.dumps({"conn_type": "superfacility", **document}))
    good, words = SuperfacilityHook().test_connection()
    assert not good
    assert message in words


def test_without_a_host_it_is_nersc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "AIRFLOW_CONN_SUPERFACILITY_DEFAULT",
        json.dumps({"conn_type": "superfacility", "extra": {"key_file": "/k", "machine": "dtns"}}),
    )
    place = SuperfacilityHook().place()
    assert place.api_url == "https://api.nersc.gov/api/v1.2"
    assert place.token_url == "https://oidc.nersc.gov/c2id/token"
    assert place.machine == "dtns"


def test_a_key_others_can_read_is_refused(nersc: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "key.pem"
    copy.write_bytes(nersc.key.read_bytes())
    copy.chmod(0o644)
    define(monkeypatch, nersc, key_file=str(copy))
    good, words = SuperfacilityHook().test_connection()
    assert not good
    assert "chmod 600" in words


def test_a_client_nobody_knows_is_refused_with_words(
    nersc: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lclstream.superfacility.keys import make_client

    _, stranger, _ = make_client(tmp_path, "stranger")
    define(monkeypatch, nersc, key_file=str(stranger))
    good, words = SuperfacilityHook().test_connection()
    assert not good
    assert "invalid_client" in words


def test_a_facility_that_is_away_is_unreachable_soon(
    nersc: Any, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    define(monkeypatch, nersc, token_url=f"http://127.0.0.1:{free_port()}/c2id/token")
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        ask(lambda client: client.user())
    # The published client alone would try ten times, for about a minute.
    assert time.monotonic() - began < 40


_WITHOUT_A_LIBRARY = """
import asyncio, pathlib, sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
from lclstream.superfacility.client import SuperfacilityClient

async def ask(token_url):
    async with SuperfacilityClient(sys.argv[2], token_url, pathlib.Path(sys.argv[4])) as client:
        await client.job("perlmutter", "1")

for url in (sys.argv[3], sys.argv[5]):
    try:
        asyncio.run(ask(url))
    except Exception as error:
        print(type(error).__name__, getattr(error, "status", ""))
"""


@pytest.mark.parametrize("library", ["httpx2", "none"])
def test_errors_are_told_with_either_http_library_that_the_published_client_uses(
    nersc: Any, free_port: Callable[[], int], library: str
) -> None:
    away = f"http://127.0.0.1:{free_port()}/c2id/token"
    words = [library, nersc.api_url, nersc.token_url, str(nersc.key), away]
    nersc.say("unavailable")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_A_LIBRARY, *words], capture_output=True, text=True, timeout=200, check=False
    )
    nersc.say("active")
    assert done.stdout.splitlines() == ["ServiceError 503", "UnreachableError "], done.stderr


def test_a_job_nobody_knows_is_not_found(nersc: Any) -> None:
    with pytest.raises(ServiceError) as unknown:
        ask(lambda client: client.job("perlmutter", "123456"))
    assert unknown.value.status == 404


def test_a_client_can_be_used_on_after_a_failed_question(nersc: Any, task: dict[str, Any]) -> None:
    number = operator(nersc, "true").execute(task)["job_id"]

    async def work(client: SuperfacilityClient) -> Any:
        await client.job("perlmutter", number)
        nersc.say("unavailable")
        with pytest.raises(ServiceError) as failed:
            await client.job("perlmutter", number)
        nersc.say("active")
        return failed.value.status, await client.job("perlmutter", number)

    status, job = ask(work)
    assert status == 503
    assert (job.id, job.state) == (number, "COMPLETED")


def test_a_job_that_accounting_does_not_know_yet_is_waited_for(nersc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = SuperfacilityJobTrigger(
        conn_id="superfacility_default", remote_id="123456", deadline=time.time() + 60, machine="perlmutter",
        poll_interval=0.1,
    )  # fmt: skip
    assert asyncio.run(trigger.peek()) is None
    monkeypatch.setattr("lclstream_airflow.triggers.superfacility.UNKNOWN_FOR_S", 0.3)
    event = asyncio.run(trigger.wait())
    assert event["status"] == "ended"
    assert "is not known" in event["message"]


def test_no_key_and_no_token_goes_through_xcom_or_the_log(
    nersc: Any, task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    operator(nersc, "true").execute(task)
    token = ask(_token)
    secret = nersc.key.read_text().splitlines()[3]
    seen = capsys.readouterr()
    for text in (json.dumps(task["ti"].xcoms), seen.out, seen.err):
        assert token not in text
        assert secret not in text
        assert "Bearer" not in text


async def _token(client: SuperfacilityClient) -> str:
    return str(await client._client.token)


def test_openlineage_learns_what_is_read_and_written() -> None:
    pytest.importorskip("airflow.providers.openlineage", reason="the extra `lineage` is not installed")
    work = SuperfacilityOperator(
        task_id="x", script="#!/bin/sh", folder="/f", environment={"LCLSTREAM_URL": "tcp://dtn:9001"},
        input_files={"geometry": "/calib/geometry"},
    )  # fmt: skip
    ti = SimpleNamespace(xcom_pull=lambda task_ids: {"files": ["/kept/a.png"]})
    told = work.get_openlineage_facets_on_complete(ti)
    assert [(one.namespace, one.name) for one in told.inputs] == [
        ("tcp://dtn:9001", "stream"), ("file", "/calib/geometry"),
    ]  # fmt: skip
    assert [(one.namespace, one.name) for one in told.outputs] == [("file", "/kept/a.png")]


def test_without_the_published_client_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sfapi_client", None)
    monkeypatch.delitem(sys.modules, "lclstream.superfacility.client")
    path = Path(superfacility_hook.__file__)
    specification = importlib.util.spec_from_file_location("hook_without_its_library", path)
    assert specification is not None
    assert specification.loader is not None
    with pytest.raises(AirflowOptionalProviderFeatureException, match=r"pip install 'lclstream\[superfacility\]'"):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
