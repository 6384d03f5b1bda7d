"""Which finished jobs are old enough, or too many, to be kept."""

from __future__ import annotations

from collections.abc import Iterable

from lclstream.jobs.config import Keep
from lclstream.jobs.job import Job

_DAY_S = 86400.0


def superfluous(jobs: Iterable[Job], keep: Keep, now: float) -> list[Job]:
    """The jobs whose folders are to be removed, oldest end first; never one that has not ended.

    Args:
        jobs: all jobs.
        keep: what is kept.
        now: unix time, seconds.
    """
    finished = sorted((job for job in jobs if job.is_final), key=lambda job: job.last.time)
    too_many = 0 if keep.jobs is None else max(0, len(finished) - keep.jobs)
    eldest = None if keep.days is None else now - keep.days * _DAY_S
    return [
        job
        for number, job in enumerate(finished)
        if number < too_many or (eldest is not None and job.last.time < eldest)
    ]
