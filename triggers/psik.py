"""Waiting for a batch job, with what it prints shown in the task's log while it runs.

The wait renews the job's lease: when nobody waits any more, the job service ends the job by itself.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, Literal

from lclstream_airflow.hooks.patience import ServiceError
from lclstream_airflow.hooks.psik import AsyncJobClient, JobState, PsikHook, Transition, has_no_lease, job_facts
from lclstream_airflow.triggers.polling import PATIENCE_S, OnKill, PollingTrigger, WaitStatus, event

#: Most bytes of one log that one look copies into the task's log.
_PIECE = 16_384
#: How often a lease is renewed while it lasts.
_RENEWALS = 4


def judge(job_id: str, history: list[Transition]) -> dict[str, Any] | None:
    """Whether a job has ended, and how; None: it has not."""
    if not history:
        return None
    last = history[-1]
    facts = job_facts(job_id, history)
    if not last.state.is_final:
        return None
    if last.state is JobState.completed:
        return event(WaitStatus.REACHED, job_id, f"job {job_id} is completed", facts)
    why = f": {last.info}" if last.info else ""
    return event(WaitStatus.ENDED, job_id, f"job {job_id} is {last.state.value}{why}", facts)


class LogFollower:
    """Copies the growing logs of one job, whole lines only; it remembers how far it got.

    :param job_id: the job
    :param say: takes one line
    """

    def __init__(self, job_id: str, say: Callable[[str], object]) -> None:
        self._job_id = job_id
        self._say = say
        self._offsets: dict[str, int] = {}

    async def copy(self, client: AsyncJobClient, attempt: int, *, ended: bool) -> None:
        """Copy what is new.

        :param attempt: which start of the job, from 1; 0 before the first
        :param ended: whether the job has ended, so that a last line without an end is a line, too
        """
        for name in (f"stdout.{attempt}", f"stderr.{attempt}") if attempt else ():
            try:
                await self._copy(client, name, ended)
            except ServiceError as error:
                # 404: nothing was printed yet, or the published service, which has no such route.
                if error.status != 404:
                    raise

    async def _copy(self, client: AsyncJobClient, name: str, ended: bool) -> None:
        start = self._offsets.get(name, 0)
        part = await client.log_part(self._job_id, name, start, _PIECE)
        if part.end < part.size - _PIECE:
            # A task's log is for people: of a flood they get the end.
            start = part.size - _PIECE
            self._say(f"[{name}] … {start - part.offset} bytes are only in the job's own log …")
            part = await client.log_part(self._job_id, name, start, _PIECE)
        data = part.data
        if not (ended and part.end == part.size):
            whole = data.rfind(b"\n") + 1
            data = data[:whole] if whole or len(data) < _PIECE else data
        for line in data.decode(errors="replace").splitlines():
            self._say(f"[{name}] {line}")
        self._offsets[name] = part.offset + len(data)


class PsikJobTrigger(PollingTrigger):
    """Waits until a job has ended.

    :param follow_log: whether to copy what the job prints into the task's log while it runs (our job service only;
        the published psik-api cannot give pieces of a log)
    :param lease_s: the wait moves the end of the job's lease to that many seconds from now, again and again; None: the
        job has no lease, or somebody else keeps it
    :param until: ``"ended"``: wait for the job's end; ``"active"``: only until it runs
    """

    what = "job"

    def __init__(
        self,
        *,
        conn_id: str,
        remote_id: str,
        deadline: float,
        follow_log: bool = True,
        lease_s: float | None = None,
        until: Literal["ended", "active"] = "ended",
        poll_interval: float = 2.0,
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
        self.follow_log = follow_log
        self.lease_s = lease_s
        self.until = until
        self._renewed = -math.inf
        self._follower = LogFollower(str(remote_id), self.log.info)
        self._seen = 0
        self._unread = False

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        return {**super().arguments(), "follow_log": self.follow_log, "lease_s": self.lease_s, "until": self.until}

    async def connect(self) -> contextlib.AbstractAsyncContextManager[AsyncJobClient]:
        """A client of the job service."""
        return await PsikHook(self.conn_id).get_async_conn()

    async def look(self, client: AsyncJobClient) -> dict[str, Any] | None:
        """Renew the lease, say what has changed, copy what the job has printed since, judge its history."""
        job = str(self.remote_id)
        await self._renew(client, job)
        history = await client.history(job)
        for step in history[self._seen :]:
            self.log.info("job %s is %s: %s", job, step.state.value, step.info)
        self._seen = len(history)
        self._facts = job_facts(job, history)
        payload = judge(job, history)
        if payload is None and self.until == "active" and history and history[-1].state is JobState.active:
            payload = event(WaitStatus.REACHED, job, f"job {job} is active", self._facts)
        if self.follow_log and history:
            await self._copy_log(client, history[-1].jobndx, ended=payload is not None)
        return payload

    async def _copy_log(self, client: AsyncJobClient, attempt: int, *, ended: bool) -> None:
        try:
            await self._follower.copy(client, attempt, ended=ended)
        except ServiceError as error:
            # The job's end does not depend on what can be read of it.
            if not self._unread:
                self.log.warning("job %s: its log cannot be followed now: %s", self.remote_id, error)
            self._unread = True
        else:
            self._unread = False

    async def _renew(self, client: AsyncJobClient, job: str) -> None:
        if self.lease_s is None or time.monotonic() - self._renewed < self.lease_s / _RENEWALS:
            return
        try:
            await client.renew(job, self.lease_s)
        except ServiceError as error:
            if not has_no_lease(error):
                raise
        self._renewed = time.monotonic()

    async def cancel(self, client: AsyncJobClient) -> None:
        """Cancel the job."""
        await client.cancel(str(self.remote_id))
