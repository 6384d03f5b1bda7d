"""Sessions with a real job service: found by their tag, handed streams, ended by time, by hand or by themselves."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, TaskDeferred
from airflow.sdk.module_loading import import_string

from lclstream.elog.client import ElogClient
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream_airflow.operators import remote
from lclstream_airflow.operators import session as session_module
from lclstream_airflow.operators.engine import EngineJobOperator
from lclstream_airflow.operators.session import (
    FindSessionOperator,
    SessionOperator,
    SessionReleaseOperator,
    SessionStreamOperator,
)
from lclstream_airflow.sensors.session import SessionEndSensor

PROGRAM = f"""#!/bin/sh
exec {sys.executable} -m lclstream.cli session -- sh -c 'case $LCLSTREAM_RUN in
  1) ;; 2) exit 4;; 5) echo "{{\\"chi2\\": NaN, \\"slope\\": -Infinity}}" > result.json;; *) sleep 600;; esac'
"""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (remote, session_module):
        monkeypatch.setattr(module, "START_PATIENCE_S", 3.0)


@pytest.fixture
def session(jobs: JobClient, wait_until: Callable[..., None]) -> Iterator[str]:
    """A session's job that has begun."""
    job = jobs.submit(JobSpec(script=PROGRAM), tags={"session": "mfx"})
    wait_until(lambda: "inbox" in jobs.files(job), 60, "the letter box")
    yield job
    jobs.cancel(job)


def waited(operator: Any, context: dict[str, Any]) -> Any:
    """Wait as the triggerer does: with a trigger made again from its JSON."""
    with pytest.raises(TaskDeferred) as deferral:
        operator.execute(context)
    path, arguments = deferral.value.trigger.serialize()
    trigger = import_string(path)(**json.loads(json.dumps(arguments)))

    async def first() -> Any:
        return (await anext(trigger.run())).payload

    # Airflow's database takes only JSON as the standard has it.
    return operator.execute_complete(context, json.loads(json.dumps(asyncio.run(first()), allow_nan=False)))


def stream(job: str, run: str, **arguments: Any) -> SessionStreamOperator:
    given: dict[str, Any] = {"job_id": job, "name": f"r {run}", "letter": {"run": run}, "poll_interval": 0.05}
    return SessionStreamOperator(task_id="analyse", **{**given, **arguments})


def end(job: str, **arguments: Any) -> SessionEndSensor:
    return SessionEndSensor(task_id="hold", job_id=job, poke_interval=0.05, **arguments)


def test_a_session_waits_for_its_nodes_and_is_found_by_its_name(
    jobs: JobClient, context: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    find = FindSessionOperator(task_id="find", session="night")
    with pytest.raises(AirflowSkipException, match="no session 'night' has nodes now"):
        find.execute(context)
    allocate = SessionOperator(task_id="allocate", session="night", job={"script": PROGRAM}, poll_interval=0.05)
    facts = waited(allocate, context)
    job = context["ti"].xcoms["job_id"]
    assert (facts["job_id"], facts["state"]) == (job, "active")
    assert find.execute(context) == job
    (listed,) = jobs.list(tags={"session": "night"})
    assert (listed.tags["dag_id"], listed.tags["lasts"]) == ("stream_run", "run")
    jobs.cancel(job)
    wait_until(lambda: jobs.state(job).is_final, 60, "its end")
    with pytest.raises(AirflowSkipException):
        find.execute(context)
    with pytest.raises(AirflowFailException, match="session is empty"):
        SessionOperator(task_id="allocate", session="", job={"script": "true"}).execute(context)


def test_nobody_waits_for_a_session_whose_service_is_away(
    context: dict[str, Any], connection: Any, airflow_identity: Any
) -> None:
    connection("psik_default", "psik", "https://127.0.0.1:9", airflow_identity.folder)
    with pytest.raises(AirflowSkipException, match="is open is not known"):
        FindSessionOperator(task_id="find", session="mfx").execute(context)


def test_a_stream_is_analysed_or_its_failure_is_told(
    jobs: JobClient, session: str, context: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    facts = waited(stream(session, "1"), context)
    assert (facts["state"], facts["exit_code"], facts["result"]) == ("done", 0, {})
    assert context["ti"].xcoms["job_id"] == session
    with pytest.raises(AirflowFailException, match=r"analysis of r-2 in session .* is failed \(exit code 4\)"):
        waited(stream(session, "2"), context)
    # Numbers that JSON does not know arrive as text.
    assert waited(stream(session, "5"), context)["result"] == {"chi2": "NaN", "slope": "-Infinity"}
    json.dumps(context["ti"].xcoms, allow_nan=False)
    # Killed, only this analysis ends.
    long = stream(session, "3")
    with pytest.raises(TaskDeferred) as deferral:
        long.execute(context)
    wait_until(lambda: "r-3" in jobs.files(session), 60, "its begin")
    asyncio.run(deferral.value.trigger.on_kill())
    wait_until(lambda: "r-3.json" in jobs.files(session, "outbox"), 60, "its end")
    assert json.loads(jobs.download(session, "outbox/r-3.json"))["state"] == "cancelled"
    assert jobs.state(session) is JobState.active
    # The session ends under the next one.
    with pytest.raises(TaskDeferred) as deferral:
        stream(session, "4").execute(context)
    jobs.cancel(session)
    wait_until(lambda: jobs.state(session).is_final, 60, "the session's end")
    event = asyncio.run(deferral.value.trigger.wait())
    assert event["status"] == "ended"


def test_a_session_is_ended_by_time_by_the_logbook_and_by_its_job(
    jobs: JobClient, session: str, elog: ElogClient, context: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    elog.start_run("mfxshift")
    elog.new_elog_entry("mfxshift", "an earlier shift", tags=["END"])
    time.sleep(0.01)
    soon = (datetime.now(UTC) + timedelta(seconds=0.3)).isoformat()
    watch = {"experiment": "mfxshift", "tag": "END"}
    assert waited(end(session, hours="1", ends_at=soon, **watch), context)["ended_by"] == "time"
    elog.new_elog_entry("mfxshift", "now", tags=["END"])
    context["dag_run"] = type("Run", (), {"start_date": datetime.now(UTC) - timedelta(seconds=60)})()
    assert waited(end(session, **watch), context)["ended_by"] == "the logbook"
    release = SessionReleaseOperator(task_id="release", job_id=session, poll_interval=0.05)
    assert waited(release, context)["result"] == {"acquisitions": 0, "done": 0, "failed": 0, "cancelled": 0}
    assert waited(end(session), context)["ended_by"] == "its job"
    assert waited(release, context)["state"] == "completed"


@pytest.mark.parametrize("problem", ["knows no such experiment", "is away", "cannot be used"])
def test_no_problem_of_the_logbook_ends_a_session(
    jobs: JobClient,
    session: str,
    elog: ElogClient,
    context: dict[str, Any],
    connection: Callable[..., None],
    airflow_identity: Any,
    capsys: pytest.CaptureFixture[str],
    problem: str,
) -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    sensor = end(session, ends_at=later, experiment="nobody", tag="END", patience_s=0.1)
    with pytest.raises(TaskDeferred) as deferral:
        sensor.execute(context)
    if problem == "is away":
        connection("elog_default", "elog", "https://127.0.0.1:9", airflow_identity.folder)
    elif problem == "cannot be used":
        connection("elog_default", "elog", elog.base_url, "/nowhere")
    trigger, said = deferral.value.trigger, ""

    async def until_its_time_is_over() -> Any:
        nonlocal said
        waiting = asyncio.create_task(trigger.wait())
        async with asyncio.timeout(60):
            while "whether the logbook ends session" not in said:
                await asyncio.sleep(0.02)
                said += capsys.readouterr().out
            # It is asked some times more.
            trigger.ends_at = time.time() + 1
            return await waiting

    event = asyncio.run(until_its_time_is_over())
    assert sensor.execute_complete(context, event)["ended_by"] == "time"
    said += capsys.readouterr().out
    assert said.count("whether the logbook ends session") == 1


def test_the_logbook_ends_a_session_after_it_was_away(
    jobs: JobClient, session: str, elog: ElogClient, context: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TaskDeferred) as deferral:
        end(session, experiment="mfxlate", tag="END", timeout=240).execute(context)

    async def follow() -> dict[str, Any]:
        waiting = asyncio.create_task(deferral.value.trigger.wait())
        async with asyncio.timeout(60):
            while "whether the logbook ends session" not in capsys.readouterr().out:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(elog.start_run, "mfxlate")
        await asyncio.to_thread(lambda: elog.new_elog_entry("mfxlate", "that was it", tags=["END"]))
        async with asyncio.timeout(60):
            event: dict[str, Any] = await waiting
            return event

    assert asyncio.run(follow())["facts"]["ended_by"] == "the logbook"


def test_what_a_session_does_not_finish_in_time_is_cancelled(
    jobs: JobClient, session: str, context: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    jobs.upload(session, "inbox/long.json", b'{"run": "3"}')
    wait_until(lambda: "long" in jobs.files(session), 60, "its begin")
    with pytest.raises(AirflowException, match="took longer"):
        waited(SessionReleaseOperator(task_id="release", job_id=session, finish_s="0.3", poll_interval=0.05), context)
    wait_until(lambda: jobs.state(session) is JobState.canceled, 60, "the session's end")


def test_without_a_session_there_is_nothing_to_release(context: dict[str, Any]) -> None:
    with pytest.raises(AirflowSkipException, match="there was no session"):
        SessionReleaseOperator(task_id="release", job_id="None").execute(context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"job_id": "None"}, "job_id is empty"),
        ({"job_id": "1.1", "ends_at": "tonight"}, "write a time such as"),
        ({"job_id": "1.1", "tag": "END"}, "experiment is empty"),
    ],
)
def test_a_wrong_end_is_refused_before_waiting(
    jobs: JobClient, context: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(AirflowFailException, match=message):
        SessionEndSensor(task_id="hold", **arguments).execute(context)


def test_a_logbook_nobody_has_defined_is_refused_before_waiting(jobs: JobClient, context: dict[str, Any]) -> None:
    with pytest.raises(AirflowException, match="connection 'no_elog' is not defined"):
        end("1.1", experiment="mfx", tag="END", elog_conn_id="no_elog").execute(context)


def test_the_engines_configuration_is_part_of_its_job(jobs: JobClient, context: dict[str, Any], tmp_path: Path) -> None:
    config = {"source_identifier": "run={{ run:04d }}", "data_handlers": ["replaced"]}
    script = (
        '#!/bin/bash\ncat "$LCLSTREAM_CONFIG" > "$LCLSTREAM_FOLDER/$LCLSTREAM_PREFIX.copy"\n'
        'echo \'{"file": "x"}\' > result.json'
    )

    def reduce(**arguments: Any) -> EngineJobOperator:
        given: dict[str, Any] = {"config": config, "folder": str(tmp_path), "prefix": "mfx-r0007", "values": {"run": 7}}
        return EngineJobOperator(task_id="reduce", deferrable=False, poll_interval=0.05, **{**given, **arguments})

    assert reduce(job={"script": script}).execute(context)["result"] == {"file": "x"}
    assert json.loads((tmp_path / "mfx-r0007.copy").read_text()) == {
        "source_identifier": "run=0007",
        "data_handlers": [
            {
                "type": "BinaryFileWritingDataHandler",
                "write_directory": str(tmp_path),
                "file_prefix": "mfx-r0007",
            }
        ],
    }
    for wrong, message in (({"folder": "reduced"}, "an absolute path"), ({"prefix": "a b"}, "make a file's name")):
        with pytest.raises(AirflowFailException, match=message):
            reduce(**wrong).execute(context)
