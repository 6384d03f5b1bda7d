"""A lease ends once, at its time, unless it was renewed or dropped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lclstream.jobs import folders
from lclstream.jobs.folders import DamagedJobError
from lclstream.jobs.job import Job
from lclstream.jobs.leases import Leases
from lclstream.jobs.models import JobSpec


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_that_is_not_renewed_ends_once_and_no_other_with_it() -> None:
    clock, ended = Clock(), list[str]()
    leases = Leases(ended.append, clock)
    leases.renew("a", 10)
    leases.renew("b", 10)
    leases.renew("c", 10)
    clock.now += 9
    leases.renew("b", 10)
    leases.drop("c")
    leases.end_due()
    assert ended == []
    clock.now += 1
    leases.end_due()
    leases.end_due()
    assert ended == ["a"]
    assert len(leases) == 1


def test_whoever_hears_of_an_end_may_give_another_lease() -> None:
    clock, ended = Clock(), list[str]()
    leases = Leases(lambda stamp: (ended.append(stamp), leases.renew(stamp, 5))[0], clock)
    leases.renew("a", 1)
    clock.now += 2
    leases.end_due()
    assert (ended, len(leases)) == (["a"], 1)


def test_the_watch_wakes_for_a_lease_shorter_than_those_it_waits_for() -> None:
    async def watched() -> str:
        ended = asyncio.Queue[str]()
        leases = Leases(ended.put_nowait)
        watch = asyncio.create_task(leases.watch())
        try:
            await asyncio.sleep(0)
            leases.renew("long", 3600)
            await asyncio.sleep(0.01)
            leases.renew("short", 1800)
            leases.renew("shorter", 0.02)
            async with asyncio.timeout(60):
                return await ended.get()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    assert asyncio.run(watched()) == "shorter"


def test_a_folder_keeps_the_lease_and_the_reason_of_the_end(tmp_path: Path) -> None:
    def made(lease_s: float | None) -> folders.JobFolder:
        return folders.make(
            tmp_path, JobSpec(script="true"), login="ada", issuer="x", idempotency_key=None, request_sha256="",
            backend={"type": "local"}, start=False, lease_s=lease_s,
        )  # fmt: skip

    without, folder = made(None), made(12.5)
    assert (Job.load(without).lease_s, Job.load(without).cancel_reason) == (None, "")
    assert Job.load(folder).lease_s == 12.5
    folder.keep_lease(60)
    folder.request_cancel("its lease ended")
    job = Job.load(folder)
    assert (job.lease_s, job.cancel_requested, job.cancel_reason) == (60, True, "its lease ended")
    assert not list(folder.control.glob(".*"))
    (folder.control / "lease").write_text("soon")
    with pytest.raises(DamagedJobError, match="control/lease"):
        Job.load(folder)


def test_an_end_whose_reason_is_not_written_whole_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.make(
        tmp_path, JobSpec(script="true"), login="ada", issuer="x", idempotency_key=None, request_sha256="",
        backend={"type": "local"}, start=False,
    )  # fmt: skip

    def cut_short(path: Path, text: str) -> None:
        path.write_text(text[:3])
        raise OSError("disk full")

    monkeypatch.setattr(folders, "_write", cut_short)
    with pytest.raises(OSError, match="disk full"):
        folder.request_cancel("its lease ended")
    assert (folder.cancel_requested, folder.cancel_reason) == (False, "")
