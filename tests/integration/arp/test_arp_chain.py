from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lclstream.elog.client import ElogClient
from lclstream.security.http import client

pytestmark = pytest.mark.integration


@pytest.fixture
def arp_port(free_port: Callable[[], int]) -> int:
    return free_port()


@pytest.fixture
def logbook(
    start: Any, broker: Any, sites: Any, tmp_path: Path, free_port: Callable[[], int], arp_port: int
) -> Iterator[ElogClient]:
    port = free_port()
    config = {
        "port": port,
        "credentials": str(sites["s3df"].member("elog").folder),
        "database": f"sqlite:///{tmp_path}/elog.sqlite",
        "kafka": {"bootstrap_servers": broker.bootstrap_servers},
        "locations": {"s3df": {"jid_prefix": f"https://127.0.0.1:{arp_port}"}, "olcf": {}},
    }
    path = tmp_path / "elog.yaml"
    path.write_text(yaml.safe_dump(config))
    child = start(sys.executable, "-m", "lclstream.elog.cli", "--config", str(path), name="elog")
    child.wait_for_output("listening at", 60)
    with ElogClient(f"https://127.0.0.1:{port}", sites["s3df"].member("alice")) as client:
        yield client


def definition(name: str, trigger: str, **changes: Any) -> dict[str, Any]:
    fields = {
        "name": name,
        "executable": f"airflow:{name}",
        "trigger": trigger,
        "location": "s3df",
        "parameters": '{"stream_config": "/x.yaml"}',
    }
    return fields | changes


def test_every_trigger_of_the_logbook_starts_its_dag_once(
    logbook: ElogClient, start_arp: Any, airflow: Any, wait_until: Any, topics: Any
) -> None:
    experiment = "mfx1"
    parameter = {"run_param_name": "A.B", "run_param_value": "9.50"}
    for entry in (
        definition("on_start", "START_OF_RUN"),
        definition("on_end", "END_OF_RUN"),
        definition("on_parameter", "RUN_PARAM_IS_VALUE", **parameter),
        definition("on_first", "FIRST_FILE_TRANSFERRED"),
        definition("on_all", "ALL_FILES_TRANSFERRED"),
        definition("on_detectors", "ALL_NONREC_FILES_TRANSFERRED"),
        definition("by_hand", "MANUAL"),
        definition("elsewhere", "START_OF_RUN", location="olcf"),
        definition("script", "START_OF_RUN", executable="/bin/true"),
    ):
        logbook.create_update_workflow_def(experiment, entry)
    start_arp(definitions={"elog": logbook.base_url, "file": None}, jobs={"show": False})

    def made() -> list[str]:
        return [name.split("__")[3] for name in airflow.ids()]

    logbook.start_run(experiment, params={"gas": 1})
    wait_until(lambda: made() == ["on_start"], 60, "DAG run of the start")
    logbook.add_run_params(experiment, {"A.B": 9.5})
    wait_until(lambda: made()[1:] == ["on_parameter"], 60, "DAG run of the parameter")
    for path in ("/r1-s00.xtc2", "/r1-s80-c000.xtc2"):
        logbook.register_file(experiment, path)
    logbook.file_available_at_location(experiment, 1, "/r1-s00.xtc2", "s3df")
    wait_until(lambda: made()[2:] == ["on_first"], 60, "DAG run of the first file")
    logbook.end_run(experiment)
    wait_until(lambda: sorted(made()[3:]) == ["on_detectors", "on_end"], 60, "DAG runs of the end")
    logbook.add_run_params(experiment, {"after": "the end"})
    logbook.file_available_at_location(experiment, 1, "/r1-s80-c000.xtc2", "s3df")
    wait_until(lambda: made()[5:] == ["on_all"], 60, "DAG run of all files")
    job = logbook.create_workflow_job(experiment, "by_hand", 1)
    wait_until(lambda: made()[6:] == ["by_hand"], 60, "DAG run by hand")
    conf = airflow.conf(f"mfx1__r0001__manual__by_hand__{job.id}")
    assert (conf["user"], conf["job_id"], conf["run_document"]["num"]) == ("alice", job.id, 1)
    assert conf["parameters"] == {"stream_config": "/x.yaml"}
    assert airflow.conf("mfx1__r0001__start_of_run__on_start")["user"] == "alice"


@pytest.mark.parametrize("step", ["after it made the job", "while Airflow is asked", "after Airflow made it"])
def test_killed_at_any_step_there_is_one_dag_run_and_one_job_in_the_logbook(
    logbook: ElogClient, start_arp: Any, airflow: Any, wait_until: Any, topics: Any, step: str
) -> None:
    logbook.create_update_workflow_def("mfx1", definition("on_start", "START_OF_RUN"))
    settings: dict[str, Any] = {"definitions": {"elog": logbook.base_url, "file": None}, "jobs": {"every_s": 0.2}}
    child = start_arp(**settings)

    def kill(_: str) -> None:
        child.signal(signal.SIGKILL)
        child.wait(60)

    if step == "after it made the job":
        airflow.stop()
        logbook.start_run("mfx1")
        wait_until(lambda: logbook.workflow_jobs("mfx1"), 60, "job in the logbook")
        kill("")
        airflow.start()
    else:
        setattr(airflow, "on_asked" if step == "while Airflow is asked" else "on_made", kill)
        logbook.start_run("mfx1")
        child.wait(60)
    airflow.on_asked = airflow.on_made = None
    start_arp(**settings)
    wait_until(lambda: topics.committed("arp") == 1, 60, "commit")
    assert airflow.ids() == ["mfx1__r0001__start_of_run__on_start"]
    (job,) = logbook.workflow_jobs("mfx1")
    assert airflow.conf(airflow.ids()[0])["job_id"] == job.id


def test_a_dag_run_is_watched_and_killed_in_the_logbook(
    logbook: ElogClient, start_arp: Any, airflow: Any, wait_until: Any, arp_port: int, topics: Any
) -> None:
    logbook.create_update_workflow_def("mfx1", definition("on_start", "START_OF_RUN"))
    logbook.create_update_workflow_def("mfx1", definition("by_hand", "MANUAL"))
    child = start_arp(
        definitions={"elog": logbook.base_url, "file": None}, jobs={"every_s": 0.2}, status={"port": arp_port}
    )
    logbook.start_run("mfx1")
    logbook.create_workflow_job("mfx1", "by_hand", 1)
    wait_until(lambda: len(airflow.ids()) == 2, 60, "two DAG runs")

    def shown() -> dict[str, str]:
        return {str(job.def_id and job.definition and job.definition.name): job.status for job in jobs()}

    def jobs() -> list[Any]:
        return logbook.workflow_jobs("mfx1")

    wait_until(lambda: shown() == {"on_start": "SUBMITTED", "by_hand": "SUBMITTED"}, 60, "both submitted")
    for name in airflow.ids():
        airflow.set_state(name, "running", ["success", "running", None])
    wait_until(lambda: set(shown().values()) == {"RUNNING"}, 60, "both running")
    wait_until(lambda: all(job.counters for job in jobs()), 60, "counters")
    by_name = {job.definition.name: job for job in jobs()}
    assert by_name["on_start"].counters[0].value == "1 of 3 done, 1 running, 1 waiting"
    assert by_name["on_start"].tool_id == "mfx1__r0001__start_of_run__on_start"
    assert (by_name["on_start"].user, by_name["by_hand"].user) == ("arp", "alice")
    for job in by_name.values():
        assert logbook.kill_workflow_job("mfx1", job.id).status == "EXITED"
    assert [entry["state"] for entry in airflow.dag_runs.values()] == ["failed", "failed"]
    child.wait_for_output("killed from the logbook by elog", 60)
    assert len(airflow.ids()) == 2
    # The follower has seen the failed DAG runs by now, and leaves the word that says why.
    airflow.set_state("mfx1__r0001__start_of_run__on_start", "failed", ["failed"])
    wait_until(lambda: any("0 of 1 done" in str(job.counters) for job in jobs()), 60, "last counters")
    assert set(shown().values()) == {"EXITED"}


def test_jobs_that_the_group_shows_are_no_requests_whether_or_not_this_one_shows_any(
    logbook: ElogClient, start_arp: Any, airflow: Any, sites: Any, wait_until: Any
) -> None:
    logbook.create_update_workflow_def("mfx1", definition("on_start", "START_OF_RUN"))
    logbook.start_run("mfx1")
    for login in ("arp", "arp2"):
        with ElogClient(logbook.base_url, sites["s3df"].member(login)) as member:
            member.create_workflow_job("mfx1", "on_start", 1)
    asked = logbook.create_workflow_job("mfx1", "on_start", 1)
    start_arp(
        definitions={"elog": logbook.base_url, "file": None},
        jobs={"show": False, "logins": ["arp2"]},
        kafka={"topics": ["workflow_jobs"]},
    )
    wait_until(airflow.ids, 60, "DAG run")
    assert airflow.ids() == [f"mfx1__r0001__manual__on_start__{asked.id}"]


def test_only_the_logbook_may_kill(
    logbook: ElogClient, start_arp: Any, airflow: Any, sites: Any, arp_port: int, wait_until: Any
) -> None:
    logbook.create_update_workflow_def("mfx1", definition("on_start", "START_OF_RUN"))
    start_arp(definitions={"elog": logbook.base_url, "file": None}, status={"port": arp_port})
    logbook.start_run("mfx1")
    wait_until(lambda: logbook.workflow_jobs("mfx1"), 60, "job")
    job = logbook.workflow_jobs("mfx1")[0].document()
    with client(f"https://127.0.0.1:{arp_port}", sites["s3df"].member("mallory")) as http:
        answer = http.post("/jid/ws/mfx1/kill_job", json=job)
    assert answer.status_code == 403
    wait_until(lambda: len(airflow.ids()) == 1, 60, "DAG run")
    assert [entry["state"] for entry in airflow.dag_runs.values()] == ["queued"]
