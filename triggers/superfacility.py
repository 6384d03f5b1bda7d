"""Waiting for a job at NERSC, and for a machine that is not there, through the Superfacility API."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from lclstream_airflow.hooks.patience import ServiceError
from lclstream_airflow.hooks.superfacility import FacilityJob, SuperfacilityClient, SuperfacilityHook
from lclstream_airflow.triggers.polling import PATIENCE_S, OnKill, PollingTrigger, WaitStatus, event

#: For how long neither queue nor accounting may know a job, in seconds: accounting comes after the fact.
UNKNOWN_FOR_S = 120.0
#: A log that is longer is not followed: the API gives files whole only, in bytes.
LONGEST_LOG = 1 << 20


def facility_facts(machine: str, job: FacilityJob) -> dict[str, Any]:
    """What a DAG may know about a job; JSON values only. Keys: ``job_id machine name state exit_code``."""
    return {
        "job_id": job.id,
        "machine": machine,
        "name": job.name,
        "state": job.state,
        "exit_code": job.exit_code,
    }


class SuperfacilityJobTrigger(PollingTrigger):
    """Waits until a job has ended.

    :param machine: where it runs
    :param log_path: file there whose growth is copied into the task's log; None: nothing is

    Further arguments: see :class:`.PollingTrigger`.
    """

    what = "job"

    def __init__(
        self,
        *,
        conn_id: str,
        remote_id: str,
        deadline: float,
        machine: str,
        log_path: str | None = None,
        poll_interval: float = 10.0,
        patience_s: float = PATIENCE_S,
        on_kill_policy: str = OnKill.CANCEL,
    ) -> None:
        super().__init__(
            conn_id=conn_id,
            remote_id=remote_id,
            deadline=deadline,
            poll_interval=poll_interval,
            patience_s=patience_s,
            on_kill_policy=on_kill_policy,
        )
        self.machine = machine
        self.log_path = log_path
        self._state = ""
        self._unknown_since: float | None = None
        self._copied = 0
        self._size = 0
        self._unread = False

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        return {**super().arguments(), "machine": self.machine, "log_path": self.log_path}

    async def connect(self) -> contextlib.AbstractAsyncContextManager[SuperfacilityClient]:
        """A client of the API."""
        return await SuperfacilityHook(self.conn_id).get_async_conn()

    async def look(self, client: SuperfacilityClient) -> dict[str, Any] | None:
        """Say what has changed, copy what the job has printed since, judge its state."""
        number = str(self.remote_id)
        try:
            job = await client.job(self.machine, number)
        except ServiceError as error:
            if error.status != 404:
                raise
            self._unknown_since = self._unknown_since or time.monotonic()
            if time.monotonic() - self._unknown_since > UNKNOWN_FOR_S:
                raise
            return None
        self._unknown_since = None
        if job.state != self._state:
            self.log.info("job %s is %s", number, job.state)
        self._state = job.state
        self._facts = facility_facts(self.machine, job)
        if self.log_path and job.state != "PENDING":
            await self._copy_log(client, self.log_path, ended=job.is_final)
        if not job.is_final:
            return None
        if job.has_succeeded:
            return event(WaitStatus.REACHED, number, f"job {number} is completed", self._facts)
        code = f" (exit code {job.exit_code})" if job.exit_code else ""
        return event(WaitStatus.ENDED, number, f"job {number} is {job.state}{code}", self._facts)

    async def _copy_log(self, client: SuperfacilityClient, path: str, *, ended: bool) -> None:
        try:
            size = await client.size(self.machine, path)
            if size == self._size and not (ended and self._copied < size):
                return
            self._size = size
            if size > LONGEST_LOG:
                if self._copied >= 0:
                    self.log.info("%s has %d bytes: the rest is only there", path, size)
                self._copied = -1
                return
            data = await client.download(self.machine, path)
        except ServiceError as error:
            # Nothing was printed yet, the file is not ours to read, or the API's file service is away, which is not the
            # one that knows the jobs: the job's end does not depend on it.
            if error.retry and not self._unread:
                self._unread = True
                self.log.warning("job %s: its log cannot be followed now: %s", self.remote_id, error)
            return
        self._unread = False
        end = len(data) if ended else data.rfind(b"\n") + 1
        for line in data[self._copied : end].decode(errors="replace").splitlines():
            self.log.info("[%s] %s", path.rpartition("/")[2], line)
        self._copied = max(end, self._copied)

    async def cancel(self, client: SuperfacilityClient) -> None:
        """Cancel the job."""
        await client.cancel(self.machine, str(self.remote_id))


class SuperfacilityStandingTrigger(PollingTrigger):
    """Waits until a machine takes jobs. There is nothing to cancel.

    :param remote_id: the machine

    Further arguments: see :class:`.PollingTrigger`.
    """

    what = "machine"

    async def connect(self) -> contextlib.AbstractAsyncContextManager[SuperfacilityClient]:
        """A client of the API."""
        return await SuperfacilityHook(self.conn_id).get_async_conn()

    async def look(self, client: SuperfacilityClient) -> dict[str, Any] | None:
        """Look how the machine stands."""
        machine = str(self.remote_id)
        standing = await client.standing(machine)
        if not standing.takes_jobs:
            return None
        return event(WaitStatus.REACHED, machine, f"machine {machine} is {standing.status}", {})

    async def cancel(self, client: SuperfacilityClient) -> None:
        """Nothing runs yet."""

    async def on_kill(self) -> None:
        """Nothing runs yet."""
