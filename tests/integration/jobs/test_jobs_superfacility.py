"""Jobs of a real Slurm by the Superfacility stand-in and its published client, and by Airflow's operators."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lclstream.superfacility.client", reason="needs pip install 'lclstream[superfacility]'")

from lclstream.superfacility.client import FacilityJob, SuperfacilityClient

# By a thread: reading a DAG file switches off the alarm that the other method needs.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(180, method="thread")]

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "airflow_two_centres.py"


@pytest.fixture(scope="module")
def nersc(slurm: Path, make_superfacility: Callable[..., Any]) -> Any:
    machine = {
        "type": "slurm", "poll_s": 0.3, "kill_grace_s": 1, "allow_attributes": ["--partition", "--nice"],
    }  # fmt: skip
    service = make_superfacility(machine, {"SLURM_CONF": str(slurm)}, ignore_options=["--account", "--constraint"])
    service.home.mkdir(parents=True, exist_ok=True)
    return service


def ask(service: Any, work: Callable[[SuperfacilityClient], Any]) -> Any:
    async def run() -> Any:
        async with SuperfacilityClient(service.api_url, service.token_url, service.key) as client:
            return await work(client)

    return asyncio.run(run())


def submit(service: Any, body: str, *options: str) -> str:
    lines = ["#!/bin/bash", f"#SBATCH --chdir={service.home}", *(f"#SBATCH {one}" for one in options), body, ""]
    return str(ask(service, lambda client: client.submit("perlmutter", "\n".join(lines))))


def state(service: Any, number: str) -> FacilityJob:
    job: FacilityJob = ask(service, lambda client: client.job("perlmutter", number))
    return job


def test_a_jobs_number_is_the_clusters_own(nersc: Any, slurm: Path, wait_until: Callable[..., None]) -> None:
    # Options of the machine it stands for mean nothing here, and are ignored as configured.
    number = submit(nersc, "echo $SLURM_JOB_ID; sleep 300", "-A m1234", "--constraint=gpu", "-J ours -t 5")
    wait_until(lambda: state(nersc, number).state == "RUNNING", 60, "start of the job")
    shown = subprocess.run(
        ["squeue", "-h", "-j", number, "-o", "%j %T"], env={"SLURM_CONF": str(slurm), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == "ours RUNNING"
    ask(nersc, lambda client: client.cancel("perlmutter", number))
    wait_until(lambda: state(nersc, number).state == "CANCELLED", 60, "end of the job")
    assert (nersc.home / f"slurm-{number}.out").read_text().startswith(f"{number}\n")


def test_what_the_scheduler_refuses_is_said_in_its_words(nersc: Any) -> None:
    with pytest.raises(ConnectionError, match="invalid partition specified: nowhere"):
        submit(nersc, "true", "--partition=nowhere")
    with pytest.raises(ConnectionError, match="--qos: this backend does not allow it"):
        submit(nersc, "true", "--qos=debug")


def test_a_job_survives_the_restart_of_the_api(nersc: Any, wait_until: Callable[..., None]) -> None:
    number = submit(nersc, "while [ ! -e go ]; do sleep 0.2; done; exit 3", "-t 5")
    wait_until(lambda: state(nersc, number).state == "RUNNING", 60, "start of the job")
    assert nersc.child is not None
    nersc.child.process.kill()
    nersc.child.wait(20)
    nersc.start()
    assert state(nersc, number).state == "RUNNING"
    (nersc.home / "go").touch()
    wait_until(lambda: state(nersc, number).is_final, 60, "end of the job")
    assert (state(nersc, number).state, state(nersc, number).exit_code) == ("FAILED", "3:0")


def test_a_dag_reduces_at_two_centres(
    nersc: Any, slurm: Path, make_service: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = make_service("two-centres")
    jobs.settings["backends"] = {
        "default": {"type": "slurm", "poll_s": 0.3, "kill_grace_s": 1, "allow_attributes": ["--partition"]}
    }
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    jobs.start()
    for name, document in {
        "superfacility_default": {
            "conn_type": "superfacility", "host": nersc.url, "extra": {"key_file": str(nersc.key)},
        },
        "psik_default": {
            "conn_type": "psik", "host": "127.0.0.1", "port": jobs.port,
            "extra": {"credentials": str(jobs.credentials("airflow").folder)},
        },
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(document))
    dags = tmp_path / "dags"
    dags.mkdir()
    # The example asks the facility every ten seconds, as one should.
    (dags / EXAMPLE.name).write_text(EXAMPLE.read_text().replace("poll_interval=10,", "poll_interval=0.5,"))
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(dags))
    from airflow.dag_processing.dagbag import DagBag
    from airflow.utils.db import initdb

    initdb()
    dag = DagBag(dag_folder=str(dags / EXAMPLE.name)).dags["two_centres"]
    dag_run = dag.test(logical_date=None, run_conf={"folder": str(nersc.home), "run": 42})
    tasks = {task.task_id: task for task in dag_run.get_task_instances()}
    assert {name: str(task.state) for name, task in tasks.items()} == {"at_nersc": "success", "at_slac": "success"}
    for task in tasks.values():
        assert task.xcom_pull(task_ids=task.task_id, key="result") == {"run": 42}
    numbers = [task.xcom_pull(task_ids="at_nersc", key="job_id") for task in tasks.values()]
    assert state(nersc, numbers[0]).state == "COMPLETED"
