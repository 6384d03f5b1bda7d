from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    TaskDeferralTimeout,
    TaskDeferred,
)
from airflow.sdk.module_loading import import_string

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferPhase
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobState
from lclstream.security.errors import ServiceError
from lclstream_airflow.operators import remote
from lclstream_airflow.operators.lclstream import LCLStreamCancelOperator, LCLStreamTransferOperator
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.sensors.buffer import NNGBufferSensor

CONFIG = {"lclstreamer": {"event_source": "InternalEventSource"}}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TAKE_OVER_PAUSE_S", 0.05)
    monkeypatch.setattr(remote, "START_PATIENCE_S", 3.0)


def transfer_operator(**arguments: Any) -> LCLStreamTransferOperator:
    given: dict[str, Any] = {"task_id": "request_stream", "config": CONFIG, "poll_interval": 0.02}
    return LCLStreamTransferOperator(**{**given, **arguments})


def job_operator(script: str, **arguments: Any) -> PsikOperator:
    given: dict[str, Any] = {"task_id": "analyse", "job": {"script": f"#!/bin/sh\n{script}"}, "poll_interval": 0.05}
    return PsikOperator(**{**given, **arguments})


def deferred(operator: Any, context: dict[str, Any]) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context)
    return caught.value


def test_what_is_ready_at_once_needs_no_deferral(transfers: Any, context: dict[str, Any]) -> None:
    transfers.first_phase = TransferPhase.ready
    facts = transfer_operator(prompt_s=10).execute(context)
    assert (facts["transfer_id"], facts["phase"]) == (1, "ready")
    assert context["ti"].xcoms["transfer_id"] == 1


def test_what_takes_longer_is_deferred_after_the_prompt_wait(transfers: Any, context: dict[str, Any]) -> None:
    started = time.monotonic()
    deferred(transfer_operator(prompt_s=0.3), context)
    assert time.monotonic() - started >= 0.3


def test_a_transfer_is_asked_for_recorded_and_waited_for(transfers: Any, context: dict[str, Any]) -> None:
    deferral = deferred(transfer_operator(lease_s=45, ranks="3", transfer_name="mfx, run 7"), context)
    assert transfers.requests == [
        {
            "key": "stream_run/mfx__r0007/request_stream",
            "config": CONFIG,
            "lease_s": 45.0,
            "ranks": 3,
            "name": "mfx-run-7",
        }
    ]
    xcoms = context["ti"].xcoms
    assert (xcoms["transfer_id"], xcoms["url"]) == (1, "tcp://127.0.0.1:9001")
    assert xcoms["transfer_link"] == f"{transfers.url}/v1/transfers/1"
    path, arguments = deferral.trigger.serialize()
    assert path == "lclstream_airflow.triggers.lclstream.LCLStreamTransferTrigger"
    assert (arguments["remote_id"], arguments["until"], arguments["lease_s"]) == (1, "ready", 45.0)
    assert deferral.method_name == "execute_complete"


def test_no_token_and_no_certificate_goes_through_xcom(transfers: Any, context: dict[str, Any]) -> None:
    deferral = deferred(transfer_operator(), context)
    text = json.dumps([context["ti"].xcoms, deferral.trigger.serialize()])
    assert "key" not in text.replace("xcom_key", "")
    assert "BEGIN" not in text


def test_a_mapped_task_has_a_transfer_of_its_own(transfers: Any, context: dict[str, Any]) -> None:
    for index in (0, 1):
        context["ti"].map_index = index
        deferred(transfer_operator(), context)
    assert [request["key"].rpartition("/")[2] for request in transfers.requests] == ["0", "1"]
    assert len(transfers.transfers) == 2


def test_a_key_that_no_header_can_carry_is_hashed(context: dict[str, Any]) -> None:
    for run_id in ("r\u00f6ntgen", "run 7"):
        context["ti"].run_id = run_id
        assert remote.idempotency_key(context).startswith("sha256:")
    context["ti"].run_id = "x" * 250
    assert len(remote.idempotency_key(context)) < 100


def test_a_task_that_runs_again_takes_over_what_is_under_way(transfers: Any, context: dict[str, Any]) -> None:
    deferred(transfer_operator(), context)
    deferral = deferred(transfer_operator(), context)
    assert len(transfers.transfers) == 1
    assert deferral.trigger.serialize()[1]["remote_id"] == 1


def test_what_is_cancelled_just_after_it_was_found_is_not_taken_over(transfers: Any, context: dict[str, Any]) -> None:
    deferred(transfer_operator(), context)
    # The trigger of the cleared task comes a little late.
    transfers.before_info = lambda transfer: setattr(transfer, "phase", TransferPhase.canceled)
    deferral = deferred(transfer_operator(), context)
    assert deferral.trigger.serialize()[1]["remote_id"] == 2
    assert transfers.transfers[2].key == "stream_run/mfx__r0007/request_stream#2"
    assert context["ti"].xcoms["transfer_id"] == 2


@pytest.mark.parametrize("phase", [TransferPhase.canceled, TransferPhase.failed, TransferPhase.expired])
def test_after_a_transfer_that_came_to_nothing_there_is_a_new_one(
    transfers: Any, context: dict[str, Any], phase: TransferPhase
) -> None:
    for _ in range(2):
        deferred(transfer_operator(), context)
        transfers.transfers[len(transfers.transfers)].phase = phase
    deferred(transfer_operator(), context)
    assert [transfer.key for transfer in transfers.transfers.values()] == [
        "stream_run/mfx__r0007/request_stream",
        "stream_run/mfx__r0007/request_stream#2",
        "stream_run/mfx__r0007/request_stream#3",
    ]


def test_a_success_the_task_could_not_report_is_taken_over(transfers: Any, context: dict[str, Any]) -> None:
    deferred(transfer_operator(wait_for="complete"), context)
    transfers.transfers[1].phase = TransferPhase.done
    operator = transfer_operator(wait_for="complete", deferrable=False)
    assert operator.execute(context)["transfer_id"] == 1
    assert len(transfers.transfers) == 1


def test_a_task_that_is_cleared_after_its_success_works_anew(transfers: Any, context: dict[str, Any]) -> None:
    operator = transfer_operator(wait_for="complete")
    deferral = deferred(operator, context)
    transfers.transfers[1].phase = TransferPhase.done
    operator.execute_complete(context, {"status": "reached", "remote_id": 1, "message": "done", "facts": {}})
    context["ti"].max_tries += 2
    deferred(transfer_operator(wait_for="complete"), context)
    assert len(transfers.transfers) == 2
    assert deferral is not None


def test_a_success_that_airflow_did_not_hear_is_taken_over_by_its_retry(
    transfers: Any, context: dict[str, Any]
) -> None:
    operator = transfer_operator(wait_for="complete")
    deferred(operator, context)
    transfers.transfers[1].phase = TransferPhase.done
    operator.execute_complete(context, {"status": "reached", "remote_id": 1, "message": "done", "facts": {}})
    context["ti"].try_number += 1
    assert transfer_operator(wait_for="complete", deferrable=False).execute(context)["transfer_id"] == 1
    assert len(transfers.transfers) == 1


def test_a_changed_configuration_ends_the_old_transfer_and_starts_a_new_one(
    transfers: Any, context: dict[str, Any]
) -> None:
    deferred(transfer_operator(), context)
    deferred(transfer_operator(config={"lclstreamer": {"other": 1}}), context)
    assert transfers.transfers[1].phase is TransferPhase.canceled
    assert transfers.transfers[2].key is not None
    assert transfers.transfers[2].key.endswith("#2")


def test_waiting_in_the_worker_gives_the_same_answer(transfers: Any, context: dict[str, Any]) -> None:
    transfers.first_phase = TransferPhase.ready
    facts = transfer_operator(deferrable=False).execute(context)
    assert (facts["transfer_id"], facts["url"], facts["phase"]) == (1, "tcp://127.0.0.1:9001", "ready")


def test_a_failed_transfer_fails_the_task_with_the_reason(transfers: Any, context: dict[str, Any]) -> None:
    transfers.before_info = lambda transfer: setattr(transfer, "phase", TransferPhase.failed)
    with pytest.raises(AirflowException, match="transfer 1 is failed") as caught:
        transfer_operator(deferrable=False).execute(context)
    assert not isinstance(caught.value, AirflowFailException)


def test_failed_work_may_be_final(transfers: Any, context: dict[str, Any]) -> None:
    transfers.before_info = lambda transfer: setattr(transfer, "phase", TransferPhase.failed)
    with pytest.raises(AirflowFailException, match="transfer 1 is failed"):
        transfer_operator(deferrable=False, retry_failed_work=False).execute(context)


def test_a_wait_that_takes_too_long_cancels(transfers: Any, context: dict[str, Any]) -> None:
    with pytest.raises(AirflowException, match="took longer than it was given"):
        transfer_operator(deferrable=False, wait_timeout_s=0.1).execute(context)
    assert transfers.transfers[1].phase is TransferPhase.canceled


def test_airflows_own_timeout_of_a_deferred_task_cancels(transfers: Any, context: dict[str, Any]) -> None:
    deferred(transfer_operator(), context)
    with pytest.raises(TaskDeferralTimeout):
        transfer_operator().resume_execution("__fail__", {"error": "Trigger timeout"}, context)
    assert transfers.transfers[1].phase is TransferPhase.canceled


def test_a_kill_in_the_worker_cancels(transfers: Any, context: dict[str, Any]) -> None:
    operator = transfer_operator()
    deferred(operator, context)
    operator.on_kill()
    assert transfers.transfers[1].phase is TransferPhase.canceled


def test_a_kill_before_the_answer_finds_the_transfer_by_its_key(
    transfers: Any, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = transfer_operator()
    ask = operator.start

    def killed_before_the_answer(key: str) -> Any:
        ask(key)
        # on_kill runs in a signal handler, while the first call is still under way.
        monkeypatch.setattr(operator, "start", ask)
        operator.on_kill()
        raise KeyboardInterrupt

    monkeypatch.setattr(operator, "start", killed_before_the_answer)
    with pytest.raises(KeyboardInterrupt):
        operator.execute(context)
    assert len(transfers.transfers) == 1
    assert transfers.transfers[1].phase is TransferPhase.canceled


def test_a_kill_leaves_the_transfer_when_told_to(transfers: Any, context: dict[str, Any]) -> None:
    operator = transfer_operator(on_kill_policy="leave")
    deferred(operator, context)
    operator.on_kill()
    assert transfers.transfers[1].phase is TransferPhase.requested


def test_a_refused_configuration_is_not_tried_again(transfers: Any, context: dict[str, Any]) -> None:
    transfers.failures = [422]
    with pytest.raises(AirflowFailException, match="422"):
        transfer_operator().execute(context)


def test_a_service_that_stumbles_is_asked_again(
    transfers: Any, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "START_PATIENCE_S", 60.0)
    transfers.failures = [503]
    deferred(transfer_operator(), context)
    assert len(transfers.transfers) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml cannot be read"),
        ({"wait_for": "done"}, "wait_for is 'done'"),
        ({"config": {"a": "{{ b }}"}}, "nobody gives a value"),
        ({"lease_s": "soon"}, "soon"),
    ],
)
def test_what_is_wrong_fails_before_anything_starts(
    transfers: Any, context: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(AirflowFailException, match=message):
        transfer_operator(**arguments).execute(context)
    assert transfers.transfers == {}


@pytest.mark.parametrize("missing", ["connection", "folder"])
def test_a_worker_without_connection_or_certificates_is_tried_again(
    transfers: Any, context: dict[str, Any], connection: Callable[..., None], missing: str
) -> None:
    arguments = {"lclstream_conn_id": "nobody"}
    if missing == "folder":
        connection("nobody", "lclstream", transfers.url, "/nowhere")
    sensor = NNGBufferSensor(task_id="flowing", transfer_id=1, until="flowing", **arguments)
    for task in (transfer_operator(**arguments), sensor):
        with pytest.raises(AirflowException, match=r"'nobody' is not defined|folder /nowhere does not exist") as caught:
            task.execute(context)
        # Airflow says so also while its database cannot be asked, and a folder may not be mounted yet.
        assert not isinstance(caught.value, AirflowFailException)


def test_an_answer_that_is_no_services_of_ours_is_no_reason_to_give_up(
    transfers: Any, jobs: JobClient, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def odd(*_: Any, **__: Any) -> Any:
        return json.loads("<h1>Back soon</h1>")

    monkeypatch.setattr(TransferClient, "request", odd)
    monkeypatch.setattr(JobClient, "files", odd)
    event = {"status": "reached", "remote_id": "1.1", "message": "job 1.1 is completed", "facts": {}}
    with pytest.raises(AirflowException, match="Expecting value") as asked:
        transfer_operator().execute(context)
    keeps = job_operator("true", output_files=["*"], output_folder=str(tmp_path))
    with pytest.raises(AirflowException, match="is completed, but Expecting value") as fetched:
        keeps.execute_complete(context, event)
    assert not any(isinstance(caught.value, AirflowFailException) for caught in (asked, fetched))


def test_a_log_that_cannot_be_shown_does_not_fail_a_good_job(
    jobs: JobClient, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ServiceError("no such route", status=404, detail="")

    monkeypatch.setattr(JobClient, "logs", refused)
    context["ti"].run_id = "no log"
    done = job_operator("echo '{}' > result.json", result_file="result.json", follow_log=False, deferrable=False)
    assert done.execute(context)["state"] == "completed"


def test_a_good_job_is_not_failed_for_good_while_certificates_are_away(
    jobs: JobClient, context: dict[str, Any], connection: Callable[..., None], job_service: str
) -> None:
    connection("psik_default", "psik", job_service, "/nowhere")
    event = {"status": "reached", "remote_id": "1.1", "message": "job 1.1 is completed", "facts": {}}
    with pytest.raises(AirflowException, match="folder /nowhere does not exist") as caught:
        job_operator("true", result_file="result.json").execute_complete(context, event)
    assert not isinstance(caught.value, AirflowFailException)


def test_a_stream_is_ended_by_its_own_operator(transfers: Any, context: dict[str, Any]) -> None:
    transfers.add().phase = TransferPhase.producing
    assert LCLStreamCancelOperator(task_id="cancel", transfer_id="1").execute(context) == 1
    assert transfers.transfers[1].phase is TransferPhase.canceled
    for nothing in (None, "", "None"):
        assert LCLStreamCancelOperator(task_id="cancel", transfer_id=nothing).execute(context) is None
    assert LCLStreamCancelOperator(task_id="cancel", transfer_id=99).execute(context) == 99


def test_a_stream_goes_into_files_where_the_service_can_do_that(transfers: Any, context: dict[str, Any]) -> None:
    transfers.first_phase = TransferPhase.ready
    for number, can in enumerate((["wait", "spill"], ["wait"])):
        context["ti"].run_id = f"run{number}"
        transfers.on_no_consumer = can
        transfer_operator(on_no_consumer="prefer_spill", prompt_s=10).execute(context)
    assert transfers.asked_on_no_consumer == ["spill", "wait"]
    context["ti"].run_id = "run3"
    with pytest.raises(AirflowFailException, match="nothing is kept"):
        transfer_operator(on_no_consumer="spill", prompt_s=10).execute(context)
    with pytest.raises(AirflowFailException, match="it may be 'wait', 'spill' or 'prefer_spill'"):
        transfer_operator(on_no_consumer="drop").execute(context)


@pytest.mark.parametrize("readers", ["analysis batch@olcf", ["analysis", "batch@olcf"]])
def test_the_service_is_told_who_may_pull(transfers: Any, context: dict[str, Any], readers: Any) -> None:
    transfers.first_phase = TransferPhase.ready
    transfer_operator(readers=readers, prompt_s=10).execute(context)
    assert transfers.readers == [["analysis", "batch@olcf"]]


def test_the_sensor_waits_in_the_triggerer(transfers: Any, context: dict[str, Any]) -> None:
    transfers.add()
    deferral = deferred(NNGBufferSensor(task_id="flow", transfer_id="1", until="flowing", lease_s="120"), context)
    arguments = deferral.trigger.serialize()[1]
    assert (arguments["until"], arguments["lease_s"], arguments["on_kill_policy"]) == ("flowing", 120.0, "leave")


@pytest.mark.parametrize(("policy", "phase"), [("cancel", TransferPhase.canceled), ("leave", TransferPhase.producing)])
def test_a_kill_before_the_first_message_follows_the_sensors_policy(
    transfers: Any, context: dict[str, Any], policy: str, phase: TransferPhase
) -> None:
    transfers.add().phase = TransferPhase.producing
    sensor = NNGBufferSensor(task_id="data_flowing", transfer_id=1, until="flowing", on_kill_policy=policy)
    path, arguments = deferred(sensor, context).trigger.serialize()
    asyncio.run(import_string(path)(**arguments).on_kill())
    assert transfers.transfers[1].phase is phase


def test_the_sensor_waits_in_the_worker_and_keeps_the_lease(transfers: Any, context: dict[str, Any]) -> None:
    transfer = transfers.add()
    received = iter([0, 0, 4])
    transfers.before_info = lambda seen: setattr(seen, "received", next(received))
    sensor = NNGBufferSensor(
        task_id="flow", transfer_id=1, until="flowing", deferrable=False, poke_interval=0.02, timeout=20
    )
    assert sensor.execute(context)["received_messages"] == 4
    assert transfer.lease_s == [60.0] * 3


def test_the_sensor_fails_for_good_with_its_transfer(transfers: Any, context: dict[str, Any]) -> None:
    transfers.add().phase = TransferPhase.expired
    sensor = NNGBufferSensor(task_id="flow", transfer_id=1, until="done", deferrable=False)
    with pytest.raises(AirflowFailException, match="transfer 1 is expired"):
        sensor.execute(context)
    with pytest.raises(AirflowFailException, match="must be the number of a transfer"):
        NNGBufferSensor(task_id="flow", transfer_id="None", until="done").execute(context)
    with pytest.raises(ValueError, match="it may be ready, flowing, level, stalled"):
        NNGBufferSensor(task_id="flow", transfer_id=1, until="empty")  # type: ignore[arg-type]


@pytest.mark.parametrize(("policy", "phase"), [("leave", TransferPhase.producing), ("cancel", TransferPhase.canceled)])
def test_the_sensors_timeout_follows_its_policy(
    transfers: Any, context: dict[str, Any], policy: str, phase: TransferPhase
) -> None:
    transfers.add().phase = TransferPhase.producing
    sensor = NNGBufferSensor(task_id="flow", transfer_id=1, until="done", on_kill_policy=policy)
    event = {"status": "timeout", "remote_id": 1, "message": "too long", "facts": {}}
    with pytest.raises(AirflowException, match="too long"):
        sensor.execute_complete(context, event)
    assert transfers.transfers[1].phase is phase


def test_a_job_gives_its_result_and_its_files(jobs: JobClient, context: dict[str, Any], tmp_path: Path) -> None:
    context["ti"].task_id = "analyse"
    given = tmp_path / "calib.txt"
    given.write_text("42")
    operator = job_operator(
        'printf \'{"run": %s, "calib": %s}\' "$LCLSTREAM_RUN" "$(cat calib.txt)" > result.json\n'
        "echo A > a.png; echo B > b.h5",
        environment={"LCLSTREAM_RUN": "7"},
        input_files={"calib.txt": str(given)},
        result_file="result.json",
        output_files=["*.png"],
        output_folder=str(tmp_path / "kept"),
        deferrable=False,
    )
    result = operator.execute(context)
    assert result["result"] == {"run": 7, "calib": 42}
    assert result["state"] == "completed"
    assert result["files"] == [str(tmp_path / "kept" / "a.png")]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a.png"]
    xcoms = context["ti"].xcoms
    assert xcoms["job_id"] == result["job_id"]
    assert xcoms["result"] == {"run": 7, "calib": 42}
    assert xcoms["job_link"].endswith(f"/v2/jobs/{result['job_id']}/logs")


def test_a_job_is_found_again_by_a_task_that_runs_again(jobs: JobClient, context: dict[str, Any]) -> None:
    context["ti"].task_id, context["ti"].run_id = "analyse", "again"
    first = deferred(job_operator("exec sleep 600"), context).trigger.serialize()[1]["remote_id"]
    second = deferred(job_operator("exec sleep 600"), context).trigger.serialize()[1]["remote_id"]
    assert first == second
    operator = job_operator("exec sleep 600")
    assert deferred(operator, context).trigger.serialize()[1]["remote_id"] == first
    operator.on_kill()
    deadline = time.monotonic() + 60
    while not jobs.state(first).is_final:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert jobs.state(first) is JobState.canceled
    third = deferred(job_operator("exec sleep 600"), context).trigger.serialize()[1]["remote_id"]
    assert third != first
    jobs.cancel(third)


def test_a_failed_job_shows_its_last_words(
    jobs: JobClient, context: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    context["ti"].run_id = "failed"
    operator = job_operator("echo hello; echo 'detector jungfrau is not there' >&2; exit 3", deferrable=False)
    with pytest.raises(AirflowException, match=r"is failed: (.|\n)*detector jungfrau is not there"):
        operator.execute(context)
    assert "[stdout.1] hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("true", "has not written result.json"),
        ("echo '[1]' > result.json", "holds a list, not an object"),
        ("echo '{' > result.json", "is not JSON"),
        ("seq 1 20000 > result.json", "more than 48000"),
    ],
)
def test_a_result_that_cannot_be_used_is_explained(
    jobs: JobClient, context: dict[str, Any], script: str, message: str
) -> None:
    context["ti"].run_id = message
    with pytest.raises(AirflowFailException, match=message):
        job_operator(script, result_file="result.json", deferrable=False).execute(context)


def test_numbers_that_json_does_not_know_become_text(jobs: JobClient, context: dict[str, Any]) -> None:
    context["ti"].run_id = "special numbers"
    script = """echo '{"chi2": NaN, "fit": {"slope": [-Infinity, 1e999, 1.5]}}' > result.json"""
    done = job_operator(script, result_file="result.json", deferrable=False).execute(context)
    assert done["result"] == {"chi2": "NaN", "fit": {"slope": ["-Infinity", "Infinity", 1.5]}}
    # As Airflow's client sends them.
    json.dumps([done, context["ti"].xcoms], allow_nan=False)


def test_files_that_are_not_there_are_missed(jobs: JobClient, context: dict[str, Any], tmp_path: Path) -> None:
    context["ti"].run_id = "files"
    operator = job_operator("true", output_files=["*.h5"], output_folder=str(tmp_path), deferrable=False)
    with pytest.raises(AirflowFailException, match=r"no file that matches \*\.h5"):
        operator.execute(context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"job": {"script": "x", "resource": {}}}, "resource"),
        ({"output_files": ["*"]}, "output_folder"),
        ({"input_files": {"a": "/nowhere"}}, "/nowhere cannot be read"),
    ],
)
def test_a_wrong_job_is_never_submitted(
    jobs: JobClient, context: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    before = len(jobs.list())
    with pytest.raises(AirflowFailException, match=message):
        job_operator("true", **arguments).execute(context)
    assert len(jobs.list()) == before


def test_a_files_name_cannot_lead_outside(tmp_path: Path) -> None:
    from lclstream_airflow.operators.psik import _inside

    for name in ("../evil", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(ValueError, match="outside"):
            _inside(tmp_path, name)
    assert _inside(tmp_path, "plots/a.png") == tmp_path / "plots" / "a.png"


def test_what_fails_after_the_start_leaves_nothing_running(
    transfers: Any, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch, connection: Callable[..., None]
) -> None:
    operator = transfer_operator(deferrable=False)

    def broken(*_: Any) -> None:
        raise RuntimeError("Airflow's database is away")

    monkeypatch.setattr(operator, "execute_complete", broken)
    transfers.first_phase = TransferPhase.ready
    with pytest.raises(RuntimeError):
        operator.execute(context)
    assert transfers.transfers[1].phase is TransferPhase.canceled
