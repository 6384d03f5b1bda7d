"""Cancel means cancel: a real scheduler and triggerer, real remote work, and everything a person or a crash can do.

All streams of this module run at the same time, so that the whole takes little longer than its slowest row.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from lclstream.backfill.cli import app as backfill
from lclstream.demo.airflow import Airflow
from lclstream.demo.processes import Children
from lclstream.demo.workspace import Workspace
from lclstream.jobs.models import JobState

pytestmark = [
    pytest.mark.integration,
    pytest.mark.soak,
    pytest.mark.timeout(300),
    pytest.mark.skipif("LCLSTREAM_SOAK" not in os.environ, reason="minutes of a real Airflow: set LCLSTREAM_SOAK=1"),
]

DAG = "stream_run"
#: Lease of the transfers that nobody cancels, in seconds.
LEASE_S = 40.0


ANALYSIS = """#!/usr/bin/env python3
import json, os
from lclstream.client import pull
with pull(os.environ["LCLSTREAM_URL"], timeout_s=60, connect_timeout_s=60) as stream:
    events = sum(len(batch["/data/image"]) for batch in stream.batches())
json.dump({"events": events}, open("result.json", "w"))
"""


class Site:
    """Airflow, and what it has started at the facility."""

    def __init__(self, airflow: Airflow, children: Children, facility: Any) -> None:
        self.airflow, self.children, self.facility = airflow, children, facility
        self.http = httpx.Client(base_url=airflow.url, timeout=60, trust_env=False)
        token = self.http.post(
            "/auth/token", json={"username": airflow.login, "password": airflow.password_file.read_text()}
        ).json()["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, body: dict[str, Any]) -> Any:
        # SQLite answers 500 now and then while several processes write.
        for _ in range(20):
            answer = self.http.request(method, f"/api/v2/dags/{DAG}{path}", json=body)
            if answer.status_code < 500:
                break
            time.sleep(0.5)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def trigger(self, run_id: str, config: dict[str, Any], lease_s: float) -> None:
        conf = {
            "experiment": "mfxkill",
            "run": run_id,
            "parameters": {
                "stream_config": config,
                "analysis_job": {"script": "#!/bin/sh\nexec sleep 600\n"},
                "psik_conn_id": "psik_olcf",
                "lease_s": lease_s,
            },
        }
        self.call("POST", "/dagRuns", {"dag_run_id": run_id, "logical_date": None, "conf": conf})

    def waiting(self, run_id: str) -> bool:
        """Whether the run has come to where it waits for its job and its stream."""
        tasks = self.airflow.tasks(DAG, run_id)
        return tasks.get("analyse") == tasks.get("stream_complete") == "deferred"

    def transfer(self, run_id: str) -> Any:
        number = self.airflow.xcom(DAG, run_id, "request_stream", "transfer_id")
        with self.facility.transfers() as api:
            return api.info(int(number))

    def job(self, run_id: str) -> str:
        return str(self.airflow.xcom(DAG, run_id, "analyse", "job_id"))

    def job_state(self, job_id: str) -> str:
        with self.facility.jobs() as jobs:
            return str(jobs.state(job_id).value)

    def triggers(self, run_id: str, task_id: str, attempt: int) -> list[Path]:
        """Logs of the triggers that have begun to wait for a task."""
        logs = Path(self.airflow.password_file).parent / "logs"
        return list(logs.glob(f"dag_id={DAG}/run_id={run_id}/task_id={task_id}/attempt={attempt}.log.trigger*"))

    def active_jobs(self) -> set[str]:
        with self.facility.jobs() as jobs:
            return {job.jobid for job in jobs.list(state=JobState.active)}


@pytest.fixture(scope="module")
def site(services: Any, tmp_path_factory: pytest.TempPathFactory, until: Callable[..., float]) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("kill")
    workspace = Workspace(folder)
    children = Children(workspace.logs, services.connections())
    (port,) = services.free_ports(1)
    airflow = Airflow(workspace, port, {})
    try:
        airflow.start(children)
        children.wait_until(lambda: airflow.ready(DAG), timeout=120, what="Airflow is healthy", every=0.5)
        site = Site(airflow, children, services)
        with contextlib.closing(site.http):
            yield site
    finally:
        airflow.close()
        assert children.stop() == []
        workspace.release()


@pytest.fixture(scope="module")
def runs(site: Site, stream_config: Callable[[int], dict[str, Any]], until: Callable[..., float]) -> dict[str, str]:
    """Runs that wait for their job and their stream, by what will be done to them → the job's id.

    More events than the buffers hold, and nobody pulls: left alone, these streams would never end.
    """
    rows = {
        "task_failed": 600,
        "task_success": 600,
        "task_cleared": 600,
        "dag_run_failed": 600,
        "airflow_gone": LEASE_S,
    }
    for row, lease_s in rows.items():
        site.trigger(row, stream_config(100_000), lease_s=lease_s)
    until(lambda: all(site.waiting(row) for row in rows), 200, "runs that wait")
    # Airflow tells nobody when a task is killed between its deferral and the start of its trigger.
    for row in rows:
        for task in ("analyse", "stream_complete"):
            until(lambda row=row, task=task: site.triggers(row, task, attempt=1), 60, f"the trigger of {row} {task}")
    return {row: site.job(row) for row in rows}


def test_archived_runs_are_streamed_by_a_backfill(
    site: Site, stream_config: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    parameters = {
        "stream_config": stream_config(20),
        "analysis_job": {"script": ANALYSIS},
        "psik_conn_id": "psik_olcf",
    }
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    with site.facility.logbook() as elog:
        for _ in range(2):
            elog.start_run("mfxarchive")
        elog.end_run("mfxarchive")
    words = ["mfxarchive", "1..9", "--parameters", str(tmp_path / "parameters.json"), "--max-active", "2"]
    words += ["--airflow", site.airflow.url, "--password-file", str(site.airflow.password_file)]
    words += ["--elog", site.facility.elog_url, "--credentials", str(site.facility.airflow.folder)]
    answer = CliRunner().invoke(backfill, words)
    assert answer.exit_code == 0, answer.output
    with site.facility.logbook() as elog:
        assert [run.parameters()["events"] for run in elog.runs("mfxarchive")] == [20, 20]
    tab = f"/lclstream/runs/{DAG}/mfxarchive__r0002__backfill__backfill"
    page = site.http.get(tab)
    assert page.status_code == 200
    assert "(mfxarchive-r2)" in page.text
    assert "completed" in page.text
    assert httpx.get(site.airflow.url + tab, trust_env=False).status_code == 401


def test_whatever_is_done_to_a_run_its_remote_work_ends(
    site: Site, runs: dict[str, str], until: Callable[..., float]
) -> None:
    assert {site.job_state(job) for job in runs.values()} == {"active"}
    acted = time.monotonic()
    site.call("PATCH", "/dagRuns/task_failed/taskInstances/analyse", {"new_state": "failed"})
    site.call("PATCH", "/dagRuns/task_success/taskInstances/stream_complete", {"new_state": "success"})
    site.call(
        "POST",
        "/clearTaskInstances",
        {"dry_run": False, "dag_run_id": "task_cleared", "task_ids": ["analyse"], "only_failed": False},
    )
    site.call("PATCH", "/dagRuns/dag_run_failed", {"state": "failed"})

    # A failed analysis ends its stream; a stream that somebody calls complete is ended.
    for row in ("task_failed", "dag_run_failed"):
        until(lambda row=row: site.job_state(runs[row]) == "canceled", 60, f"cancelled job of {row}")
    for row in ("task_failed", "task_success", "dag_run_failed"):
        until(lambda row=row: site.transfer(row).released, 60, f"freed ports of {row}")
        assert site.transfer(row).phase.value == "canceled"
    print(f"everything was gone {time.monotonic() - acted:.1f} s after the clicks")

    # A cleared task ends its old job and has one new one; the stream goes on.
    until(lambda: site.job_state(runs["task_cleared"]) == "canceled", 60, "cancelled job of the cleared task")
    until(lambda: site.job("task_cleared") != runs["task_cleared"] and site.waiting("task_cleared"), 90, "the new job")
    until(lambda: site.triggers("task_cleared", "analyse", attempt=2), 30, "the trigger of the new job")
    assert site.job_state(site.job("task_cleared")) == "active"
    assert not site.transfer("task_cleared").phase.final
    for row in ("task_cleared", "task_success"):
        site.call("PATCH", f"/dagRuns/{row}", {"state": "failed"})
    until(lambda: site.transfer("task_cleared").released, 60, "freed ports of task_cleared")
    until(lambda: site.job_state(runs["task_success"]) == "canceled", 60, "cancelled job of task_success")
    # The cleared task may have started a second job; killing the run has to reach that one, too.
    until(lambda: site.active_jobs() == {runs["airflow_gone"]}, 60, "end of every job but the last run's")


def test_without_airflow_the_lease_ends_the_transfer(
    site: Site, runs: dict[str, str], until: Callable[..., float]
) -> None:
    transfer = site.transfer("airflow_gone")
    # While somebody waits the lease is renewed.
    until(lambda: site.transfer("airflow_gone").lease_expires > transfer.lease_expires + 2, 30, "a renewed lease")
    for child in site.children._running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
    with site.facility.transfers() as api:
        took = until(lambda: api.info(transfer.id).released, LEASE_S + 30, "a transfer that has ended by itself")
        assert api.info(transfer.id).phase.value == "expired"
    print(f"the transfer was gone {took:.1f} s after Airflow was")
    # Its job was not the transfer's: it ends with its own walltime, or by whoever runs it.
    with site.facility.jobs() as client:
        client.cancel(runs["airflow_gone"])
    until(lambda: not site.facility.running(), 30, f"end of all jobs: {site.facility.running()}")
