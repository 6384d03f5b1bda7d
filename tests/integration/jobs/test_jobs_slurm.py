"""Jobs of a real Slurm: states from the scheduler, whatever happens to it, to the service or to the answers between."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lclstream.jobs.models import JobSpec, JobState, ResourceSpec
from lclstream.security.errors import ServiceError

pytestmark = pytest.mark.integration

SHARED = ResourceSpec(duration=5, exclusive_node_use=False)


def states(history: list[Any]) -> list[str]:
    return [f"{line.jobndx}:{line.state.value}" for line in history]


COMPLETE = ["0:new", "1:queued", "1:active", "1:completed"]


@pytest.fixture(scope="module")
def cluster(slurm: Path, sites: Any, make_service: Callable[[str], Any]) -> Iterator[Any]:
    """A service with Slurm's commands behind wrappers, so that a test can cut the way to the scheduler."""
    service = make_service("slurm")
    wrappers = service.folder / "bin"
    wrappers.mkdir()
    for name in ("squeue", "sbatch"):
        real = shutil.which(name)
        flag = service.folder / name
        wrapper = wrappers / name
        wrapper.write_text(
            "#!/bin/sh\n"
            f'if [ -e "{flag}-is-away" ]; then\n'
            f'  echo "{name}: error: Unable to contact slurm controller (connect failure)" >&2; exit 1\nfi\n'
            f'if [ -e "{flag}-forgets" ]; then echo \'{{"jobs": [], "errors": []}}\'; exit; fi\n'
            f'if [ -e "{flag}-answer-is-lost" ]; then\n'
            f'  rm "{flag}-answer-is-lost"; "{real}" "$@" >/dev/null; exec sleep 60\nfi\n'
            f'exec "{real}" "$@"\n'
        )
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    service.settings["backends"] = {
        "default": {
            "type": "slurm",
            "poll_s": 0.3,
            "kill_grace_s": 1,
            "command_timeout_s": 3,
            "allow_attributes": ["--partition", "--nice"],
        }
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm))
        patch.setenv("PATH", f"{wrappers}:{os.environ['PATH']}")
        service.start()
        yield service


def test_a_job_runs_on_the_cluster(cluster: Any, until_final: Any) -> None:
    client = cluster.client()
    script = 'echo "$jobndx|$nodes|$mpirun|$COLOUR"; [ "$jobid" = "$SLURM_JOB_ID" ] && $mpirun /bin/true && echo ran'
    jobid = client.submit(
        JobSpec(
            name="on slurm", script=script, environment={"COLOUR": "blue"}, inherit_environment=False, resources=SHARED
        )
    )
    history = until_final(client, jobid)
    assert states(history) == COMPLETE
    assert client.logs(jobid)["stdout.1"] == "1|1|srun|blue\nran\n"
    assert history[1].info.isdigit()
    assert client.backends()["default"].system_type == "slurm"


def test_many_jobs_have_complete_ordered_histories_soon(cluster: Any, until_final: Any) -> None:
    client = cluster.client()
    jobs = [client.submit(JobSpec(script=f"exit {n % 2 * 7}", resources=SHARED)) for n in range(12)]
    for number, jobid in enumerate(jobs):
        history = until_final(client, jobid, 90)
        assert states(history) == [*COMPLETE[:3], "1:failed" if number % 2 else "1:completed"]
        assert history[-1].info == str(number % 2 * 7)
        times = [line.time for line in history]
        assert times == sorted(times)


def test_a_rejected_submission_is_failed_with_sbatchs_words(cluster: Any, until_final: Any) -> None:
    client = cluster.client()
    jobid = client.submit(JobSpec(script="true", attributes={"--partition": "nowhere"}, resources=SHARED))
    history = until_final(client, jobid)
    assert states(history) == ["0:new", "0:failed"]
    assert "invalid partition specified: nowhere" in history[-1].info


def test_attributes_outside_the_allow_list_are_refused(cluster: Any) -> None:
    for name in ("--uid", "--wrap", "-D", "partition", "--qos"):
        with pytest.raises(ServiceError, match=r"403.*--nice, --partition"):
            cluster.client().submit({"script": "true", "attributes": {name: "0"}})


def test_a_waiting_job_is_cancelled(cluster: Any, until_final: Any, until_state: Any) -> None:
    client = cluster.client()
    jobid = client.submit(JobSpec(script="true", resources=ResourceSpec(node_count=3, exclusive_node_use=False)))
    until_state(client, jobid, JobState.queued)
    client.cancel(jobid)
    assert states(until_final(client, jobid)) == ["0:new", "1:queued", "1:canceled"]


def test_a_running_job_is_cancelled_with_all_its_processes(
    cluster: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = cluster.client()
    script = "trap 'echo cleaned; exit' TERM; echo ready; sleep 300 & wait"
    jobid = client.submit(JobSpec(script=script, resources=SHARED))
    until_state(client, jobid, JobState.active)
    wait_until(lambda: client.logs(jobid).get("stdout.1") == "ready\n", 60, "first words")
    client.cancel(jobid)
    assert states(until_final(client, jobid)) == [*COMPLETE[:3], "1:canceled"]
    wait_until(lambda: cluster.processes() == [], 60, "end of all processes")
    assert client.logs(jobid)["stdout.1"] == "ready\ncleaned\n"


def test_a_job_ends_with_its_duration(cluster: Any, until_final: Any) -> None:
    client = cluster.client()
    resources = ResourceSpec(duration=0.02, exclusive_node_use=False)
    history = until_final(client, client.submit(JobSpec(script="sleep 300", resources=resources)))
    assert states(history) == [*COMPLETE[:3], "1:failed"]
    assert history[-1].info == "duration of 0.02 min exceeded"


def test_jobs_survive_a_killed_service(cluster: Any, until_final: Any, until_state: Any) -> None:
    client = cluster.client()
    jobid = client.submit(JobSpec(script="while [ ! -e $base/go ]; do sleep 0.1; done; exit 4", resources=SHARED))
    until_state(client, jobid, JobState.active)
    cluster.kill()
    (cluster.prefix / jobid / "go").touch()
    cluster.start()
    history = until_final(cluster.client(), jobid)
    assert states(history) == [*COMPLETE[:3], "1:failed"]
    assert history[-1].info == "4"


def test_a_job_is_unknown_and_not_finished_while_the_scheduler_does_not_answer(
    cluster: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = cluster.client()
    jobid = client.submit(JobSpec(script="while [ ! -e $base/go ]; do sleep 0.1; done", resources=SHARED))
    until_state(client, jobid, JobState.active)
    (cluster.folder / "squeue-is-away").touch()
    (cluster.prefix / jobid / "go").touch()
    wait_until(lambda: cluster.child.output().count(f"{jobid}: squeue: squeue: error") >= 2, 60, "failed queries")
    assert client.state(jobid) is JobState.active
    backend = client.backends()["default"]
    assert backend.status == "unavailable"
    assert "Unable to contact slurm controller" in backend.notes[0]
    (cluster.folder / "squeue-is-away").unlink()
    assert states(until_final(client, jobid)) == COMPLETE
    assert client.backends()["default"].status == "active"


def test_a_submission_waits_for_a_scheduler_that_is_away(
    cluster: Any, until_final: Any, wait_until: Callable[..., None]
) -> None:
    client = cluster.client()
    (cluster.folder / "sbatch-is-away").touch()
    jobid = client.submit(JobSpec(script="true", resources=SHARED))
    wait_until(lambda: f"{jobid}: sbatch: sbatch: error" in cluster.child.output(), 60, "failed submission")
    assert client.state(jobid) is JobState.new
    (cluster.folder / "sbatch-is-away").unlink()
    assert states(until_final(client, jobid)) == COMPLETE


def test_a_submission_whose_answer_is_lost_is_found_and_not_doubled(cluster: Any, until_final: Any) -> None:
    client = cluster.client()
    (cluster.folder / "sbatch-answer-is-lost").touch()
    jobid = client.submit(JobSpec(script="echo x >> $base/count", resources=SHARED))
    history = until_final(client, jobid)
    assert states(history) == COMPLETE
    assert (cluster.prefix / jobid / "count").read_text() == "x\n"
    listed = subprocess.run(["squeue", "--json"], capture_output=True, text=True, check=True).stdout
    assert listed.replace("\\/", "/").count(f"lclstream:{cluster.prefix / jobid}") == 1


@pytest.mark.parametrize("script", ["exit 0", "exit 6"])
def test_a_job_squeue_has_forgotten_is_known_from_accounting_or_its_notes(
    cluster: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None], script: str
) -> None:
    client = cluster.client()
    jobid = client.submit(JobSpec(script=f"while [ ! -e $base/go ]; do sleep 0.1; done; {script}", resources=SHARED))
    until_state(client, jobid, JobState.active)
    cluster.kill()
    (cluster.prefix / jobid / "go").touch()
    wait_until(lambda: (cluster.prefix / jobid / "control" / "1" / "exit.json").exists(), 60, "end of the script")
    (cluster.folder / "squeue-forgets").touch()
    cluster.start()
    try:
        history = until_final(cluster.client(), jobid)
    finally:
        (cluster.folder / "squeue-forgets").unlink()
    code = script.split()[1]
    assert states(history) == [*COMPLETE[:3], "1:completed" if code == "0" else "1:failed"]
    assert history[-1].info == code


@pytest.mark.timeout(400)
def test_a_requeued_job_begins_another_attempt(
    cluster: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = cluster.client()
    jobid = client.submit(
        JobSpec(script="[ $jobndx = 2 ] && exit 0; echo first; sleep 300", resources=SHARED, attributes={"--nice": "0"})
    )
    until_state(client, jobid, JobState.active)
    wait_until(lambda: client.logs(jobid).get("stdout.1") == "first\n", 60, "first words")
    native_id = client.history(jobid)[1].info
    subprocess.run(["scontrol", "requeue", native_id], check=True)
    wait_until(lambda: client.history(jobid)[-1].jobndx == 2, 60, "second attempt")
    # Slurm lets a requeued job wait for two minutes; its operator may start it sooner, but not within the second in
    # which the first attempt's credential was revoked.
    time.sleep(2.0)
    subprocess.run(["scontrol", "update", f"jobid={native_id}", "starttime=now"], check=False, capture_output=True)
    history = until_final(client, jobid, 200)
    assert states(history) == [*COMPLETE[:3], "2:queued", "2:active", "2:completed"]
    assert "first" in client.logs(jobid)["stdout.1"]
    assert "stdout.2" in client.logs(jobid)


@pytest.mark.timeout(400)
def test_a_node_that_fails_puts_its_job_back_and_another_attempt_begins(
    cluster: Any, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    client = cluster.client()
    jobid = client.submit(JobSpec(script="[ $jobndx = 2 ] && exit 0; echo first; sleep 300", resources=SHARED))
    until_state(client, jobid, JobState.active)
    wait_until(lambda: client.logs(jobid).get("stdout.1") == "first\n", 60, "first words")
    native_id = client.history(jobid)[1].info
    node = subprocess.run(["sinfo", "-h", "-o", "%n"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    try:
        wait_until(lambda: client.history(jobid)[-1].jobndx == 2, 60, "second attempt")
        assert states(client.history(jobid)) == [*COMPLETE[:3], "2:queued"]
    finally:
        # It may have come back by itself.
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, capture_output=True)
    time.sleep(2.0)  # as above
    subprocess.run(["scontrol", "update", f"jobid={native_id}", "starttime=now"], check=False, capture_output=True)
    assert states(until_final(client, jobid, 200)) == [*COMPLETE[:3], "2:queued", "2:active", "2:completed"]


def test_the_clusters_daemons_listen_on_the_loopback_address_only(slurm: Path) -> None:
    for name in ("slurmctld", "slurmd"):
        process = psutil.Process(int((slurm.parent / f"{name}.pid").read_text()))
        sockets = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert sockets
        assert {one.laddr.ip for one in sockets} == {"127.0.0.1"}


_STARTER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import slurm_site
cluster = slurm_site.Slurm().__enter__()
cluster.command("sbatch", "--output=/dev/null", "--wrap", "exec sleep 301")
print(cluster.folder, flush=True)
time.sleep(300)
"""


def test_a_cluster_whose_starter_is_killed_ends_by_itself(slurm: Path, wait_until: Callable[..., None]) -> None:
    benchmarks = Path(__file__).resolve().parents[3] / "benchmarks"
    starter = subprocess.Popen(
        [sys.executable, "-c", _STARTER, str(benchmarks)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert starter.stdout is not None
    with starter.stdout:
        folder = Path(starter.stdout.readline().strip())
    pids = [int((folder / f"{name}.pid").read_text()) for name in ("slurmctld", "slurmd", "munged")]
    starter.kill()
    starter.wait(10)
    wait_until(lambda: not folder.exists(), 90, "end of the cluster")
    # Whose parent is gone exists until the machine's first process has seen its end.
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 60, "end of its daemons")
