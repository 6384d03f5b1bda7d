"""A job as the engine holds it in memory: what is asked often, and the bell that wakes the task following it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from lclstream.jobs.folders import JobFolder
from lclstream.jobs.models import JobSpec, JobState, JobSummary, Transition


@dataclass
class Job:
    """One job.

    Attributes:
        folder: the job on disk.
        login: its owner.
        issuer: who issued the owner's certificate.
        name: its name, or an empty text.
        backend: name of its backend.
        directory: where its script runs; the root of its up- and downloads.
        has_callback: whether somebody is told about its states.
        tags: names and values to find it by.
        history: its transitions, oldest first; only the engine's task for this job adds to it.
        start_requested: whether it is to be started.
        cancel_requested: whether it is to be ended.
        cancel_reason: why, when that is not its owner's wish.
        lease_s: seconds it lives without a renewal of its lease; None: it has no lease.
        bell: rung when the job is worth a look.
    """

    folder: JobFolder
    login: str
    issuer: str
    name: str
    backend: str
    directory: str
    has_callback: bool
    tags: dict[str, str]
    history: list[Transition]
    start_requested: bool
    cancel_requested: bool
    cancel_reason: str = ""
    lease_s: float | None = None
    bell: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def load(cls, folder: JobFolder) -> Job:
        """Read a job from its folder.

        Raises:
            DamagedJobError: something in it is missing or cannot be read.
        """
        notes, spec = folder.notes(), folder.spec()
        return cls(
            folder=folder,
            login=notes.login,
            issuer=notes.issuer,
            name=spec.name or "",
            backend=spec.backend,
            directory=spec.directory or str(folder.path / "work"),
            has_callback=spec.callback is not None,
            tags=notes.tags,
            history=folder.history(),
            start_requested=folder.start_requested,
            cancel_requested=folder.cancel_requested,
            cancel_reason=folder.cancel_reason,
            lease_s=folder.lease_s,
        )

    @property
    def stamp(self) -> str:
        """The job's id."""
        return self.folder.stamp

    @property
    def last(self) -> Transition:
        """The latest line of its history."""
        return self.history[-1]

    @property
    def state(self) -> JobState:
        """Its present state."""
        return self.last.state

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.state.is_final

    @property
    def is_live(self) -> bool:
        """Whether something is still to be done for it: it is to be started or ended, and has not ended."""
        return not self.is_final and (self.start_requested or self.cancel_requested)

    @property
    def jobndx(self) -> int:
        """The present attempt; 1 for a job that had none."""
        return max(1, self.last.jobndx)

    @property
    def native_id(self) -> str | None:
        """The id its backend gave it, or None."""
        for line in reversed(self.history):
            if line.state is JobState.queued and line.info:
                return line.info
        return None

    def spec(self) -> JobSpec:
        """Its specification, from disk.

        Raises:
            DamagedJobError: it cannot be read.
        """
        return self.folder.spec()

    def summary(self, line: Transition | None = None) -> JobSummary:
        """Its latest transition, or another one, as lists show it."""
        line = line or self.last
        return JobSummary(
            jobid=self.stamp, name=self.name, updated=line.time, jobndx=line.jobndx, state=line.state, info=line.info,
            tags=self.tags,
        )  # fmt: skip
