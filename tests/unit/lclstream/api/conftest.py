"""A world of jobs in memory, in which every call can be made to fail, and the service in front of it."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lclstream.api import driver
from lclstream.api.config import ApiConfig
from lclstream.api.models import JobState
from lclstream.api.store import Store
from lclstream.jobs.models import JobSpec, Transition
from lclstream.security.errors import ServiceError, UnreachableError

CONFIGURATION: dict[str, Any] = {
    "source_identifier": "",
    "skip_incomplete_events": False,
    "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 20},
    "data_sources": {"random": {"type": "GenericRandomNumpyArray", "array_shape": "20,2", "array_dtype": "float32"}},
    "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 5},
    "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"random": "/data/random"}},
    "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": "/root"}],
}


class World:
    """Jobs that exist only here. A buffer and an engine go through their lives as they are looked at.

    Attributes:
        jobs: what was made, by id.
        engine_fails: the engine ends badly.
        engine_waits: the engine stays active until this is false.
        buffer_waits: the buffer stays active although the engine has completed.
        buffer_stays: a buffer that is cancelled goes on, because it writes, until this is false.
        summary: the last figures of a buffer that was cancelled; None: it could not write them.
        away: every call fails as if the job service were not reachable.
        before: called with the name of each call before it is done, and with `after` afterwards.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.engine_fails = False
        self.engine_waits = False
        self.buffer_waits = False
        self.buffer_stays = False
        self.summary: dict[str, Any] | None = None
        self.away = False
        self.refuse_engine = False
        self.hook: Callable[[str, str], None] = lambda name, when: None
        self._ids = itertools.count(1)

    def living(self) -> list[str]:
        return [jobid for jobid, job in self.jobs.items() if not job["history"][-1].state.is_final]

    def running(self) -> list[str]:
        return [
            jobid for jobid, job in self.jobs.items() if job["history"][-1].state in (JobState.queued, JobState.active)
        ]

    def of(self, role: str) -> list[dict[str, Any]]:
        return [job for job in self.jobs.values() if job["spec"]["name"].endswith(role)]

    def reach(self, job: dict[str, Any], state: JobState, info: str = "") -> None:
        if not job["history"][-1].state.is_final:
            job["history"].append(Transition(time=time.time(), jobndx=1, state=state, info=info))

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        self.hook(name, "before")
        if self.away:
            raise UnreachableError("nobody answers at the job service")
        yield
        self.hook(name, "after")

    async def create(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> str:
        with self._call("create"):
            document = spec.document() if isinstance(spec, JobSpec) else dict(spec)
            if self.refuse_engine and document["name"].endswith("engine"):
                raise ServiceError("POST /jobs answered 403: no", status=403, detail="attribute --nodes is not allowed")
            assert idempotency_key is not None
            jobid = self.keys.get(idempotency_key)
            if jobid is None:
                jobid = f"{next(self._ids)}.5"
                first = Transition(time=time.time(), jobndx=0, state=JobState.new)
                self.jobs[jobid] = {"spec": document, "history": [first], "files": {}, "starts": 0}
                self.keys[idempotency_key] = jobid
            assert self.jobs[jobid]["spec"] == document, "the same key with another specification"
            return jobid

    async def upload(self, jobid: str, name: str, data: bytes) -> None:
        with self._call("upload"):
            self.jobs[jobid]["files"][name] = data

    async def start(self, jobid: str) -> None:
        with self._call("start"):
            job = self.jobs[jobid]
            if job["history"][-1].state is JobState.new:
                job["starts"] += 1
                self.reach(job, JobState.queued)

    async def history(self, jobid: str) -> list[Transition]:
        with self._call("history"):
            job = self.jobs.get(jobid)
            if job is None:
                raise ServiceError("404", status=404, detail="no such job")
            self._live(job)
            if job.get("canceled") and not self.buffer_stays:
                self.reach(job, JobState.canceled)
            return list(job["history"])

    def _live(self, job: dict[str, Any]) -> None:
        state = job["history"][-1].state
        if state is JobState.queued:
            self.reach(job, JobState.active)
        elif state is JobState.active and job["spec"]["name"].endswith("engine"):
            if self.engine_fails:
                self.reach(job, JobState.failed, "9")
            elif not self.engine_waits:
                self.reach(job, JobState.completed, "0")
        elif state is JobState.active and not self.buffer_waits:
            transfer = job["spec"]["name"].rsplit("-", 2)[0]
            engines = [one for one in self.of("engine") if one["spec"]["name"] == f"{transfer}-engine"]
            if engines and engines[0]["history"][-1].state is JobState.completed:
                self.reach(job, JobState.completed, "0")

    async def cancel(self, jobid: str) -> None:
        with self._call("cancel"):
            job = self.jobs.get(jobid)
            if job is None:
                raise ServiceError("404", status=404, detail="no such job")
            job["canceled"] = True
            if not (self.buffer_stays and job["spec"]["name"].endswith("buffer")):
                self.reach(job, JobState.canceled)

    async def download(self, jobid: str, path: str) -> bytes:
        with self._call("download"):
            if self.jobs[jobid]["history"][-1].state is JobState.canceled and self.summary is not None:
                return json.dumps(self.summary).encode()
            if self.jobs[jobid]["history"][-1].state is not JobState.completed:
                raise ServiceError("404", status=404, detail="no such file")
            return (
                b'{"name": "x", "state": "done", "producers": 0, "received": {"messages": 4}, "sent": {"messages": 4}}'
            )

    async def logs(
        self, jobid: str, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> dict[str, str]:
        with self._call("logs"):
            if jobid not in self.jobs:
                raise ServiceError("404", status=404, detail="no such job")
            return {str(name): f"rank 1 was killed\nsignal 9 in {self.jobs[jobid]['spec']['name']}\n"}

    def reader(self, url: str) -> Reader:
        return Reader(self, url)


class Reader:
    """A buffer's status, as long as its job is active."""

    def __init__(self, world: World, url: str) -> None:
        self.world, self.url = world, url

    async def read(self) -> dict[str, Any]:
        self.world.hook("read", "before")
        for job in self.world.of("buffer"):
            if self.url in job["spec"]["script"] and job["history"][-1].state is JobState.active:
                return {
                    "name": job["spec"]["name"].removesuffix("-buffer"),
                    "time": time.time(),
                    "producers": 0,
                    "received": {"messages": 4, "bytes": 400},
                    "sent": {"messages": 3, "bytes": 300},
                    "held": {"messages": 1 if self.world.buffer_waits else 0, "bytes": 100},
                }
        raise UnreachableError(f"{self.url}: nobody listens")

    async def aclose(self) -> None:
        pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(driver, "_SOON_S", 0.01)
    monkeypatch.setattr(driver, "_FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(driver, "_LAST_RETRY_S", 0.05)
    return World()


@pytest.fixture
def configuration() -> dict[str, Any]:
    return copy.deepcopy(CONFIGURATION)


@pytest.fixture
def settings(sites: dict[str, Any], tmp_path: Path) -> Callable[..., ApiConfig]:
    """Makes a configuration of the service with quick periods."""

    def make(**changes: Any) -> ApiConfig:
        document = {
            "credentials": str(sites["s3df"].member("api").folder),
            "database": f"sqlite:///{tmp_path}/transfers.sqlite",
            "job_service": {"url": "https://127.0.0.1:1"},
            "ports": {"first": 21000, "last": 21999},
            "poll_s": 0.02,
            "status_s": 0.02,
            "settle_s": 0.2,
            **changes,
        }
        return ApiConfig.model_validate(document)

    return make


@pytest.fixture
def store(settings: Callable[..., ApiConfig]) -> Iterator[Store]:
    config = settings()
    store = Store(config.database, config.limit_s)
    yield store
    store.close()


@pytest.fixture
def serving(
    sites: dict[str, Any], world: World, store: Store, free_port: Callable[..., int]
) -> Iterator[Callable[[ApiConfig], str]]:
    """Serves transfers in a thread, over mutual TLS, in front of the world; gives the URL."""
    from lclstream.api.service import create_app
    from lclstream.security.server import server_for

    stops: list[Callable[[], None]] = []

    def serve(config: ApiConfig) -> str:
        port = free_port()
        app = create_app(config, store, jobs=lambda: world, reader=world.reader)
        server = server_for(app, host="127.0.0.1", port=port, credentials=sites["s3df"].member("api"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()

        stops.append(stop)
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return f"https://127.0.0.1:{port}"

    yield serve
    for stop in stops:
        stop()
