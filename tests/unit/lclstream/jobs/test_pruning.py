"""Only jobs that have ended are ever removed: the oldest, or those beyond a number."""

from __future__ import annotations

from pathlib import Path

import pytest

from lclstream.jobs import folders
from lclstream.jobs.config import Keep
from lclstream.jobs.job import Job
from lclstream.jobs.models import JobSpec, JobState, Transition
from lclstream.jobs.pruning import superfluous

DAY = 86400.0
NOW = 100 * DAY


def ended(folder: Path, days_ago: float, state: JobState = JobState.completed) -> Job:
    job = Job.load(
        folders.make(
            folder, JobSpec(script="true"), login="ada", issuer="x", idempotency_key=None, request_sha256="",
            backend={"type": "local"}, start=False,
        )
    )  # fmt: skip
    job.history = [
        Transition(time=0, jobndx=1, state=state),
        Transition(time=NOW - days_ago * DAY, jobndx=1, state=state),
    ]
    return job


@pytest.mark.parametrize(
    ("keep", "removed"),
    [
        (Keep(), []),
        (Keep(days=10), [50, 20]),
        (Keep(jobs=1), [50, 20, 5]),
        (Keep(jobs=3), [50]),
        (Keep(jobs=0), [50, 20, 5, 1]),
        (Keep(days=30, jobs=3), [50]),
        (Keep(days=3, jobs=3), [50, 20, 5]),
    ],
)
def test_what_is_too_old_or_too_many_goes_and_what_has_not_ended_stays(
    tmp_path: Path, keep: Keep, removed: list[float]
) -> None:
    jobs = {days: ended(tmp_path, days) for days in (5.0, 50.0, 1.0)}
    jobs[20.0] = ended(tmp_path, 20, JobState.canceled)
    alive = [ended(tmp_path, 90, state) for state in (JobState.new, JobState.queued, JobState.active)]
    found = superfluous([*alive, *jobs.values()], keep, NOW)
    assert found == [jobs[days] for days in removed]


def test_a_removal_that_is_interrupted_is_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ended(tmp_path, 1), ended(tmp_path, 1)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda path, ignore_errors=False: None)
    folders.remove(one.folder)
    monkeypatch.undo()
    assert [folder.stamp for folder in folders.find(tmp_path)] == [other.stamp]
    assert [path.name for path in tmp_path.iterdir()] == [other.stamp]
