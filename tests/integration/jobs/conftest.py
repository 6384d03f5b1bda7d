"""A real job service in a process of its own, over mutual TLS, and a receiver of its callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import FastAPI, Request, Response

from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobState, Transition
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import UnreachableError
from lclstream.security.identity import Identity
from lclstream.security.server import server_for

_BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


class Child:
    """The service's process, with its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.pid = self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Service:
    """``lclstream jobs``; killed and started again as a test wishes."""

    def __init__(self, folder: Path, port: int, site: SiteAuthority, login: str = "psik") -> None:
        self.folder = folder
        self.login = login
        self.prefix = folder / "jobs"
        self.port = port
        self.url = f"https://127.0.0.1:{port}"
        self.settings: dict[str, Any] = {
            "listen": {"host": "127.0.0.1", "port": port},
            "credentials": str(site.member(login).folder),
            "prefix": str(self.prefix),
        }
        self._site = site
        self._clients: list[JobClient] = []
        self.child: Any = None

    def start(self, *options: str) -> None:
        path = self.folder / "jobs.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        command = [str(Path(sys.executable).parent / "lclstream"), "jobs", "--config", str(path), *options]
        self.child = Child(command, self.folder / "jobs.log")
        client = self.client("alice")
        deadline = time.monotonic() + 60
        while True:
            assert self.child.process.poll() is None, self.child.output()
            try:
                client.backends()
                return
            except UnreachableError:
                assert time.monotonic() < deadline, self.child.output()
                time.sleep(0.05)

    def kill(self) -> None:
        self.child.process.kill()
        self.child.process.wait(30)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.child.process.send_signal(number)
        return int(self.child.process.wait(90))

    def credentials(self, login: str) -> Credentials:
        return self._site.member(login)

    def client(self, login: str = "alice") -> JobClient:
        self._clients.append(JobClient(self.url, self.credentials(login)))
        return self._clients[-1]

    def processes(self, jobid: str = "") -> list[psutil.Process]:
        """Living processes of this service's jobs, or of one of them, runners included."""
        folder = str(self.prefix / jobid)
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("base", "").startswith(folder)
                ours = ours or folder in " ".join(process.cmdline()[:6])
                if ours and process.pid != self.child.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.child is not None:
            if self.child.process.poll() is None:
                self.kill()
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.fixture
def service(tmp_path: Path, sites: dict[str, SiteAuthority], free_port: Callable[[], int]) -> Iterator[Service]:
    """A service that is not started yet, so that a test can change its settings."""
    service = Service(tmp_path, free_port(), sites["s3df"])
    yield service
    service.close()


@pytest.fixture
def other_site(
    tmp_path: Path, sites: dict[str, SiteAuthority], service: Service, free_port: Callable[[], int]
) -> Iterator[Service]:
    """The job service of another site, and the two sites' services introduced to each other; not started yet."""
    folder = tmp_path / "olcf"
    folder.mkdir()
    other = Service(folder, free_port(), sites["olcf"], login="psik-olcf")
    sites["olcf"].introduce(service.credentials(service.login), service="olcf", url=other.url)
    sites["s3df"].introduce(other.credentials(other.login), service="s3df", url=service.url)
    yield other
    other.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, make_service: Callable[[str], Service]) -> Service:
    """One running service for all tests of a module that need no setting of their own."""
    service = make_service("service")
    service.settings["directories"] = [str(tmp_path_factory.mktemp("scratch"))]
    service.settings["callbacks"] = {"allow": ["https://127.0.0.1:1/"]}
    service.settings["backends"] = {"default": {"type": "local", "kill_grace_s": 0.5, "max_duration_min": 60}}
    service.settings["limits"] = {"body_bytes": 20000, "upload_bytes": 50000}
    issuer = Identity.of_certificate(
        x509.load_pem_x509_certificate(service.credentials("ops").certificate.read_bytes()).public_bytes(Encoding.DER)
    ).issuer
    roles = service.folder / "roles.yaml"
    roles.write_text(yaml.safe_dump({"issuers": {"here": issuer}, "home": "here", "operators": ["ops"]}))
    service.settings["roles"] = str(roles)
    service.start()
    return service


@pytest.fixture(scope="module")
def make_service(
    tmp_path_factory: pytest.TempPathFactory, sites: dict[str, SiteAuthority], free_port: Callable[[], int]
) -> Iterator[Callable[[str], Service]]:
    """Make a service for a whole module; it is not started yet."""
    made: list[Service] = []

    def make(name: str) -> Service:
        made.append(Service(tmp_path_factory.mktemp(name), free_port(), sites["s3df"]))
        return made[-1]

    yield make
    for service in made:
        service.close()


_numbers = itertools.count()


@pytest.fixture
def client(running: Service) -> JobClient:
    """A client of the running service, for a user of its own."""
    return running.client(f"user{next(_numbers)}")


@pytest.fixture
def until_final(wait_until: Callable[..., None]) -> Callable[..., list[Transition]]:
    """Wait for the end of a job and return its history."""

    def wait(client: JobClient, jobid: str, timeout: float = 60) -> list[Transition]:
        wait_until(lambda: client.state(jobid).is_final, timeout, f"end of job {jobid}")
        return client.history(jobid)

    return wait


@pytest.fixture
def until_state(wait_until: Callable[..., None]) -> Callable[..., None]:
    """Wait until a job is in a state."""

    def wait(client: JobClient, jobid: str, state: JobState, timeout: float = 60) -> None:
        wait_until(lambda: client.state(jobid) is state, timeout, f"{state} of job {jobid}")

    return wait


@dataclass
class Receiver:
    """Takes callbacks over mutual TLS."""

    url: str
    received: list[tuple[dict[str, Any], dict[str, str], bytes]] = field(default_factory=list)
    answer: int = 200
    #: Takes nothing while this is not set.
    takes: threading.Event = field(default_factory=threading.Event)

    def states(self, jobid: str) -> list[str]:
        return [document["state"] for document, _, _ in list(self.received) if document["jobid"] == jobid]


@pytest.fixture
def receiver(
    sites: dict[str, SiteAuthority], free_port: Callable[..., int], wait_until: Callable[..., None]
) -> Iterator[Receiver]:
    port = free_port()
    receiver = Receiver(f"https://127.0.0.1:{port}/hook")
    receiver.takes.set()
    app = FastAPI()

    @app.post("/hook/{rest:path}")
    async def take(request: Request) -> Response:
        body = await request.body()
        while not receiver.takes.is_set():
            await asyncio.sleep(0.02)
        if receiver.answer == 200:
            receiver.received.append((json.loads(body), dict(request.headers), body))
        return Response(status_code=receiver.answer)

    server = server_for(app, host="127.0.0.1", port=port, credentials=sites["s3df"].member("receiver"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 60, "start of the receiver")
    yield receiver
    receiver.takes.set()
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """A real Slurm of one node; its configuration file for ``SLURM_CONF``."""
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        import slurm_site
    finally:
        sys.path.remove(str(_BENCHMARKS))
    try:
        with slurm_site.Slurm() as cluster:
            yield cluster.configuration
    except slurm_site.NoSlurmError as error:
        pytest.skip(str(error))
