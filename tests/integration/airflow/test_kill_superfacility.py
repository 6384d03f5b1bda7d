"""Cancel means cancel at NERSC, too: a real scheduler and triggerer, and a job that runs at the stand-in."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lclstream.superfacility.client", reason="needs pip install 'lclstream[superfacility]'")

from lclstream.superfacility.client import FacilityJob, SuperfacilityClient

pytestmark = [
    pytest.mark.integration,
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif("LCLSTREAM_SOAK" not in os.environ, reason="two minutes of a real Airflow: LCLSTREAM_SOAK=1"),
]

DAG = '''
import os
from airflow.sdk import DAG
from lclstream_airflow.operators.superfacility import SuperfacilityOperator

with DAG(dag_id="at_nersc", schedule=None, catchup=False, max_active_runs=8):
    SuperfacilityOperator(
        task_id="work", job_name="{{ run_id }}", folder=os.environ["FACILITY_FOLDER"], poll_interval=1,
        script="#!/bin/sh\\n#SBATCH --time=30\\nexec sleep 1800\\n",
    )
'''  # fmt: skip


@pytest.fixture
def site(superfacility: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Airflow with the connection `superfacility_default` to the stand-in."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    import airflow_site

    superfacility.home.mkdir(parents=True, exist_ok=True)
    dags = tmp_path / "dags"
    dags.mkdir()
    (dags / "at_nersc.py").write_text(DAG)
    connection = {
        "conn_type": "superfacility",
        "host": superfacility.url,
        "extra": {"key_file": str(superfacility.key)},
    }
    environment = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW_CONN_SUPERFACILITY_DEFAULT": json.dumps(connection),
        "FACILITY_FOLDER": str(superfacility.home),
    }
    with airflow_site.airflow_site(tmp_path / "site", knows="at_nersc", environment=environment) as running:
        yield running
    sys.modules.pop("airflow_site", None)


def test_whatever_is_done_to_a_deferred_task_its_job_ends_and_a_cleared_one_goes_on(
    site: Any, superfacility: Any, until: Callable[..., float]
) -> None:
    def jobs(run: str) -> list[FacilityJob]:
        async def ask() -> list[FacilityJob]:
            async with SuperfacilityClient(superfacility.api_url, superfacility.token_url, superfacility.key) as client:
                return await client.find("perlmutter", run)

        return asyncio.run(ask())

    def is_deferred(run: str) -> bool:
        return site.task("at_nersc", run, "work")["state"] == "deferred" and bool(
            site.triggers("at_nersc", run, "work")
        )

    def start(run: str) -> None:
        site.trigger("at_nersc", run)
        until(lambda: any(job.state == "RUNNING" for job in jobs(run)) and is_deferred(run), 180, f"wait of {run}")

    def ended(run: str) -> None:
        until(lambda: all(job.is_final for job in jobs(run)), 180, f"end of {run}")
        assert [job.state for job in jobs(run)] == ["CANCELLED"]

    for state in ("failed", "success"):
        start(state)
        site.mark_task("at_nersc", state, "work", state)
        ended(state)
    start("run")
    site.fail_run("at_nersc", "run")
    ended("run")
    start("cleared")
    (before,) = jobs("cleared")
    site.clear_task("at_nersc", "cleared", "work")
    # A trigger that would cancel in spite of it does so within seconds.
    time.sleep(15)
    until(lambda: is_deferred("cleared"), 180, "wait of the cleared task")
    assert jobs("cleared") == [before]
    site.fail_run("at_nersc", "cleared")
    ended("cleared")
