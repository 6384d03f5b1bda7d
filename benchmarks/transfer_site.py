"""A site for measurements of the services: certificates, a job service and a transfer service as processes.

The services can be killed and started again; what the transfer service has stored can be read beside it, and what a
dead transfer must not leave behind can be counted.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from lclstream.api.client import TransferClient
from lclstream.client import Puller, StreamError, StreamTimeout, pull
from lclstream.demo.workspace import free_port_range
from lclstream.jobs.client import JobClient
from lclstream.security.authority import SiteAuthority
from lclstream.security.errors import PeerError

BIN = Path(sys.executable).parent
#: Where MPI keeps the memory its ranks share.
SHARED_MEMORY = Path("/dev/shm")


def engine_config(events: int, *, batch_size: int = 1, shape: str = "16,16") -> dict[str, Any]:
    """An engine configuration with an internal source of that many events, `batch_size` events a message."""
    return {
        "source_identifier": "",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": events},
        "data_sources": {"random": {"type": "GenericRandomNumpyArray", "array_shape": shape, "array_dtype": "float32"}},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": batch_size},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"random": "/data/random"}},
    }


def is_bindable(port: int) -> bool:
    """Whether a loopback port can be listened at."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: it did not within the time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout_s:g} s")
        time.sleep(0.02)


@dataclass(frozen=True)
class Stored:
    """What the transfer service's database says about one transfer.

    Attributes:
        state: its state.
        released: whether nothing of it is left.
        effects: what is still to be done, in order.
        jobs: for each job its role, and how far it is: ``planned``, ``created`` or ``started``.
    """

    state: str
    released: bool
    effects: tuple[str, ...]
    jobs: dict[str, str]


class Database:
    """Reads the transfer service's SQLite file beside the service, as often as one likes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The answer to a query; nothing while there is no database yet."""
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=5)
            return self._connection.execute(query, values).fetchall()
        except sqlite3.OperationalError:
            return []

    def by_key(self, key: str) -> int | None:
        """Number of the transfer that was asked for with this key."""
        found = self.rows("SELECT id FROM transfers WHERE key = ?", key)
        return int(found[0][0]) if found else None

    def stored(self, number: int) -> Stored | None:
        """What it says about a transfer; None when it knows none of that number."""
        rows = self.rows(
            "SELECT state, released, (SELECT group_concat(kind) FROM (SELECT kind FROM effects WHERE transfer = t.id"
            " ORDER BY id)), (SELECT group_concat(role || ':' || CASE WHEN jobid IS NULL THEN 'planned' WHEN started"
            " THEN 'started' ELSE 'created' END) FROM jobs WHERE transfer = t.id) FROM transfers t WHERE id = ?",
            number,
        )
        if not rows:
            return None
        state, released, effects, jobs = rows[0]
        return Stored(
            state=state,
            released=bool(released),
            effects=tuple((effects or "").split(",")) if effects else (),
            jobs=dict(one.split(":") for one in jobs.split(",")) if jobs else {},
        )

    def leased_ports(self) -> int:
        """Number of leased ports."""
        found = self.rows("SELECT count(*) FROM ports")
        return int(found[0][0]) if found else 0

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()


class Service:
    """A service's process, with its output in a file; started again as often as it was killed."""

    def __init__(self, log: Path, environment: dict[str, str], *command: object) -> None:
        self.log = log
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        self._environment = {**os.environ, "PATH": path, **environment}
        self._command = [str(BIN / str(command[0])), *map(str, command[1:])]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
            )

    def kill(self) -> None:
        """SIGKILL, and wait for its end; without effect on one that has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    def stop(self) -> int:
        """SIGTERM, and wait for its end."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    @property
    def descriptors(self) -> int:
        """Number of its open files and sockets, without those of its pool of connections to SQLite."""
        assert self.process is not None
        found = 0
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += ".sqlite" not in str(descriptor.readlink())
        return found


class Site:
    """A job service and a transfer service; use it in a ``with``, which ends everything that was started.

    Args:
        folder: where everything lies.
        ports: ports for the buffers.
        backends: the job service's backends; None: one local one.
        environment: changes to the transfer service's configuration.
    """

    def __init__(self, folder: Path, *, ports: int, backends: dict[str, Any] | None = None, **changes: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = SiteAuthority(folder / "certificates", "s3df")
        self.prefix = folder / "jobs"
        # Nobody takes those of the services while these are down.
        jobs_port, self.last = free_port_range(ports + 2)
        api_port, self.first = jobs_port + 1, jobs_port + 2
        self.jobs_url, self.url = f"https://127.0.0.1:{jobs_port}", f"https://127.0.0.1:{api_port}"
        self.jobs_config: dict[str, Any] = {
            "listen": {"port": jobs_port},
            "credentials": str(self.authority.member("jobs").folder),
            "prefix": str(self.prefix),
            "callbacks": {"allow": [f"{self.url}/v1/callback"]},
            "backends": backends or {"default": {"type": "local", "kill_grace_s": 4}},
        }
        self.api_config: dict[str, Any] = {
            "port": api_port,
            "credentials": str(self.authority.member("transfer-api").folder),
            "database": f"sqlite:///{folder}/transfers.sqlite",
            "job_service": {"url": self.jobs_url},
            "ports": {"first": self.first, "last": self.last},
            "buffer": {"credentials": str(self.authority.member("buffer").folder), "capacity": "64MiB", "grace_s": 0.5},
            "quota": {"transfers": None},
            "poll_s": 1,
            "status_s": 0.2,
            "settle_s": 2,
            **changes,
        }
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        environment = {"TMPDIR": str(self.temporary)}
        self.jobs_service = Service(
            folder / "jobs.log", environment, "lclstream", "jobs", "--config", folder / "jobs.yaml"
        )
        self.api_service = Service(folder / "api.log", environment, "lclstream", "api", "--config", folder / "api.yaml")
        self.client = TransferClient(self.url, self.authority.member("alice"))
        self.jobs = JobClient(self.jobs_url, self.authority.member("transfer-api"))
        self.database = Database(folder / "transfers.sqlite")
        self._before = _shared_memory()

    def __enter__(self) -> Self:
        try:
            self.start_jobs()
            self.start_api()
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def start_jobs(self) -> None:
        """Start the job service; see :meth:`ready`."""
        (self.folder / "jobs.yaml").write_text(yaml.safe_dump(self.jobs_config))
        self.jobs_service.start()

    def start_api(self, **changes: Any) -> None:
        """Start the transfer service, with changes to its configuration; see :meth:`ready`."""
        (self.folder / "api.yaml").write_text(yaml.safe_dump({**self.api_config, **changes}))
        self.api_service.start()

    def ready(self, timeout_s: float = 120) -> float:
        """Wait until both services answer; returns the seconds."""
        began = time.monotonic()
        wait_until(lambda: _answers(lambda: self.jobs.list(limit=1)), timeout_s, "answer of the job service")
        wait_until(lambda: _answers(lambda: self.client.list(limit=1)), timeout_s, "answer of the transfer service")
        return time.monotonic() - began

    def job_processes(self) -> list[psutil.Process]:
        """Living processes of jobs, their runners included."""
        mark = f"{self.prefix}/"
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("base", "").startswith(mark)
                ours = ours or any(mark in word for word in process.cmdline()[:6])
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def processes_of(self, jobid: str) -> list[psutil.Process]:
        """Living processes of one job, its runner first."""
        mark = f"{self.prefix}/{jobid}"
        return [one for one in self.job_processes() if _belongs(one, mark)]

    def living_jobs(self) -> int:
        """Number of jobs that have not ended, those that were never started included."""
        return sum(not job.state.is_final for job in self.jobs.list())

    def listening_ports(self) -> int:
        """Number of the buffers' ports that somebody listens at."""
        return sum(not is_bindable(port) for port in range(self.first, self.last + 1))

    def left_files(self) -> list[str]:
        """Temporary files, shared memory nobody uses that was not there before, and job folders left half made."""
        shared = [path for path in _shared_memory() - self._before if not _is_mapped(path)]
        half_made = [str(path) for path in self.prefix.glob(".*") if path.name != ".service"]
        return [*shared, *half_made, *map(str, self.temporary.iterdir())]

    def close(self) -> None:
        """End the services and whatever jobs left."""
        self.client.close()
        self.jobs.close()
        self.database.close()
        for service in (self.api_service, self.jobs_service):
            service.kill()
        kill_all(self.job_processes())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def kill_all(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL to each; returns how many there still were."""
    killed = 0
    for process in processes:
        try:
            process.kill()
            killed += 1
        except psutil.NoSuchProcess:
            continue
    return killed


class Consumer:
    """Pulls a stream in a thread from the moment its buffer listens, until its end, a break, or :meth:`end`."""

    def __init__(self, urls: str | list[str]) -> None:
        self.messages = 0
        self.trouble: StreamError | None = None
        self._ending = threading.Event()
        self._stream = pull(urls, library=random.choice(("nng", "zmq")), timeout_s=0.5, connect_timeout_s=30)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._stream as stream:
                while not self._ending.is_set() and self._next(stream):
                    continue
        except StreamError as error:
            self.trouble = error

    def _next(self, stream: Puller) -> bool:
        try:
            if stream.receive() is None:
                return False
            self.messages += 1
        except StreamTimeout:
            pass
        return True

    def end(self, *, at_once: bool = False) -> int:
        """Wait for the end of the stream, or stop; returns how many messages came."""
        if at_once:
            self._ending.set()
        self._thread.join(60)
        return self.messages


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except PeerError:
        return False
    return True


def _belongs(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("base", "") == mark or any(mark in word for word in process.cmdline()[:6])
    except psutil.Error:
        return False


def _shared_memory() -> set[str]:
    return {str(path) for path in SHARED_MEMORY.glob("*")}


def _is_mapped(path: str) -> bool:
    """Whether a living process uses that shared memory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if path in (process / "maps").read_text():
                return True
        except OSError:
            continue
    return False


def scratch(prefix: str) -> Path:
    """A new folder for a measurement; the caller removes it (:func:`discard`)."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix=prefix))


def discard(folder: Path) -> None:
    """Remove a measurement's folder."""
    shutil.rmtree(folder, ignore_errors=True)
