"""A small server with the part of Airflow's REST interface that the run processor uses, for tests and benchmarks.

It answers as Airflow 3.3 does (200 for a DAG run made, 409 for one that exists, 201 for a token), and fails when told.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

from lclstream.demo.workspace import free_port_range

USERNAME, PASSWORD = "arp", "correct horse"

#: What to do with the next attempt to make a DAG run: answer with a status, or drop the connection ("drop", before the
#: DAG run is made; "made-then-drop", after).
Fault = int | str


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Callers are killed in the middle of a request: that is the purpose.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FakeAirflow:
    """The server; use it in a ``with``. A thread of its own serves each connection.

    Attributes:
        dag_runs: what was made: (DAG id, DAG run id) -> {"conf", "state", …}, in the order of creation.
        attempts: every attempt to make one, as (DAG id, DAG run id, status answered).
        faults: what happens to the next attempts.
        on_asked: called with the DAG run's id before it is made, or refused.
        on_made: called with the DAG run's id after it was made and before the answer.
        dags: ids of the DAGs there are; None: all.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.dag_runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.attempts: list[tuple[str, str, int]] = []
        self.faults: deque[Fault] = deque()
        self.on_asked: Callable[[str], None] | None = None
        self.on_made: Callable[[str], None] | None = None
        self.dags: set[str] | None = None
        self.password = PASSWORD
        self.tokens: list[str] = []
        self.token_requests = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body are two writes: together with delayed acknowledgements that costs 40 ms an answer.
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")
                parts = [unquote(part) for part in self.path.strip("/").split("/")]
                if parts == ["auth", "token"]:
                    self.reply(*fake._token(body))
                elif self.allowed() and parts[:3] == ["api", "v2", "dags"] and parts[4:] == ["dagRuns"]:
                    fake._make(self, parts[3], body)

            def do_GET(self) -> None:
                if self.allowed():
                    path, _, query = self.path.partition("?")
                    parts = [unquote(part) for part in path.strip("/").split("/")]
                    if parts[3:] == ["~", "dagRuns"]:
                        self.reply(*fake._changed(parse_qs(query)))
                    elif parts[6:] == ["taskInstances"]:
                        self.reply(*fake._tasks(parts[3], parts[5]))
                    else:
                        self.reply(*fake._read(parts[3], parts[5]))

            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.allowed():
                    parts = [unquote(part) for part in self.path.strip("/").split("/")]
                    with fake.lock:
                        known = fake.dag_runs.get((parts[3], parts[5]))
                        if known is not None:
                            known |= body
                            known["updated"] = time.time()
                    self.reply(*fake._read(parts[3], parts[5]))

            def allowed(self) -> bool:
                given = self.headers.get("authorization", "").removeprefix("Bearer ")
                if given not in fake.tokens:
                    self.reply(401, {"detail": "Invalid JWT token"})
                    return False
                return True

            def reply(self, status: int, document: Any) -> None:
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def drop(self) -> None:
                self.close_connection = True
                self.connection.close()

        self._handler = Handler
        self._server: ThreadingHTTPServer | None = None
        # Below those of outgoing connections, one of which could take it while we are away.
        self.port, _ = free_port_range(1)
        self.start()

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), self._handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening; what was made stays."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> FakeAirflow:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ids(self) -> list[str]:
        """Ids of the DAG runs made, in order."""
        with self.lock:
            return [run_id for _, run_id in self.dag_runs]

    def conf(self, dag_run_id: str) -> dict[str, Any]:
        """What a DAG run was given."""
        with self.lock:
            (conf,) = [entry["conf"] for (_, run_id), entry in self.dag_runs.items() if run_id == dag_run_id]
            return dict(conf)

    def set_state(self, dag_run_id: str, state: str, tasks: list[str | None] | None = None) -> None:
        """Let a DAG run go on or end; `tasks` are the states of its tasks."""
        with self.lock:
            for (_, run_id), entry in self.dag_runs.items():
                if run_id == dag_run_id:
                    entry |= {"state": state, "tasks": tasks or [], "updated": time.time()}

    @staticmethod
    def _document(dag_id: str, run_id: str, entry: dict[str, Any]) -> dict[str, Any]:
        told = {key: entry.get(key) for key in ("state", "conf", "note")}
        return {"dag_id": dag_id, "dag_run_id": run_id, **told}

    def _changed(self, query: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        since = datetime.fromisoformat(query["updated_at_gte"][0]).timestamp()
        limit, offset = int(query["limit"][0]), int(query["offset"][0])
        with self.lock:
            found = [
                self._document(dag_id, run_id, entry)
                for (dag_id, run_id), entry in self.dag_runs.items()
                if entry["updated"] >= since
            ]
        return 200, {"dag_runs": found[offset : offset + limit], "total_entries": len(found)}

    def _tasks(self, dag_id: str, run_id: str) -> tuple[int, dict[str, Any]]:
        with self.lock:
            states = self.dag_runs[(dag_id, run_id)].get("tasks", [])
            return 200, {"task_instances": [{"task_id": f"t{n}", "state": state} for n, state in enumerate(states)]}

    def _token(self, body: dict[str, str]) -> tuple[int, dict[str, str]]:
        with self.lock:
            self.token_requests += 1
            if (body["username"], body["password"]) != (USERNAME, self.password):
                return 401, {"detail": "Invalid credentials"}
            self.tokens.append(f"token-{self.token_requests}")
            return 201, {"access_token": self.tokens[-1]}

    def _make(self, handler: Any, dag_id: str, body: dict[str, Any]) -> None:
        run_id = body["dag_run_id"]
        if self.on_asked is not None:
            self.on_asked(run_id)
        with self.lock:
            fault = self.faults.popleft() if self.faults else None
            key = (dag_id, run_id)
            if fault is None or fault == "made-then-drop":
                if self.dags is not None and dag_id not in self.dags:
                    status = 404
                elif key in self.dag_runs:
                    status = 409
                else:
                    self.dag_runs[key] = {"conf": body["conf"], "state": "queued", "updated": time.time()}
                    status = 200
            else:
                status = fault if isinstance(fault, int) else 0
            self.attempts.append((dag_id, run_id, status))
            hook = self.on_made if status == 200 else None
        if hook is not None:
            hook(run_id)
        if isinstance(fault, str):
            handler.drop()
        elif status == 200:
            handler.reply(200, {"dag_id": dag_id, "dag_run_id": run_id, "state": "queued", "conf": body["conf"]})
        else:
            handler.reply(status, {"detail": f"fake answer {status} for {dag_id}"})

    def _read(self, dag_id: str, run_id: str) -> tuple[int, dict[str, Any]]:
        with self.lock:
            entry = self.dag_runs.get((dag_id, run_id))
            if entry is None:
                return 404, {"detail": f"no DAG run {run_id}"}
            return 200, self._document(dag_id, run_id, entry)
