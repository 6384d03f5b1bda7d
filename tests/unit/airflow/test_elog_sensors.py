from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from airflow.sdk.module_loading import import_string

from lclstream.elog.client import AsyncElogClient, ElogClient, ElogError
from lclstream_airflow.sensors.elog import FilesAtLocationSensor, RunClosedSensor

EXPERIMENT = "mfxsensor"


def waited(sensor: Any, context: dict[str, Any]) -> Any:
    """Wait as the triggerer does: with a trigger made again from its JSON."""
    import asyncio

    with pytest.raises(TaskDeferred) as deferral:
        sensor.execute(context)
    path, arguments = deferral.value.trigger.serialize()
    trigger = import_string(path)(**json.loads(json.dumps(arguments)))

    async def first() -> Any:
        return (await anext(trigger.run())).payload

    return sensor.execute_complete(context, json.loads(json.dumps(asyncio.run(first()))))


def closed(run: Any, **arguments: Any) -> RunClosedSensor:
    given = {"task_id": "closed", "experiment": EXPERIMENT, "run": run, "poke_interval": 0.05, "timeout": 60}
    return RunClosedSensor(**{**given, **arguments})


def files(run: Any, **arguments: Any) -> FilesAtLocationSensor:
    given = {"task_id": "files", "experiment": EXPERIMENT, "run": run, "poke_interval": 0.05, "timeout": 60}
    given["location"] = "S3DF"
    return FilesAtLocationSensor(**{**given, **arguments})


@pytest.mark.parametrize("deferrable", [True, False])
def test_the_end_of_a_run_is_waited_for(elog: ElogClient, context: dict[str, Any], deferrable: bool) -> None:
    run = elog.start_run(EXPERIMENT)
    began = time.monotonic()
    threading.Timer(0.5, lambda: elog.end_run(EXPERIMENT)).start()
    sensor = closed(str(run.num), deferrable=deferrable)
    facts = waited(sensor, context) if deferrable else sensor.execute(context)
    assert time.monotonic() - began > 0.4
    assert (facts["experiment"], facts["run"]) == (EXPERIMENT, run.num)
    assert facts["duration_s"] > 0
    assert context["ti"].xcoms["run_link"].endswith(f"/lgbk/{EXPERIMENT}/ws/runs/{run.num}")


def test_a_run_that_does_not_exist_is_not_waited_for(elog: ElogClient, context: dict[str, Any]) -> None:
    elog.start_run(EXPERIMENT)
    with pytest.raises(AirflowFailException, match="9999"):
        waited(closed(9999), context)
    with pytest.raises(AirflowFailException, match="run is empty"):
        closed("None").execute(context)


def test_an_answer_that_is_not_the_logbooks_is_asked_for_again(
    elog: ElogClient, context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = elog.start_run(EXPERIMENT)
    elog.end_run(EXPERIMENT)
    answer, odd = AsyncElogClient.run, iter([ElogError("the answer is not the logbook's")])

    async def ask(client: AsyncElogClient, *arguments: Any) -> Any:
        for error in odd:
            raise error
        return await answer(client, *arguments)

    monkeypatch.setattr(AsyncElogClient, "run", ask)
    assert waited(closed(run.num), context)["run"] == run.num


def test_an_open_run_is_a_timeout(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run(EXPERIMENT)
    with pytest.raises(AirflowException, match="took longer than it was given"):
        waited(closed(run.num, timeout=0.2), context)


def test_files_are_waited_for_until_all_are_there_and_the_run_has_ended(
    elog: ElogClient, context: dict[str, Any]
) -> None:
    run = elog.start_run(EXPERIMENT)
    for name in ("a.xtc2", "b.xtc2", "notes.txt"):
        elog.register_file(EXPERIMENT, f"/data/{name}", run.num, size=100)
    elog.file_available_at_location(EXPERIMENT, run.num, "/data/a.xtc2", "S3DF")
    with pytest.raises(AirflowException, match="took longer"):
        waited(files(run.num, pattern="*.xtc2", timeout=0.2), context)
    elog.file_available_at_location(EXPERIMENT, run.num, "/data/b.xtc2", "S3DF")
    with pytest.raises(AirflowException, match="took longer"):
        waited(files(run.num, pattern="*.xtc2", timeout=0.2), context)
    elog.end_run(EXPERIMENT)
    facts = waited(files(run.num, pattern="*.xtc2"), context)
    assert (facts["files"], facts["bytes"], facts["location"]) == (2, 200, "S3DF")
    assert facts["paths"] == ["/data/a.xtc2", "/data/b.xtc2"]
    with pytest.raises(AirflowException, match="took longer"):
        waited(files(run.num, pattern="*.xtc2", least="3", timeout=0.2), context)
    facts = waited(files(run.num, location="", least=0), context)
    assert (facts["files"], facts["location"]) == (3, "")
