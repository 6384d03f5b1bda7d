"""Assets and OpenLineage: what other DAGs and catalogues learn from our tasks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import AssetAlias

from lclstream.api.models import TransferPhase
from lclstream.elog.client import ElogClient
from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.engine import EngineJobOperator
from lclstream_airflow.operators.lclstream import LCLStreamTransferOperator
from lclstream_airflow.operators.lineage import asset_of
from lclstream_airflow.operators.psik import PsikOperator

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"
CONFIG = {"source_identifier": "exp={{ experiment }},run={{ run }}"}
VALUES = {"experiment": "mfx100", "run": 7}


class Events(list[Any]):
    """What Airflow gives a task to add events to an alias."""

    def add(self, asset: Any, extra: dict[str, Any]) -> None:
        self.append((asset.uri, extra))


def test_whoever_follows_results_gets_the_facts_of_each_run(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run("mfx100")
    alias = AssetAlias("lclstream_results")
    context["outlet_events"] = {alias: Events()}
    given: dict[str, Any] = {"task_id": "report", "experiment": "mfx100", "run": run.num, "run_params": {"hits": 3}}
    ElogOperator(**given, outlets=[alias]).execute(context)
    ElogOperator(**given).execute(context)
    assert context["outlet_events"][alias] == [
        ("lclstream://results/mfx100", {"experiment": "mfx100", "run": run.num, "parameters": {"hits": 3}, "files": []})
    ]


def test_whoever_follows_streams_gets_the_address(transfers: Any, context: dict[str, Any]) -> None:
    transfers.first_phase = TransferPhase.ready
    alias = AssetAlias("lclstream_streams")
    context["outlet_events"] = {alias: Events()}
    for values in (VALUES, {}):
        context["ti"].run_id = str(values)
        config = CONFIG if values else {"source_identifier": "files=x"}
        LCLStreamTransferOperator(
            task_id="stream", config=config, values=values, prompt_s=10, outlets=[alias]
        ).execute(context)  # fmt: skip
    ((uri, facts),) = context["outlet_events"][alias]
    assert uri == "lclstream://streams/mfx100"
    assert facts == {**VALUES, "transfer_id": 1, "url": "tcp://127.0.0.1:9001", "phase": "ready"}


def test_an_asset_belongs_to_one_experiment() -> None:
    assert asset_of("lclstream_results", "mfx 1").uri == "lclstream://results/mfx%201"


def test_the_example_that_follows_results_is_a_dag_and_is_what_the_page_shows() -> None:
    example = EXAMPLES / "airflow_follow_results.py"
    bag = DagBag(dag_folder=str(example))
    assert (bag.import_errors, bag.dag_ids) == ({}, ["follow_results"])
    assert example.read_text().strip() in (EXAMPLES.parent / "dags.md").read_text()
    facts = {"experiment": "mfx100", "run": 7, "parameters": {}}
    look = bag.dags["follow_results"].get_task("look")
    assert look.python_callable({"asset": [SimpleNamespace(extra=facts)]}) == [facts]  # type: ignore[attr-defined]


def test_openlineage_learns_what_is_read_and_written(
    elog: ElogClient, transfers: Any, connection: Any, airflow_identity: Any
) -> None:
    pytest.importorskip("airflow.providers.openlineage", reason="the extra `lineage` is not installed")
    connection("psik_default", "psik", "https://127.0.0.1:8447", airflow_identity.folder)
    xcoms: dict[str, Any] = {"url": "tcp://dtn:9001", "return_value": {"files": ["/kept/a.png"]}}
    ti = SimpleNamespace(xcom_pull=lambda task_ids, key="return_value": xcoms[key])

    def names(found: Any) -> tuple[list[str], list[str]]:
        return tuple([f"{one.namespace} {one.name}" for one in side] for side in (found.inputs, found.outputs))  # type: ignore[return-value]

    stream = LCLStreamTransferOperator(task_id="stream", config=CONFIG, values=VALUES, transfer_name="mfx100-r7")
    source = "lclstream exp=mfx100,run=7"
    assert names(stream.get_openlineage_facets_on_start()) == ([source], [])
    assert names(stream.get_openlineage_facets_on_complete(ti)) == ([source], ["tcp://dtn:9001 mfx100-r7"])
    reduce = EngineJobOperator(task_id="reduce", config=CONFIG, values=VALUES, folder="/scratch", prefix="mfx100-r0007")
    assert names(reduce.get_openlineage_facets_on_complete(ti)) == (
        [source], ["file://127.0.0.1 /scratch/mfx100-r0007.h5"],
    )  # fmt: skip
    analyse = PsikOperator(task_id="analyse", job={}, environment={"LCLSTREAM_URL": "tcp://dtn:9001"})
    assert names(analyse.get_openlineage_facets_on_complete(ti)) == (["tcp://dtn:9001 stream"], ["file /kept/a.png"])
    report = ElogOperator(task_id="report", experiment="mfx100", run=7)
    (written,) = names(report.get_openlineage_facets_on_complete(ti))[1]
    assert written.endswith(" mfx100/run/7")
