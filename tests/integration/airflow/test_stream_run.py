"""The whole DAG against real services, run by `dag.test`: no scheduler, no triggerer, everything else is real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# By a thread: reading a DAG file switches off the alarm that the other method needs.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600, method="thread")]

ANALYSIS = """#!/usr/bin/env python3
import json, os
from lclstream.client import pull
events, energy = 0, 0.0
with pull(os.environ["LCLSTREAM_URL"], timeout_s=120) as stream:
    for batch in stream.batches():
        events += len(batch["/data/image"])
        energy += float(batch["/data/energy"].sum())
print("events", events)
json.dump(
    {"events": events, "pulse_energy": {"mean": energy / events}, "run": os.environ["LCLSTREAM_RUN"], "all": [1, 2]},
    open("result.json", "w"),
)
"""


def run_dag(conf: dict[str, Any]) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    dag = DagBag(dag_folder=str(Path(__file__).resolve().parents[3] / "dags" / "stream_run.py")).dags["stream_run"]
    return dag.test(logical_date=None, run_conf=conf)


def page_of(dag_run: Any) -> str:
    """What the DAG run's tab in the user interface shows."""
    from airflow.utils.session import create_session

    from lclstream_airflow.page import run

    with create_session() as session:
        return run(dag_run.dag_id, dag_run.run_id, session)


def states(dag_run: Any) -> dict[str, str]:
    return {task.task_id: str(task.state) for task in dag_run.get_task_instances()}


def test_a_run_is_streamed_analysed_and_reported(
    facility: Any, stream_config: Callable[[int], dict[str, Any]], tmp_path: Path, until: Callable[..., float]
) -> None:
    config = tmp_path / "stream.yaml"
    config.write_text(yaml.safe_dump(stream_config(40)))
    with facility.logbook() as elog:
        run = elog.start_run("mfx100")
    dag_run = run_dag(
        {
            "experiment": "mfx100",
            "run": run.num,
            "trigger": "START_OF_RUN",
            "parameters": {
                "stream_config": str(config),
                "analysis_job": {"name": "r{{ run:04d }}", "script": ANALYSIS},
                "psik_conn_id": "psik_olcf",
                "ranks": 2,
            },
        }
    )
    assert states(dag_run) == {
        "request_stream": "success",
        "data_flowing": "success",
        "analyse": "success",
        "stream_complete": "success",
        "report": "success",
        "cancel_stream": "skipped",
    }
    assert dag_run.state == "success"
    with facility.logbook() as elog:
        parameters = elog.run("mfx100", run.num).parameters()
    assert parameters["events"] == 40
    assert parameters["run"] == str(run.num)
    assert 0 <= parameters["pulse_energy_mean"] <= 1
    assert "all" not in parameters
    with facility.transfers() as api:
        info = api.info(api.list(limit=1)[0].id)
    assert (info.phase.value, info.name) == ("done", f"mfx100-r{run.num}")
    assert info.metrics.sent == info.metrics.recvd == 8
    until(lambda: not facility.running(), 60, "end of all jobs")
    page = page_of(dag_run)
    assert f"transfer {info.id} (mfx100-r{run.num})" in page
    assert "8 in" in page
    assert "job " in page
    assert "completed" in page


def test_a_stream_whose_engine_fails_is_told_and_leaves_nothing(
    facility: Any, stream_config: Callable[[int], dict[str, Any]], until: Callable[..., float]
) -> None:
    config = stream_config(40)
    config["event_source"] = {"type": "Psana2EventSource"}
    config["source_identifier"] = "files=/nowhere/run{{ run }}.xtc2"
    config["data_sources"] = {"time": {"type": "Psana2Timestamp"}}
    config["data_serializer"]["fields"] = {"time": "/data/time"}
    dag_run = run_dag(
        {
            "experiment": "mfx101",
            "run": 3,
            "parameters": {
                "stream_config": config,
                "analysis_job": {"script": ANALYSIS.replace("timeout_s=120", "timeout_s=120, connect_timeout_s=2")},
                "psik_conn_id": "psik_olcf",
            },
        }
    )
    ended = states(dag_run)
    assert dag_run.state == "failed"
    assert (ended["data_flowing"], ended["analyse"], ended["report"]) == ("failed", "failed", "upstream_failed")
    assert ended["cancel_stream"] == "success"
    with facility.transfers() as api:
        info = api.info(api.list(limit=1)[0].id)
        assert info.phase.value == "failed"
        assert "/nowhere/run3.xtc2" in str(info.log)
        until(lambda: api.info(info.id).released, 60, "freed ports")
    until(lambda: not facility.running(), 60, "end of all jobs")


def test_a_configuration_that_is_refused_starts_nothing(facility: Any) -> None:
    with facility.transfers() as api:
        before = len(api.list())
    dag_run = run_dag(
        {
            "experiment": "mfx102",
            "run": "4",
            "parameters": {"stream_config": {"event_source": {"type": "None"}}, "analysis_job": {"script": "true"}},
        }
    )
    assert dag_run.state == "failed"
    assert states(dag_run) == {
        "request_stream": "failed",
        "data_flowing": "upstream_failed",
        "analyse": "upstream_failed",
        "stream_complete": "upstream_failed",
        "report": "upstream_failed",
        "cancel_stream": "success",
    }
    with facility.transfers() as api:
        assert len(api.list()) == before
    assert facility.running() == []
