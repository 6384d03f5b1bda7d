"""Airflow's four parts on SQLite, and the few calls of its REST API that the demonstration needs.

`airflow standalone` would be one command instead of four, but it opens log servers on all interfaces at fixed ports,
and does not restart a part that dies.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from lclstream.demo.processes import START_S, Children, DemoError
from lclstream.demo.workspace import Workspace

_LOGIN = "admin"
#: Seconds a question to the API may take.
_TIMEOUT_S = 30.0
#: Name of a part among our children → its command.
PARTS = {
    "airflow-api-server": ["api-server"],
    "airflow-scheduler": ["scheduler", "--skip-serve-logs"],
    "airflow-triggerer": ["triggerer", "--skip-serve-logs"],
    "airflow-dag-processor": ["dag-processor"],
}


class Airflow:
    """Airflow in a folder of the demonstration.

    Args:
        workspace: where its database, settings and logs go.
        port: loopback port of its API server and user interface.
        connections: connection id → connection document (type, host, port, extra); no secrets.
    """

    def __init__(self, workspace: Workspace, port: int, connections: dict[str, dict[str, Any]]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.login = _LOGIN
        self.password_file = workspace.write_secret("airflow/password", secrets.token_urlsafe(12))
        self._home = workspace / "airflow"
        self._write_settings(workspace, port)
        self._environment = {
            "AIRFLOW_HOME": str(self._home),
            # The connections name folders of certificates; the keys in them stay there.
            **{f"AIRFLOW_CONN_{name.upper()}": json.dumps(document) for name, document in connections.items()},
        }
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT_S, trust_env=False)
        self._token: str | None = None

    def _write_settings(self, workspace: Workspace, port: int) -> None:
        dags = _dags_folder()
        passwords = workspace.write_secret(
            "airflow/passwords.json", json.dumps({_LOGIN: self.password_file.read_text()})
        )
        settings: dict[str, dict[str, object]] = {
            "core": {
                "dags_folder": dags,
                "load_examples": False,
                "executor": "LocalExecutor",
                "parallelism": 4,
                "dags_are_paused_at_creation": False,
                "simple_auth_manager_users": f"{_LOGIN}:admin",
                "simple_auth_manager_passwords_file": passwords,
                "execution_api_server_url": f"{self.url}/execution/",
                "fernet_key": "",
            },
            "database": {"sql_alchemy_conn": f"sqlite:///{self._home / 'airflow.db'}"},
            "api": {"host": "127.0.0.1", "port": port, "base_url": self.url, "workers": 1},
            "api_auth": {"jwt_secret": secrets.token_urlsafe(64)},
            "scheduler": {"scheduler_idle_sleep_time": 0.2, "enable_health_check": False},
            "dag_processor": {"refresh_interval": 5, "min_file_process_interval": 30},
            "logging": {"base_log_folder": self._home / "logs"},
            "usage_data_collection": {"enabled": False},
        }
        lines = []
        for section, options in settings.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {value}" for key, value in options.items()]
        workspace.write_secret("airflow/airflow.cfg", "\n".join(lines) + "\n")

    def start(self, children: Children) -> None:
        """Make the database and start the four parts; they are ready when :meth:`ready` says so."""
        airflow = [sys.executable, "-m", "airflow"]
        children.run("airflow-db", [*airflow, "db", "migrate"], timeout=START_S, environment=self._environment)
        for name in PARTS:
            self.start_part(children, name)

    def start_part(self, children: Children, name: str) -> None:
        """Start one of :data:`PARTS`, as whoever watches over them does after a crash."""
        children.start(name, [sys.executable, "-m", "airflow", *PARTS[name]], self._environment)

    def ready(self, dag_id: str) -> bool:
        """Whether all parts are healthy and the DAG has been read."""
        try:
            health = self._http.get("/api/v2/monitor/health")
            if health.status_code != 200:
                return False
            parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
            if any((health.json().get(part) or {}).get("status") != "healthy" for part in parts):
                return False
            return self._get(f"/api/v2/dags/{dag_id}") is not None
        except httpx.TransportError:
            return False

    @property
    def logs(self) -> Path:
        """Folder of the logs of tasks and triggers."""
        return self._home / "logs"

    def dag_run(self, dag_id: str, run_id: str) -> dict[str, Any] | None:
        """The DAG run, or None while there is none."""
        answer: dict[str, Any] | None = self._get(f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")
        return answer

    def tasks(self, dag_id: str, run_id: str) -> dict[str, str]:
        """Task id → state of a DAG run's tasks."""
        answer = self._get(f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances")
        return {task["task_id"]: task["state"] or "none" for task in (answer or {}).get("task_instances", [])}

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        """What a task has published under a key, or None."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        # Not with `deserialize`: it reads a text that looks like a number as one, and a job's id loses its last zero.
        answer = self._get(path)
        return None if answer is None else answer["value"]

    def task_log(self, run_id: str, task_id: str) -> Path | None:
        """The newest log file of a task."""
        files = list(self.logs.glob(f"dag_id=*/run_id={run_id}/task_id={task_id}/**/*.log"))
        return max(files, key=lambda path: path.stat().st_mtime, default=None)

    @staticmethod
    def errors_in(log: Path) -> list[str]:
        """What a task's log, a JSON object a line, says about its failure."""
        said: list[str] = []
        for line in log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("level") not in ("error", "critical"):
                continue
            details = entry.get("error_detail") or []
            said += [f"{detail.get('exc_type')}: {detail.get('exc_value')}" for detail in details[:1]] or [
                entry["event"]
            ]
        return said

    def call(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """A call of the API that changes something, below ``/api/v2``; its answer.

        Raises:
            DemoError: Airflow refuses it, or goes on answering 5xx.
        """
        for _ in range(20):
            answer = self._request(method, f"/api/v2{path}", body)
            # SQLite answers 500 now and then while several processes write.
            if answer is not None and answer.status_code < 500:
                break
            time.sleep(0.5)
        if answer is None or not answer.is_success:
            said = "no answer" if answer is None else f"{answer.status_code} {answer.text[:500]}"
            raise DemoError(f"Airflow refuses {method} {path}: {said}")
        return answer.json()

    def get(self, path: str) -> Any:
        """What the API has below ``/api/v2``; None for 404, and where SQLite stalls under load."""
        return self._get(f"/api/v2{path}")

    def close(self) -> None:
        """Close the connection to the API."""
        self._http.close()

    def _get(self, path: str) -> Any:
        """GET as a logged-in user; None for 404, and for the 500s and silence that SQLite causes under load."""
        try:
            answer = self._request("GET", path)
        except httpx.TransportError:
            return None
        return answer.json() if answer is not None and answer.status_code == 200 else None

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response | None:
        """A call as a logged-in user; None when there is no token, or no answer, to be had now."""
        try:
            return self._request_once(method, path, body)
        except httpx.TimeoutException:
            # The machine is busy: whoever waits for the answer asks again, as long as that has a bound of its own.
            return None

    def _request_once(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response | None:
        answer: httpx.Response | None = None
        for _ in range(2):
            if self._token is None:
                login = {"username": _LOGIN, "password": self.password_file.read_text()}
                token = self._http.post("/auth/token", json=login)
                if token.status_code not in (200, 201):
                    return None
                self._token = token.json()["access_token"]
            # What changes something is not sent twice: it gets the time it needs.
            answer = self._http.request(
                method,
                path,
                json=body,
                headers={"Authorization": f"Bearer {self._token}"},
                timeout=_TIMEOUT_S if method == "GET" else 4 * _TIMEOUT_S,
            )
            if answer.status_code != 401:
                break
            self._token = None
        return answer


def _dags_folder() -> Path:
    found = importlib.util.find_spec("lclstream_airflow")
    if found is None or not found.submodule_search_locations:
        raise DemoError("the package lclstream_airflow is not installed: run `make demo`")
    return (Path(next(iter(found.submodule_search_locations))) / "dags").resolve()
