"""Airflow's four parts and every service its tasks drive, on loopback: for figures and tests that need them all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferInfo
from lclstream.demo.airflow import PARTS, Airflow
from lclstream.demo.processes import START_S, Children
from lclstream.demo.services import Services
from lclstream.demo.workspace import Workspace
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import Transition

TRIGGERER = "airflow-triggerer"
_PORT = re.compile(r"[:=](\d{5})\b")


class AirflowSite:
    """What runs, and what is asked of it.

    Args:
        workspace: files of all parts.
        children: all processes.
        services: the services and Airflow.
    """

    def __init__(self, workspace: Workspace, children: Children, services: Services) -> None:
        self.workspace = workspace
        self.children = children
        self.services = services
        self.airflow: Airflow = services.airflow

    def transfers(self) -> TransferClient:
        """A client of the transfer service, with Airflow's identity."""
        return TransferClient(self.services.api_url, self.services.airflow_credentials)

    def jobs(self) -> JobClient:
        """A client of the analysis' job service, with Airflow's identity."""
        return JobClient(self.services.olcf_jobs_url, self.services.airflow_credentials)

    # What people do in the user interface

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any] | None = None) -> None:
        """Start a DAG run."""
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf or {})}
        self.airflow.call("POST", f"/dags/{dag_id}/dagRuns", body)

    def mark_task(self, dag_id: str, run_id: str, task_id: str, state: str) -> None:
        """Mark a task ``failed`` or ``success``."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        self.airflow.call("PATCH", path, {"new_state": state})

    def clear_task(self, dag_id: str, run_id: str, task_id: str) -> None:
        """Clear a task."""
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": [task_id], "only_failed": False}
        self.airflow.call("POST", f"/dags/{dag_id}/clearTaskInstances", body)

    def fail_run(self, dag_id: str, run_id: str) -> None:
        """Mark a DAG run failed."""
        self.airflow.call("PATCH", f"/dags/{dag_id}/dagRuns/{run_id}", {"state": "failed"})

    # What happens to machines

    def pause(self, part: str) -> None:
        """Keep a part and what it forked from running."""
        self._signal(part, signal.SIGSTOP)

    def resume(self, part: str) -> None:
        """Let it run again."""
        self._signal(part, signal.SIGCONT)

    def _signal(self, part: str, number: int) -> None:
        process = psutil.Process(self.children.find(part).process.pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    def kill_airflow(self) -> None:
        """End all of Airflow with SIGKILL."""
        for part in PARTS:
            self.children.kill(part)

    # What is there

    def triggers(self, dag_id: str, run_id: str, task_id: str) -> int:
        """How many triggers have begun to wait for a task, in all of its tries."""
        pattern = f"dag_id={dag_id}/run_id={run_id}/task_id={task_id}/attempt=*.log.trigger*"
        return len(list(self.airflow.logs.glob(pattern)))

    def task(self, dag_id: str, run_id: str, task_id: str) -> dict[str, Any]:
        """A task's state, try number, process id …; empty when Airflow does not answer now."""
        answer: dict[str, Any] | None = self.airflow.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}")
        return answer or {}

    def transfer(self, number: int) -> TransferInfo:
        """A transfer."""
        with self.transfers() as client:
            return client.info(number)

    def job_history(self, job_id: str) -> list[Transition]:
        """The states a job has reached, oldest first."""
        with self.jobs() as client:
            return client.history(job_id)

    def transfer_folders(self, number: int) -> list[Path]:
        """Folders of a transfer's jobs: buffers and engine."""
        found = []
        # A job whose folder is being made has a hidden one.
        for spec in (self.workspace / "jobs/s3df").glob("[!.]*/spec.json"):
            if json.loads(spec.read_text()).get("name", "").startswith(f"transfer-{number}-"):
                found.append(spec.parent)
        return found

    def job_folder(self, job_id: str) -> Path:
        """Folder of a job of the analysis."""
        return self.workspace / "jobs/olcf" / job_id

    def processes(self) -> list[str]:
        """All processes on this machine but ours, each as its folder and command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid():
                    found.append(" ".join([process.cwd(), *process.cmdline()]))
        return found

    def open_ports(self, *folders: Path) -> list[int]:
        """Ports of buffers that somebody listens at."""
        known = {int(port) for folder in folders for port in _PORT.findall(json.loads(_spec(folder))["script"])}
        return sorted(port for port in known if _listened_at(port))


def _spec(folder: Path) -> str:
    return (folder / "spec.json").read_text()


def _listened_at(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def airflow_site(
    folder: Path, *, knows: str, environment: Mapping[str, str], transfers: int = 4, kafka: str | None = None
) -> Iterator[AirflowSite]:
    """Start everything; end everything afterwards.

    Args:
        folder: where all files go.
        knows: Airflow is ready when it has read this DAG.
        environment: variables of all processes, such as Airflow's settings.
        transfers: how many transfers there can be at a time.
        kafka: ``HOST:PORT`` of a broker; None: the embedded one.

    Raises:
        DemoError: a part does not start, or something was left behind at the end.
    """
    workspace = Workspace(folder)
    children = Children(workspace.logs, environment)
    services = Services(workspace, children, ranks=1, transfers=transfers, capacity="8MiB")
    left: list[str] = []
    try:
        services.start(kafka)
        services.airflow.start(children)
        children.wait_until(services.ready, timeout=START_S, what="the services answer")
        children.wait_until(lambda: services.airflow.ready(knows), timeout=START_S, what="Airflow is ready", every=0.5)
        yield AirflowSite(workspace, children, services)
    finally:
        services.close()
        # Airflow's own parts now and then take longer to end than they are given, which is no leak of ours.
        left = [text for text in children.stop() if not text.startswith("airflow-")]
        workspace.release()
    if left:
        raise RuntimeError(f"left behind, and ended by force: {'; '.join(left)}")


def wait_for(condition: Callable[[], object], timeout: float, what: str, every: float = 0.25) -> None:
    """Poll a condition.

    Raises:
        TimeoutError: it did not hold in time.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(every)
