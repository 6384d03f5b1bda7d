"""Cancel means cancel: a real scheduler, triggerer and workers, real remote work, and every way a task can end.

Without ``LCLSTREAM_SOAK`` two of the ways; with it all of them, which takes minutes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from lclstream.backfill.cli import app as backfill
from lclstream.elog.client import ElogClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
SOAK = "LCLSTREAM_SOAK" in os.environ
DAG = "backfill_run"
ANALYSIS = """#!/usr/bin/env python3
import json, os
from lclstream.client import pull
with pull(os.environ["LCLSTREAM_URL"], timeout_s=60, connect_timeout_s=60) as stream:
    events = sum(len(batch["/data/image"]) for batch in stream.batches())
json.dump({"events": events}, open("result.json", "w"))
"""


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program that makes the published table."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chaos_airflow

    yield chaos_airflow
    for name in ("chaos_airflow", "airflow_site"):
        sys.modules.pop(name, None)


def test_however_a_task_ends_its_job_buffer_and_port_are_gone_and_a_cleared_task_finds_its_work(
    chaos: Any, tmp_path: Path
) -> None:
    # A busy machine may be slow to renew a lease; only where nobody tells the work to end it is waited for.
    result = chaos.run(folder=tmp_path, cases=None if SOAK else chaos.QUICK, lease_s=30 if SOAK else 240, say=print)
    # Both kinds of work in each case.
    assert len(result["rows"]) == 2 * (sum(map(len, chaos.GROUPS)) if SOAK else len(chaos.QUICK))
    assert [row for row in result["rows"] if row["left_running"] or row["seconds_to_gone"] is None] == []
    told = [row["by"] for row in result["rows"] if row["case"].startswith(chaos.QUICK)]
    assert set(told) == {"cancel"}, result["rows"]


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="a minute of a real Airflow: set LCLSTREAM_SOAK=1")
def test_archived_runs_are_streamed_by_a_backfill(
    chaos: Any, stream_config: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    parameters = {
        "stream_config": stream_config(20),
        "analysis_job": {"script": ANALYSIS},
        "psik_conn_id": "psik_olcf",
    }
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    with chaos.airflow_site(tmp_path / "site", knows=DAG, environment={}) as site:
        services, airflow = site.services, site.airflow
        with ElogClient(services.elog_url, services.airflow_credentials) as elog:
            for _ in range(2):
                elog.start_run("mfxarchive")
            elog.end_run("mfxarchive")
            words = ["mfxarchive", "1..9", "--parameters", str(tmp_path / "parameters.json"), "--max-active", "2"]
            words += ["--airflow", airflow.url, "--password-file", str(airflow.password_file)]
            words += ["--elog", services.elog_url, "--credentials", str(services.airflow_credentials.folder)]
            answer = CliRunner().invoke(backfill, words)
            assert answer.exit_code == 0, answer.output
            assert [run.parameters()["events"] for run in elog.runs("mfxarchive")] == [20, 20]
        tab = f"{airflow.url}/lclstream/runs/{DAG}/mfxarchive__r0002__backfill__backfill"
        login = {"username": airflow.login, "password": airflow.password_file.read_text()}
        with httpx.Client(trust_env=False, timeout=60) as http:
            token = http.post(f"{airflow.url}/auth/token", json=login).json()["access_token"]
            page = http.get(tab, headers={"Authorization": f"Bearer {token}"})
            assert page.status_code == 200
            assert "(mfxarchive-r2)" in page.text
            assert "completed" in page.text
            assert http.get(tab).status_code == 401
