"""Where jobs run. A backend starts and ends attempts and reports facts; it never decides a job's state.

The engine calls a backend from the event loop only. What a backend learns later it tells by ringing the job's bell.
"""

from __future__ import annotations

from typing import Protocol

from lclstream.jobs.job import Job
from lclstream.jobs.machine import Report
from lclstream.jobs.models import BackendInfo, JobSpec


class SubmissionRejectedError(ValueError):
    """The backend does not take this job; the message is its own words. It is not tried again."""


class BackendUnavailableError(ConnectionError):
    """The backend could not be asked now; the job stays as it is, and the same is tried again."""


class RefusedError(PermissionError):
    """A job specification asks for what this backend does not allow."""


class Backend(Protocol):
    """What the engine needs to know how to do."""

    #: Seconds between two looks at a live job when nothing rings its bell.
    poll_s: float

    def check(self, spec: JobSpec) -> None:
        """Refuse a specification before a job is made from it.

        Raises:
            RefusedError: an attribute is not allowed.
            ValueError: a resource cannot be given.
        """

    def psik_backend(self) -> dict[str, object]:
        """The fields of psik's own `BackendConfig`, for the first line of a history."""

    async def start(self) -> None:
        """Begin to work; called once, before any job."""

    async def submit(self, job: Job) -> str:
        """Start an attempt and return the backend's id for it.

        Called again when an earlier call may or may not have succeeded: it must never start a second one.

        Raises:
            SubmissionRejectedError: the backend does not take the job.
            BackendUnavailableError: nobody knows; it will be called again.
        """

    async def observe(self, job: Job) -> list[Report]:
        """What is known about a job that was submitted, oldest first. Nothing, when nothing is known.

        Raises:
            BackendUnavailableError: nothing can be known now.
        """

    async def cancel(self, job: Job) -> None:
        """Ask for the end of a submitted job; called again until it has ended.

        Raises:
            BackendUnavailableError: it cannot be asked now.
        """

    def told(self, native_id: str, body: bytes, signature: str | None) -> Job | None:
        """The job a callback of another service is about, if this backend sent it there and the signature is right."""

    def info(self, name: str) -> BackendInfo:
        """What users may know about it."""

    async def close(self) -> None:
        """Stop working, leaving the jobs alone."""
