"""Waiting for a job of the ARP's job interface."""

from __future__ import annotations

import contextlib
from typing import Any

from lclstream_airflow.hooks.jid import LIVE, JobInterfaceClient, JobInterfaceHook
from lclstream_airflow.triggers.polling import PATIENCE_S, OnKill, PollingTrigger, WaitStatus, event


class JobInterfaceTrigger(PollingTrigger):
    """Waits until a job has ended.

    :param experiment: whose job it is
    :param document: the job's document, without any token
    :param authorization: for waiting in the worker only; it is never serialized. A trigger in the triggerer has the
        token of its connection

    Further arguments: see :class:`.PollingTrigger`.
    """

    what = "job"

    def __init__(
        self,
        *,
        conn_id: str,
        remote_id: str,
        deadline: float,
        experiment: str,
        document: dict[str, Any],
        poll_interval: float = 5.0,
        patience_s: float = PATIENCE_S,
        on_kill_policy: str = OnKill.CANCEL,
        authorization: str | None = None,
    ) -> None:
        super().__init__(
            conn_id=conn_id,
            remote_id=remote_id,
            deadline=deadline,
            poll_interval=poll_interval,
            patience_s=patience_s,
            on_kill_policy=on_kill_policy,
        )
        self.experiment = experiment
        self.document = document
        self._authorization = authorization
        self._status = ""

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`; without the token."""
        return {**super().arguments(), "experiment": self.experiment, "document": self.document}

    async def connect(self) -> contextlib.AbstractAsyncContextManager[JobInterfaceClient]:
        """A client of the job interface."""
        return await JobInterfaceHook(self.conn_id, self._authorization).get_async_conn()

    async def look(self, client: JobInterfaceClient) -> dict[str, Any] | None:
        """Look at the job's status."""
        known = await client.status(self.document)
        status = str(known.get("status") or "")
        if status != self._status:
            self.log.info("job %s is %s", self.remote_id, status)
        self._status = status
        self._facts = {"job_id": self.remote_id, "state": status}
        if status in LIVE or not status:
            return None
        if status == "DONE":
            return event(WaitStatus.REACHED, self.remote_id, f"job {self.remote_id} is DONE", self._facts)
        return event(WaitStatus.ENDED, self.remote_id, f"job {self.remote_id} is {status}", self._facts)

    async def cancel(self, client: JobInterfaceClient) -> None:
        """Kill the job."""
        await client.kill(self.experiment, self.document)
