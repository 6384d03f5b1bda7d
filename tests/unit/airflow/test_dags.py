"""DAG files are read as Airflow reads them."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError

from lclstream.jobs.models import JobSpec
from lclstream_airflow.operators.documents import load_document
from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.engine import EngineJobOperator
from lclstream_airflow.operators.lclstream import LCLStreamCancelOperator, LCLStreamTransferOperator
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.operators.reconcile import ReconcileOperator
from lclstream_airflow.operators.remote import RemoteWorkOperator
from lclstream_airflow.operators.session import (
    FindSessionOperator,
    SessionOperator,
    SessionReleaseOperator,
    SessionStreamOperator,
)
from lclstream_airflow.sensors.buffer import NNGBufferSensor
from lclstream_airflow.sensors.elog import FilesAtLocationSensor
from lclstream_airflow.sensors.polling import PollingSensor
from lclstream_airflow.sensors.session import SessionEndSensor

REPOSITORY = Path(__file__).resolve().parents[3]
DAGS = REPOSITORY / "dags"
EXAMPLES = REPOSITORY / "docs" / "examples"


@pytest.fixture(scope="module")
def bag() -> DagBag:
    return DagBag(dag_folder=str(DAGS))


def test_every_dag_file_is_read_without_an_error(bag: DagBag) -> None:
    assert bag.import_errors == {}
    assert bag.captured_warnings == {}
    files = {path.stem for path in DAGS.glob("*.py") if path.stem != "__init__"}
    assert set(bag.dag_ids) == files


def test_every_dag_teaches_and_is_bounded(bag: DagBag) -> None:
    for dag in bag.dags.values():
        assert dag.doc_md, dag.dag_id
        assert dag.description, dag.dag_id
        assert "lclstream" in dag.tags, dag.dag_id
        assert dag.dagrun_timeout is not None, dag.dag_id
        assert dag.max_active_runs, dag.dag_id
        assert not dag.catchup


def test_nothing_waits_in_a_worker(bag: DagBag) -> None:
    for dag in bag.dags.values():
        for task in dag.tasks:
            if isinstance(task, RemoteWorkOperator | PollingSensor):
                assert task.deferrable, task.task_id


def test_stream_run_has_the_agreed_shape(bag: DagBag) -> None:
    dag = bag.dags["stream_run"]
    below = {task.task_id: set(task.downstream_task_ids) for task in dag.tasks}
    assert below == {
        "request_stream": {"data_flowing", "analyse", "cancel_stream"},
        "data_flowing": {"stream_complete", "cancel_stream"},
        "analyse": {"report", "cancel_stream"},
        "stream_complete": {"report", "cancel_stream"},
        "report": set(),
        "cancel_stream": set(),
    }
    assert dag.get_task("cancel_stream").trigger_rule == "one_failed"


@pytest.mark.parametrize(("dag_id", "count"), [("stream_run", 2), ("backfill_run", 2), ("stream_acquisition", 1)])
def test_whoever_stops_a_dag_run_stops_its_stream_wherever_it_waits(bag: DagBag, dag_id: str, count: int) -> None:
    # `cancel_stream` does not run in a DAG run that was marked failed.
    waits = [task for task in bag.dags[dag_id].tasks if isinstance(task, NNGBufferSensor)]
    assert [task.on_kill_policy for task in waits] == ["cancel"] * count


@pytest.mark.parametrize(
    ("parameters", "valid"),
    [
        ({"stream_config": "/a.yaml", "analysis_job": {"script": "x"}}, True),
        ({"stream_config": {"lclstreamer": {}}, "analysis_job": "/b.yaml", "psik_conn_id": "nersc", "ranks": 4}, True),
        ({"stream_config": "/a.yaml"}, False),
        ({"stream_config": "/a.yaml", "analysis_job": "/b.yaml", "rank": 4}, False),
        ({"stream_config": 7, "analysis_job": "/b.yaml"}, False),
    ],
)
def test_stream_runs_parameters_are_checked_when_it_is_triggered(
    bag: DagBag, parameters: dict[str, Any], valid: bool
) -> None:
    params = copy.deepcopy(bag.dags["stream_run"].params)
    # The run processor adds more than the DAG reads; that is no error.
    conf = {"experiment": "mfx", "run": 7, "trigger": "START_OF_RUN", "parameters": parameters}

    def trigger() -> None:
        params.update(conf)
        params.validate()

    if valid:
        trigger()
    else:
        with pytest.raises(ParamValidationError):
            trigger()


def test_the_examples_are_valid_and_are_what_the_page_shows(bag: DagBag) -> None:
    page = "".join((REPOSITORY / "docs" / name).read_text() for name in ("airflow.md", "dags.md"))
    given = {
        "stream_run": "airflow-stream-run.json",
        "reduce_run": "airflow-reduce-run.json",
        "stream_session": "airflow-session.json",
    }
    for dag_id, name in given.items():
        params = copy.deepcopy(bag.dags[dag_id].params)
        params.update(json.loads((EXAMPLES / name).read_text()))
        params.validate()
    session = EXAMPLES / "airflow-session-job.yaml"
    JobSpec.model_validate(load_document(str(session), {"session": "mfx"}, "job"))
    assert session.read_text().strip() in page
    job = EXAMPLES / "airflow-analysis-job.yaml"
    JobSpec.model_validate(load_document(str(job), {"experiment": "mfx", "run": "7"}, "job"))
    example = EXAMPLES / "airflow_own_dag.py"
    own = DagBag(dag_folder=str(example))
    assert own.import_errors == {}
    assert own.dag_ids == ["my_stream"]
    for path in (job, example):
        assert path.read_text().strip() in page


def test_every_argument_is_explained_on_the_page() -> None:
    page = "".join((REPOSITORY / "docs" / name).read_text() for name in ("airflow.md", "dags.md"))
    for operator in (
        EngineJobOperator,
        SessionOperator,
        FindSessionOperator,
        SessionStreamOperator,
        SessionReleaseOperator,
        SessionEndSensor,
        ReconcileOperator,
        LCLStreamTransferOperator,
        PsikOperator,
        NNGBufferSensor,
        ElogOperator,
        LCLStreamCancelOperator,
        FilesAtLocationSensor,
    ):
        for name in inspect.signature(operator.__init__).parameters:
            if name not in ("self", "kwargs", "poke_interval", "timeout", "deferrable"):
                assert f"`{name}`" in page, f"{operator.__name__}: {name}"
