"""A job service (Psi-k's REST interface: ours, or the published psik-api) as an Airflow hook."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from lclstream.jobs.client import AsyncJobClient, JobClient
from lclstream.jobs.models import JobSpec, JobState, JobSummary, Transition
from lclstream.jobs.sbatch import SbatchOptionError, directives, parse_options
from lclstream_airflow.hooks.patience import ServiceError
from lclstream_airflow.hooks.service import ServiceHook

__all__ = [
    "AsyncJobClient",
    "JobClient",
    "JobSpec",
    "JobState",
    "PsikHook",
    "SbatchOptionError",
    "Transition",
    "directives",
    "has_no_lease",
    "job_facts",
    "parse_options",
]


class PsikHook(ServiceHook):
    """Gives clients of the job service that a connection of type `psik` names.

    :param psik_conn_id: id of the connection: host, port (8447), extra ``{"credentials": FOLDER, "prefix"?}``
    """

    conn_name_attr = "psik_conn_id"
    default_conn_name = "psik_default"
    conn_type = "psik"
    hook_name = "Psi-k jobs"
    default_port = 8447
    default_prefix = "/v2"

    def __init__(self, psik_conn_id: str = default_conn_name) -> None:
        super().__init__(psik_conn_id)

    def get_conn(self) -> JobClient:
        """A blocking client; use it in a ``with``."""
        endpoint = self.endpoint()
        return JobClient(endpoint.base_url, endpoint.credentials, prefix=endpoint.prefix)

    async def get_async_conn(self) -> AsyncJobClient:
        """A client for an event loop; use it in an ``async with``."""
        endpoint = await self.aendpoint()
        # Certificates are read from disk, which may be a slow network file system.
        return await asyncio.to_thread(AsyncJobClient, endpoint.base_url, endpoint.credentials, prefix=endpoint.prefix)

    def under_way(self, tags: Mapping[str, str]) -> list[JobSummary]:
        """Our jobs that have all of these tags and have not ended; none at a published server, which knows no tags.

        Raises:
            PeerError: the service cannot be asked.
        """
        with self.get_conn() as client:
            found = [
                one
                for state in (JobState.new, JobState.queued, JobState.active)
                for one in client.list(state=state, tags=tags)
            ]
        # A server that does not know the parameter has answered with all jobs.
        return [one for one in found if tags.items() <= one.tags.items()]

    def jobs_url(self) -> str:
        """The address of the list of our jobs."""
        endpoint = self.endpoint()
        return f"{endpoint.base_url}{endpoint.prefix}/jobs"

    def job_url(self, job_id: str) -> str:
        """The address of a job's logs."""
        return f"{self.jobs_url()}/{job_id}/logs"

    def _greet(self) -> str:
        with self.get_conn() as client:
            backends = client.backends()
        return f"The job service at {self.endpoint().base_url} answers; its backends: {', '.join(sorted(backends))}."


def has_no_lease(error: ServiceError) -> bool:
    """Whether a renewal was refused because there is nothing to renew.

    The job has ended or is not there, or the service knows no leases, as the published psik-api. Which of them it is,
    the next question about the job tells.
    """
    return error.status in (404, 405, 409)


def job_facts(job_id: str, history: list[Transition]) -> dict[str, Any]:
    """What a DAG may know about a job; JSON values only.

    Keys: ``job_id state info attempt queued_s run_s``: seconds from the submission to the last start, and from there to
    the last transition; None while there was no start.
    """
    last = history[-1] if history else None
    started = [step.time for step in history if step.state is JobState.active]
    return {
        "job_id": job_id,
        "state": last.state.value if last else None,
        "info": last.info if last else "",
        "attempt": last.jobndx if last else 0,
        "queued_s": round(started[-1] - history[0].time, 3) if started else None,
        "run_s": round(history[-1].time - started[-1], 3) if started else None,
    }
