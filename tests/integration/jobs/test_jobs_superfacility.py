"""Jobs of a real Slurm by the Superfacility stand-in and its published client, and by Airflow's operators."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import airflow.settings
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

pytest.importorskip("lclstream.superfacility.client", reason="needs pip install 'lclstream[superfacility]'")

from lclstream.superfacility.client import FacilityJob, SuperfacilityClient

# By a thread: reading a DAG file switches off the alarm that the other method needs.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(400, method="thread")]

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "airflow_two_centres.py"


@pytest.fixture(scope="module")
def nersc(slurm: Path, make_superfacility: Callable[..., Any]) -> Iterator[Any]:
    machine = {
        "type": "slurm", "poll_s": 0.3, "kill_grace_s": 1, "allow_attributes": ["--partition", "--nice"],
    }  # fmt: skip
    service = make_superfacility(machine, {"SLURM_CONF": str(slurm)}, ignore_options=["--account", "--constraint"])
    service.home.mkdir(parents=True, exist_ok=True)
    yield service
    # Before its cluster.
    assert service.stop() == 0, service.child.output()[-4000:]


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


@pytest.fixture
def run_dag(
    slurm: Path, make_service: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, str, dict[str, Any]], dict[str, Any]]:
    """``run_dag(text, "my_dag", conf)`` runs a DAG; `psik_default` is a connection to a job service on the cluster."""
    jobs = make_service(f"for-{tmp_path.name}")
    jobs.settings["backends"] = {
        "default": {"type": "slurm", "poll_s": 0.3, "kill_grace_s": 1, "allow_attributes": ["--partition", "--nodes"]}
    }
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    jobs.start()
    extra = {"credentials": str(jobs.credentials("airflow").folder)}
    document = {"conn_type": "psik", "host": "127.0.0.1", "port": jobs.port, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_PSIK_DEFAULT", json.dumps(document))
    # `dag.test` writes down a DAG of this folder only; other tests have another one.
    monkeypatch.setattr(airflow.settings, "DAGS_FOLDER", str(tmp_path))

    def run(text: str, dag_id: str, conf: dict[str, Any]) -> dict[str, Any]:
        initdb()
        file = tmp_path / f"{dag_id}.py"
        file.write_text(text)
        bag = DagBag(dag_folder=str(file))
        assert bag.import_errors == {}
        dag_run = bag.dags[dag_id].test(logical_date=None, run_conf=conf)
        return {task.task_id: task for task in dag_run.get_task_instances()}

    return run


def test_a_dag_reduces_at_two_centres(nersc: Any, run_dag: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"conn_type": "superfacility", "host": nersc.url, "extra": {"key_file": str(nersc.key)}}
    monkeypatch.setenv("AIRFLOW_CONN_SUPERFACILITY_DEFAULT", json.dumps(document))
    # The example asks the facility every ten seconds, as one should.
    text = EXAMPLE.read_text().replace("poll_interval=10,", "poll_interval=0.5,")
    tasks = run_dag(text, "two_centres", {"folder": str(nersc.home), "run": 42})
    assert {name: str(task.state) for name, task in tasks.items()} == {"at_nersc": "success", "at_slac": "success"}
    for name, task in tasks.items():
        assert task.xcom_pull(task_ids=name, key="result") == {"run": 42}
    # Airflow's own reader of XComs takes a text of digits for a number.
    number = str(tasks["at_nersc"].xcom_pull(task_ids="at_nersc", key="job_id"))
    assert state(nersc, number).state == "COMPLETED"


LUTE = """
from datetime import datetime
from airflow import DAG
from lclstream_airflow.operators.jid import JIDSlurmOperator

dag = DAG(dag_id="lute_test", start_date=datetime(2024, 9, 3), schedule=None, description="as they are written")
producer = JIDSlurmOperator(require_partition="debug", task_id="Producer", dag=dag)
analyzer = JIDSlurmOperator(max_cores=1, max_nodes=1, require_partition="debug", task_id="Analyzer", dag=dag)
producer >> analyzer
"""


def test_a_dag_for_the_job_interface_runs_on_the_cluster(run_dag: Callable[..., Any], tmp_path: Path) -> None:
    submit = tmp_path / "lute" / "launch_scripts" / "submit_slurm.sh"
    submit.parent.mkdir(parents=True)
    submit.write_text('#!/bin/bash\nSLURM_ARGS=$@\nsbatch $SLURM_ARGS --wrap "echo $2 with \\$SLURM_NTASKS at $PWD"\n')
    submit.chmod(0o755)
    conf = {
        "experiment": "mfxl1234", "run_id": "7", "user": "ada", "lute_location": str(tmp_path / "lute"),
        "lute_params": {"config_file": "/conf.yaml", "debug": False},
        "slurm_params": ["--ntasks=2", "--partition=elsewhere", "--time=5"], "Authorization": "Bearer s3cr3t",
    }  # fmt: skip
    tasks = run_dag(LUTE, "lute_test", conf)
    assert {name: str(task.state) for name, task in tasks.items()} == {"Producer": "success", "Analyzer": "success"}
    logs = {name: task.xcom_pull(task_ids=name, key="log") for name, task in tasks.items()}
    assert "Producer with 2 at" in logs["Producer"]
    assert "Analyzer with 1 at" in logs["Analyzer"]
