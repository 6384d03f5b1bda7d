from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.sdk.module_loading import import_string
from fastapi import Response

from lclstream.api.models import TransferPhase
from lclstream.jobs.client import AsyncJobClient, JobClient
from lclstream.jobs.models import JobSpec, JobState
from lclstream.security.credentials import Credentials
from lclstream.security.errors import ServiceError
from lclstream_airflow.triggers import polling
from lclstream_airflow.triggers.lclstream import LCLStreamTransferTrigger
from lclstream_airflow.triggers.polling import PollingTrigger
from lclstream_airflow.triggers.psik import PsikJobTrigger


def transfer_trigger(**arguments: Any) -> LCLStreamTransferTrigger:
    given: dict[str, Any] = {
        "conn_id": "lclstream_default",
        "remote_id": 1,
        "deadline": time.time() + 60,
        "until": "ready",
        "lease_s": 30.0,
        "poll_interval": 0.02,
        "patience_s": 1.0,
    }
    return LCLStreamTransferTrigger(**{**given, **arguments})


def first_event(trigger: PollingTrigger) -> dict[str, Any]:
    async def first() -> Any:
        return await anext(trigger.run())

    payload: dict[str, Any] = asyncio.run(first()).payload
    json.dumps(payload)
    return payload


@pytest.mark.parametrize(
    "trigger",
    [
        transfer_trigger(until="drained", on_kill_policy="leave", lease_s=None),
        PsikJobTrigger(conn_id="psik_default", remote_id="1.1", deadline=5.0, follow_log=False),
    ],
)
def test_a_trigger_is_made_again_from_what_it_serializes(trigger: PollingTrigger) -> None:
    path, arguments = trigger.serialize()
    assert json.loads(json.dumps(arguments)) == arguments
    again = import_string(path)(**arguments)
    assert type(again) is type(trigger)
    assert again.serialize() == (path, arguments)


def test_arguments_that_are_no_json_fail_in_the_task() -> None:
    with pytest.raises(TypeError):
        transfer_trigger(deadline=object()).serialize()


def test_ready_is_told_and_the_lease_renewed_at_each_look(transfers: Any) -> None:
    transfer = transfers.add()
    looks = iter([TransferPhase.buffer_starting, TransferPhase.buffer_starting, TransferPhase.ready])
    transfers.before_info = lambda seen: setattr(seen, "phase", next(looks))
    payload = first_event(transfer_trigger())
    assert (payload["status"], payload["remote_id"]) == ("reached", 1)
    assert payload["facts"]["url"] == "tcp://127.0.0.1:9001"
    assert transfer.lease_s == [30.0] * 3


def test_without_a_lease_none_is_renewed(transfers: Any) -> None:
    transfer = transfers.add()
    transfer.phase = TransferPhase.ready
    first_event(transfer_trigger(lease_s=None))
    assert transfer.lease_s == []


@pytest.mark.parametrize(
    ("until", "state", "status"),
    [
        ("flowing", {"phase": TransferPhase.producing, "received": 1}, "reached"),
        ("flowing", {"phase": TransferPhase.done, "received": 5, "sent": 5}, "reached"),
        ("flowing", {"phase": TransferPhase.done}, "ended"),
        ("drained", {"phase": TransferPhase.draining, "received": 3, "sent": 3}, "reached"),
        ("done", {"phase": TransferPhase.done}, "reached"),
        ("done", {"phase": TransferPhase.failed, "info": "the engine failed"}, "ended"),
        ("ready", {"phase": TransferPhase.expired}, "ended"),
        ("flowing", {"phase": TransferPhase.producing}, "timeout"),
        ("drained", {"phase": TransferPhase.draining, "received": 3, "sent": 1, "held": 2}, "timeout"),
        ("drained", {"phase": TransferPhase.draining, "producers": 1, "received": 3, "sent": 3}, "timeout"),
        ("done", {"phase": TransferPhase.draining}, "timeout"),
    ],
)
def test_what_each_wait_takes_for_its_end(transfers: Any, until: str, state: dict[str, Any], status: str) -> None:
    transfer = transfers.add()
    for name, value in state.items():
        setattr(transfer, name, value)
    payload = first_event(transfer_trigger(until=until, deadline=time.time() + 0.1))
    assert payload["status"] == status
    assert payload["remote_id"] == 1


def test_a_failed_transfer_says_why(transfers: Any) -> None:
    transfer = transfers.add()
    transfer.phase, transfer.info = TransferPhase.failed, "the engine failed"
    message = first_event(transfer_trigger())["message"]
    assert message == "transfer 1 is failed: the engine failed\n  producer failed: exit code 3"


def test_a_service_that_stumbles_is_asked_again(transfers: Any) -> None:
    transfers.add().phase = TransferPhase.ready
    transfers.failures = [503, 500]
    assert first_event(transfer_trigger(patience_s=30))["status"] == "reached"


def test_a_service_that_is_away_for_long_is_unknown_never_finished(transfers: Any) -> None:
    transfers.add()
    transfers.failures = [503] * 1000
    payload = first_event(transfer_trigger(patience_s=0.3))
    assert payload["status"] == "unreachable"
    assert "unknown state" in payload["message"]


def test_the_deadline_holds_while_the_service_is_away(transfers: Any) -> None:
    transfers.add()
    transfers.failures = [503] * 1000
    assert first_event(transfer_trigger(patience_s=60, deadline=time.time() + 0.3))["status"] == "timeout"


def test_an_unknown_transfer_has_ended(transfers: Any) -> None:
    payload = first_event(transfer_trigger(remote_id=77))
    assert payload["status"] == "ended"
    assert "transfer 77 is not known" in payload["message"]


def test_an_unusable_certificate_folder_is_said_long_before_patience_is_over(
    transfers: Any, connection: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "UNUSABLE_S", 0.2)
    connection("lclstream_default", "lclstream", transfers.url, "/nowhere")
    payload = first_event(transfer_trigger(patience_s=60))
    assert payload["status"] == "unreachable"
    assert "certificate folder /nowhere does not exist" in payload["message"]
    payload = first_event(transfer_trigger(conn_id="nobody", patience_s=60))
    assert "connection 'nobody' is not defined" in payload["message"]


async def seen(capsys: pytest.CaptureFixture[str], words: str) -> None:
    async with asyncio.timeout(60):
        while words not in capsys.readouterr().out:
            await asyncio.sleep(0.01)


@pytest.fixture
def identity(transfers: Any, connection: Callable[..., None], airflow_identity: Credentials, tmp_path: Path) -> Path:
    """Our certificate folder, which a test may take away."""
    folder = tmp_path / "identity"
    shutil.copytree(airflow_identity.folder, folder)
    connection("lclstream_default", "lclstream", transfers.url, folder)
    return folder


@pytest.mark.parametrize("missing", ["folder", "key", "connection"])
def test_a_wait_goes_on_when_a_triggerer_starts_before_its_certificates_or_airflows_database(
    transfers: Any, identity: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    transfers.add().phase = TransferPhase.ready
    hidden = identity / "id.key" if missing == "key" else identity
    away = hidden.with_name("away")
    definition = os.environ["AIRFLOW_CONN_LCLSTREAM_DEFAULT"]

    async def restart() -> dict[str, Any]:
        hidden.rename(away)
        if missing == "connection":
            monkeypatch.delenv("AIRFLOW_CONN_LCLSTREAM_DEFAULT")
        waiting = asyncio.create_task(transfer_trigger(patience_s=60).wait())
        await seen(capsys, "looking again in")
        monkeypatch.setenv("AIRFLOW_CONN_LCLSTREAM_DEFAULT", definition)
        away.rename(hidden)
        return await waiting

    assert asyncio.run(restart())["status"] == "reached"


def test_one_answer_that_is_no_json_is_asked_for_again(transfers: Any) -> None:
    transfers.add().phase = TransferPhase.ready
    answers = iter([Response("<h1>Back soon</h1>")])
    transfers.before_info = lambda _: next(answers, None)
    assert first_event(transfer_trigger(patience_s=60))["status"] == "reached"


def test_a_kill_waits_for_its_certificates(transfers: Any, identity: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transfers.add().phase = TransferPhase.producing
    away = identity.with_name("away")

    async def kill() -> None:
        identity.rename(away)
        killing = asyncio.create_task(transfer_trigger().on_kill())
        await seen(capsys, "cancelling again in")
        away.rename(identity)
        await killing

    asyncio.run(kill())
    assert transfers.transfers[1].phase is TransferPhase.canceled


@pytest.mark.parametrize(("policy", "phase"), [("cancel", TransferPhase.canceled), ("leave", TransferPhase.producing)])
def test_a_kill_cancels_unless_told_to_leave(transfers: Any, policy: str, phase: TransferPhase) -> None:
    transfer = transfers.add()
    transfer.phase = TransferPhase.producing
    asyncio.run(transfer_trigger(on_kill_policy=policy).on_kill())
    assert transfer.phase is phase


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        (None, TransferPhase.producing),
        ("queued", TransferPhase.producing),
        ("running", TransferPhase.producing),
        ("deferred", TransferPhase.producing),
        ("failed", TransferPhase.canceled),
        ("success", TransferPhase.canceled),
        ("skipped", TransferPhase.canceled),
        ("gone", TransferPhase.canceled),
        (OSError("no answer"), TransferPhase.canceled),
    ],
    ids=str,
)
@pytest.mark.parametrize("map_index", [-1, 3])
def test_a_kill_of_a_task_that_runs_again_leaves_its_work_and_every_other_kill_ends_it(
    transfers: Any, monkeypatch: pytest.MonkeyPatch, state: Any, phase: TransferPhase, map_index: int
) -> None:
    def states(**query: Any) -> dict[str, dict[str, Any]]:
        assert query == {"dag_id": "d", "task_ids": ["t"], "run_ids": ["r"], "map_index": map_index}
        if isinstance(state, Exception):
            raise state
        return {} if state == "gone" else {"r": {"t" if map_index < 0 else f"t_{map_index}": state}}

    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", staticmethod(states))
    transfer = transfers.add()
    transfer.phase = TransferPhase.producing
    trigger = transfer_trigger()
    trigger.task_instance = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=map_index)
    asyncio.run(trigger.on_kill())
    assert transfer.phase is phase


def test_a_kill_tries_again_when_the_service_stumbles(transfers: Any) -> None:
    transfer = transfers.add()
    transfers.failures = [503, 503]
    asyncio.run(transfer_trigger().on_kill())
    assert transfer.phase is TransferPhase.canceled


def test_the_first_wait_of_a_triggerer_asks_airflow_once_so_that_no_kill_waits_for_its_start(
    transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(polling, "_first", True)
    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", staticmethod(lambda **query: asked.append(query) or {}))
    transfers.add().phase = TransferPhase.ready

    async def waits() -> None:
        for _ in range(2):
            trigger = transfer_trigger()
            trigger.task_instance = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1)
            await anext(trigger.run())
        async with asyncio.timeout(60):
            while not asked:
                await asyncio.sleep(0.01)

    asyncio.run(waits())
    assert len(asked) == 1


def test_a_kill_that_is_interrupted_cancels_all_the_same(transfers: Any) -> None:
    transfer = transfers.add()
    transfer.phase = TransferPhase.producing
    transfers.failures = [503, 503]

    async def as_the_triggerer_does_it() -> None:
        killing = asyncio.create_task(transfer_trigger().on_kill())
        while len(transfers.failures) == 2:
            await asyncio.sleep(0.01)
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
        assert transfer.phase is TransferPhase.producing
        async with asyncio.timeout(60):
            while transfer.phase is not TransferPhase.canceled:
                await asyncio.sleep(0.01)

    asyncio.run(as_the_triggerer_does_it())


def test_a_kill_that_cannot_cancel_says_so_and_ends(transfers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    transfers.failures = [403]
    asyncio.run(transfer_trigger().on_kill())
    assert "transfer 1 could not be cancelled" in capsys.readouterr().out


def test_the_end_of_a_triggerer_leaves_the_transfer_alone(transfers: Any) -> None:
    transfer = transfers.add()
    transfer.phase = TransferPhase.producing
    asyncio.run(transfer_trigger().cleanup())

    async def stopped_triggerer() -> None:
        waiting = asyncio.create_task(transfer_trigger(until="done").wait())
        while not transfer.calls:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(stopped_triggerer())
    assert transfer.phase is TransferPhase.producing
    assert "cancel" not in transfer.calls


def job_trigger(job_id: str, **arguments: Any) -> PsikJobTrigger:
    given = {"conn_id": "psik_default", "remote_id": job_id, "deadline": time.time() + 60, "poll_interval": 0.05}
    return PsikJobTrigger(**{**given, **arguments})


def test_a_completed_job_is_told_with_its_times_and_log(jobs: JobClient, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.submit(JobSpec(script="#!/bin/sh\necho one; echo two >&2; sleep 0.3; printf three"))
    payload = first_event(job_trigger(job))
    assert payload["status"] == "reached"
    assert payload["facts"]["state"] == "completed"
    assert payload["facts"]["run_s"] >= 0.3
    lines = re.findall(r"\[std(?:out|err)\.1\] \w+", capsys.readouterr().out)
    assert sorted(lines) == ["[stderr.1] two", "[stdout.1] one", "[stdout.1] three"]


def test_a_flood_of_output_is_cut_short(jobs: JobClient, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.submit(JobSpec(script="#!/bin/sh\nseq 1 200000"))
    while not jobs.state(job).is_final:
        time.sleep(0.02)
    capsys.readouterr()
    first_event(job_trigger(job))
    text = capsys.readouterr().out
    assert "bytes are only in the job's own log" in text
    assert "[stdout.1] 200000" in text
    assert len(text) < 1_000_000


def test_a_log_that_cannot_be_read_does_not_end_the_wait_for_its_job(
    jobs: JobClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(*_: Any) -> Any:
        raise ServiceError("the log's disk is broken", status=500, detail="")

    monkeypatch.setattr(AsyncJobClient, "log_part", broken)
    job = jobs.submit(JobSpec(script="#!/bin/sh\nexec sleep 1"))
    assert first_event(job_trigger(job, patience_s=0.1))["status"] == "reached"
    assert capsys.readouterr().out.count("the log's disk is broken") == 1


def test_a_failed_job_has_ended(jobs: JobClient) -> None:
    payload = first_event(job_trigger(jobs.submit(JobSpec(script="#!/bin/sh\nexit 3"))))
    assert payload["status"] == "ended"
    assert "is failed: " in payload["message"]


def test_a_kill_cancels_the_job(jobs: JobClient) -> None:
    job = jobs.submit(JobSpec(script="#!/bin/sh\nexec sleep 300"))
    killer = threading.Thread(target=lambda: asyncio.run(job_trigger(job).on_kill()))
    killer.start()
    payload = first_event(job_trigger(job))
    killer.join(60)
    assert payload["status"] == "ended"
    assert jobs.state(job) is JobState.canceled
