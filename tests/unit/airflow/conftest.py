"""Airflow's database, connections, and a transfer service whose answers a test decides; all over real mutual TLS."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, HTTPException, Query, Request, Response

from lclstream.api.models import (
    CacheMetrics,
    ClientName,
    JobState,
    Lease,
    LeaseRequest,
    PortTransition,
    TransferInfo,
    TransferPhase,
    TransferStatus,
)
from lclstream.elog.client import ElogClient
from lclstream.elog.config import ElogConfig, KafkaConfig
from lclstream.elog.service import create_app as create_elog
from lclstream.jobs import tags
from lclstream.jobs.client import JobClient
from lclstream.security.credentials import Credentials
from lclstream.security.server import server_for


@pytest.fixture(scope="session", autouse=True)
def airflow_database() -> None:
    """Airflow's own tables, once, in the temporary AIRFLOW_HOME."""
    from airflow.utils.db import initdb

    initdb()


class Scripted:
    """A transfer as the test wants it; what was asked of it is in `calls`."""

    def __init__(self, number: int, key: str | None, config: dict[str, Any]) -> None:
        self.number, self.key, self.config = number, key, config
        self.phase = TransferPhase.requested
        self.info = ""
        self.received = self.sent = self.held = 0
        self.producers = 0
        self.capacity_bytes: int | None = None
        self.calls: list[str] = []
        self.tags: dict[str, str] = {}
        self.lease_s: list[float] = []

    def status(self) -> TransferStatus:
        return TransferStatus(
            time=time.time(), jobndx=1, state=self.phase.job_state, info=self.info, id=self.number,
            url=f"tcp://127.0.0.1:{9000 + self.number}", user="airflow", phase=self.phase,
            tags=self.tags,
        )  # fmt: skip

    def document(self) -> TransferInfo:
        metrics = CacheMetrics(
            time=time.time(), producers=self.producers, recvd=self.received, sent=self.sent, buffered=self.held
        )
        entry = PortTransition(
            time=1.0, client=ClientName.producer, state=JobState.failed, info="exit code 3", jobndx=1
        )
        buffer = {
            "state": "streaming",
            "producers": self.producers,
            "received": {"messages": self.received, "bytes": 10 * self.received},
            "sent": {"messages": self.sent, "bytes": 10 * self.sent},
            "held": {"messages": self.held, "bytes": 10 * self.held},
            "lost": {"messages": 0, "bytes": 0},
            "rate_in_bytes_s": 100.0,
            "capacity_bytes": self.capacity_bytes,
        }
        return TransferInfo(
            user="airflow", log=[entry], metrics=metrics, id=self.number, url=self.status().url,
            state=self.phase.job_state, phase=self.phase, info=self.info, buffer=buffer,
            tags=self.tags,
        )  # fmt: skip


class TransferService:
    """The routes of the transfer service over the documents a test puts there."""

    def __init__(self) -> None:
        self.transfers: dict[int, Scripted] = {}
        #: Statuses to answer the next requests with, instead of an answer.
        self.failures: list[int] = []
        #: Called before each answer to GET /transfers/{id}; what it returns is the answer instead.
        self.before_info: Callable[[Scripted], Response | None] = lambda transfer: None
        self.first_phase = TransferPhase.requested
        self.on_no_consumer = ["wait", "spill"]
        self.asked_on_no_consumer: list[str] = []
        self.readers: list[list[str]] = []
        self.requests: list[dict[str, Any]] = []
        self.url = ""
        self.app = self._app()

    def add(self, key: str | None = None, config: dict[str, Any] | None = None) -> Scripted:
        number = len(self.transfers) + 1
        self.transfers[number] = transfer = Scripted(number, key, config or {})
        transfer.phase = self.first_phase
        return transfer

    def _find(self, number: int) -> Scripted:
        if self.failures:
            raise HTTPException(self.failures.pop(0), "scripted")
        if number not in self.transfers:
            raise HTTPException(404, "no such transfer")
        return self.transfers[number]

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/transfers")
        async def request(
            request: Request,
            lease_s: float | None = None,
            ranks: int | None = None,
            name: str = "",
            on_no_consumer: str = "wait",
            tag: Annotated[list[str] | None, Query()] = None,
            reader: Annotated[list[str] | None, Query()] = None,
        ) -> TransferStatus:
            if self.failures:
                raise HTTPException(self.failures.pop(0), "scripted")
            if on_no_consumer not in self.on_no_consumer:
                detail = [{"loc": ["query", "on_no_consumer"], "msg": "nothing is kept", "type": "value_error"}]
                raise HTTPException(422, detail)
            key, config = request.headers.get("idempotency-key"), await request.json()
            self.requests.append({"key": key, "config": config, "lease_s": lease_s, "ranks": ranks, "name": name})
            self.asked_on_no_consumer.append(on_no_consumer)
            self.readers.append(reader or [])
            for transfer in self.transfers.values():
                if key is not None and transfer.key == key:
                    if transfer.config != config:
                        raise HTTPException(409, "the key was used for another configuration")
                    return transfer.status()
            made = self.add(key, config)
            made.tags = tags.read(tag or ())
            return made.status()

        @app.get("/v1/transfers")
        def transfers(
            limit: int = 10, state: JobState | None = None, tag: Annotated[list[str] | None, Query()] = None
        ) -> list[TransferStatus]:
            found = [transfer.status() for transfer in reversed(self.transfers.values())]
            wanted = tags.read(tag or ())
            chosen = [one for one in found if state in (None, one.state) and tags.match(one.tags, wanted)]
            return chosen[:limit]

        @app.get("/v1/transfers/{number}")
        def info(number: int) -> Any:
            transfer = self._find(number)
            transfer.calls.append("info")
            return self.before_info(transfer) or transfer.document()

        @app.post("/v1/transfers/{number}/lease")
        def renew(number: int, lease: LeaseRequest) -> Lease:
            transfer = self._find(number)
            if transfer.phase.final:
                raise HTTPException(409, "it has ended")
            transfer.calls.append("renew")
            transfer.lease_s.append(lease.lease_s)
            return Lease(lease_expires=time.time() + lease.lease_s)

        @app.delete("/v1/transfers/{number}")
        def cancel(number: int) -> Response:
            transfer = self._find(number)
            transfer.calls.append("cancel")
            if not transfer.phase.final:
                transfer.phase, transfer.info = TransferPhase.canceled, "its owner has cancelled it"
            return Response("null", media_type="application/json")

        return app


@contextmanager
def served(app: FastAPI, port: int, credentials: Credentials) -> Iterator[str]:
    """An application served with mutual TLS, by a thread that is gone afterwards."""
    server = server_for(app, host="127.0.0.1", port=port, credentials=credentials)
    thread = threading.Thread(target=server.run, name=f"server {port}")
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"https://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``connection("psik_default", "psik", url, folder)`` defines an Airflow connection."""

    def define(name: str, kind: str, url: str, folder: object, **extra: Any) -> None:
        port = int(url.rpartition(":")[2])
        document = {
            "conn_type": kind, "host": "127.0.0.1", "port": port, "extra": {"credentials": str(folder), **extra},
        }  # fmt: skip
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(document))

    return define


@pytest.fixture
def airflow_identity(sites: dict[str, Any]) -> Credentials:
    """The certificate folder of Airflow's own identity."""
    credentials: Credentials = sites["s3df"].member("airflow")
    return credentials


@pytest.fixture
def transfers(
    sites: dict[str, Any],
    free_port: Callable[[], int],
    connection: Callable[..., None],
    airflow_identity: Credentials,
) -> Iterator[TransferService]:
    """A transfer service, with the connection `lclstream_default` to it."""
    service = TransferService()
    with served(service.app, free_port(), sites["s3df"].member("api")) as url:
        service.url = url
        connection("lclstream_default", "lclstream", url, airflow_identity.folder)
        yield service


class Store(dict[str, Any]):
    """Airflow's task state store, which outlives a try of a task."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)


@pytest.fixture
def context() -> dict[str, Any]:
    """What an operator needs of a task's context; XComs are in ``context["ti"].xcoms``."""
    xcoms: dict[str, Any] = {}
    ti = SimpleNamespace(
        dag_id="stream_run",
        run_id="mfx__r0007",
        task_id="request_stream",
        map_index=-1,
        try_number=1,
        max_tries=2,
        xcoms=xcoms,
        xcom_push=lambda key, value: xcoms.update({key: value}),
    )
    return {"ti": ti, "task_state_store": Store()}


@pytest.fixture(scope="session")
def job_service(
    sites: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[str]:
    """A real job service of the site olcf, which trusts the site s3df, too; its URL."""
    member = sites["olcf"].member("psik")
    (member.folder / "known_clients" / "s3df.crt").write_bytes(sites["s3df"].certificate_pem)
    port = free_port()
    folder = tmp_path_factory.mktemp("jobs")
    options = ["--credentials", member.folder, "--prefix", folder / "prefix", "--port", port, "--cancel-jobs-on-exit"]
    with (folder / "log").open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "lclstream.jobs.cli", *map(str, options)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert service.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"https://127.0.0.1:{port}"
    finally:
        service.terminate()
        assert service.wait(60) == 0, (folder / "log").read_text()


@pytest.fixture
def jobs(job_service: str, sites: dict[str, Any], connection: Callable[..., None]) -> Iterator[JobClient]:
    """The job service's client, with the connection `psik_default` to it."""
    airflow = sites["s3df"].member("airflow-olcf")
    (airflow.folder / "known_servers" / "olcf.crt").write_bytes(sites["olcf"].certificate_pem)
    connection("psik_default", "psik", job_service, airflow.folder)
    with JobClient(job_service, airflow) as client:
        yield client


@pytest.fixture(scope="session")
def elog_service(
    sites: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[str]:
    """A real logbook, whose broker is away; its URL."""
    member = sites["s3df"].member("elog-for-airflow")
    port = free_port()
    config = ElogConfig(
        port=port,
        credentials=member.folder,
        database=f"sqlite:///{tmp_path_factory.mktemp('elog')}/elog.sqlite",
        kafka=KafkaConfig(bootstrap_servers="127.0.0.1:9"),
    )
    with served(create_elog(config), port, member) as url:
        yield url


@pytest.fixture
def elog(elog_service: str, airflow_identity: Credentials, connection: Callable[..., None]) -> Iterator[ElogClient]:
    """The logbook's client, with the connection `elog_default` to it."""
    connection("elog_default", "elog", elog_service, airflow_identity.folder)
    with ElogClient(elog_service, airflow_identity) as client:
        yield client
