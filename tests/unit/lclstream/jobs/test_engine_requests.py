"""A request for a job that is cut off leaves a whole job or none, never one that nobody knows of."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lclstream.jobs import folders
from lclstream.jobs.config import JobsConfig
from lclstream.jobs.engine import Engine
from lclstream.jobs.job import Job
from lclstream.jobs.models import JobSpec, JobState
from lclstream.security.authority import SiteAuthority
from lclstream.security.identity import Identity

OWNER = Identity(login="ada", issuer="here", subject="ada", serial="1")


class SlowDisk:
    """Making a job's folder takes until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._make = folders.make
        self._begun, self._go = threading.Event(), threading.Event()
        monkeypatch.setattr(folders, "make", self._slow)

    def _slow(self, *args: Any, **more: Any) -> folders.JobFolder:
        self._begun.set()
        assert self._go.wait(30)
        return self._make(*args, **more)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, 30)

    def go(self) -> None:
        self._go.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


@pytest.fixture
def make_engine(tmp_path: Path, sites: dict[str, SiteAuthority]) -> Callable[[], Engine]:
    credentials = sites["s3df"].member("psik")
    return lambda: Engine(JobsConfig(credentials=credentials.folder, prefix=tmp_path / "jobs"), credentials)


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def cut_off(request: Awaitable[Job], disk: SlowDisk) -> None:
    """What `answer_s` does to a request whose folder is being made."""
    task = asyncio.ensure_future(request)
    await asyncio.sleep(0)
    await disk.begun()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


def within_a_minute(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


def test_the_same_key_after_a_request_that_was_cut_off_gives_the_one_job(
    make_engine: Callable[[], Engine], disk: SlowDisk
) -> None:
    async def work() -> None:
        async with started(make_engine()) as engine:
            spec = JobSpec(script="true")
            await cut_off(engine.make(spec, OWNER, start=False, idempotency_key="k"), disk)
            disk.go()
            job = await engine.make(spec, OWNER, start=False, idempotency_key="k")
            assert list(engine.jobs(OWNER)) == [job]
            assert [folder.stamp for folder in folders.find(engine.prefix)] == [job.stamp]

    within_a_minute(work())


def test_a_request_that_is_cut_off_while_it_waits_for_another_makes_no_job(
    make_engine: Callable[[], Engine], disk: SlowDisk
) -> None:
    async def work() -> None:
        async with started(make_engine()) as engine:
            first = asyncio.create_task(engine.make(JobSpec(script="true"), OWNER, start=False))
            await disk.begun()
            await cut_off(engine.make(JobSpec(script="false"), OWNER, start=False), disk)
            disk.go()
            job = await first
            last = await engine.make(JobSpec(script="true"), OWNER, start=False)
            assert list(engine.jobs(OWNER)) == [last, job]

    within_a_minute(work())


def test_a_job_whose_request_was_cut_off_runs_at_once_and_not_after_the_next_restart(
    make_engine: Callable[[], Engine], disk: SlowDisk
) -> None:
    async def work() -> None:
        async with started(make_engine()) as engine:
            await cut_off(engine.make(JobSpec(script="true"), OWNER, start=True), disk)
            disk.go()
            while [job.state for job in engine.jobs(OWNER)] != [JobState.completed]:
                await asyncio.sleep(0.02)

    within_a_minute(work())


def test_a_service_stops_only_when_the_job_of_a_request_that_was_cut_off_is_whole(
    make_engine: Callable[[], Engine], disk: SlowDisk
) -> None:
    async def work() -> None:
        engine = make_engine()
        await engine.start()
        await cut_off(engine.make(JobSpec(script="true"), OWNER, start=False), disk)
        stop = asyncio.create_task(engine.stop())
        done, _ = await asyncio.wait([stop], timeout=0.2)
        assert not done
        disk.go()
        await stop
        assert len(list(engine.jobs(OWNER))) == 1

    within_a_minute(work())
