"""Waiting for a session's end, and for a session to have analysed one stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from lclstream_airflow.hooks.elog import AsyncElogClient, ElogHook
from lclstream_airflow.hooks.patience import ServiceError
from lclstream_airflow.hooks.psik import AsyncJobClient, JobState
from lclstream_airflow.hooks.results import read_json
from lclstream_airflow.triggers.polling import WaitStatus, event
from lclstream_airflow.triggers.psik import PsikJobTrigger

#: The logbook is asked less often than the job: all its texts come with each answer.
_LOGBOOK_EVERY_S = 10.0


class SessionEndTrigger(PsikJobTrigger):
    """Waits until a session is to end: its time is over, the logbook says so, or its job has ended by itself.

    :param ends_at: when its time is over, in seconds since 1970; None: its job's longest run time
    :param elog_conn_id: connection of the logbook that may say so
    :param experiment: whose logbook
    :param tag: an entry with that tag, written after the session's begin, ends it; empty: none does
    :param since: the session's begin, in seconds since 1970
    """

    def __init__(
        self,
        *,
        ends_at: float | None,
        elog_conn_id: str,
        experiment: str,
        tag: str,
        since: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ends_at = ends_at
        self.elog_conn_id = elog_conn_id
        self.experiment = experiment
        self.tag = tag
        self.since = since
        self._logbook: AsyncElogClient | None = None
        self._asked = 0.0

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        ours = {"elog_conn_id": self.elog_conn_id, "experiment": self.experiment, "tag": self.tag, "since": self.since}
        return {**super().arguments(), **ours, "ends_at": self.ends_at}

    async def connect(self) -> contextlib.AbstractAsyncContextManager[AsyncJobClient]:
        """A client of the job service, and one of the logbook where that is needed."""
        return self._clients()

    @contextlib.asynccontextmanager
    async def _clients(self) -> AsyncIterator[AsyncJobClient]:
        async with contextlib.AsyncExitStack() as stack:
            if self.tag:
                logbook = await ElogHook(self.elog_conn_id).get_async_conn()
                self._logbook = await stack.enter_async_context(logbook)
            yield await stack.enter_async_context(await super().connect())

    async def look(self, client: AsyncJobClient) -> dict[str, Any] | None:
        """Renew the job's lease, then see whether anything ends the session."""
        payload = await super().look(client)
        if payload is not None:
            return payload if payload["status"] == WaitStatus.ENDED else self._over("its job")
        if self.ends_at is not None and time.time() >= self.ends_at:
            return self._over("time")
        if self._logbook is not None and time.time() - self._asked >= min(_LOGBOOK_EVERY_S, 5 * self.poll_interval):
            self._asked = time.time()
            since = datetime.fromtimestamp(self.since, UTC)
            for entry in await self._logbook.elog_entries(self.experiment):
                if self.tag in entry.tags and entry.insert_time is not None and entry.insert_time >= since:
                    return self._over("the logbook")
        return None

    def _over(self, by: str) -> dict[str, Any]:
        facts = {**self._facts, "ended_by": by}
        return event(WaitStatus.REACHED, self.remote_id, f"session {self.remote_id} is ended by {by}", facts)


class AcquisitionTrigger(PsikJobTrigger):
    """Waits until a session has analysed one stream.

    :param remote_id: the session's job and the stream's name, with a slash between them
    """

    what = "acquisition"

    async def look(self, client: AsyncJobClient) -> dict[str, Any] | None:
        """Look for the session's answer, then whether the session is still there."""
        job, _, name = str(self.remote_id).partition("/")
        answer = await self._answer(client, job, name)
        if answer is None:
            state = await client.state(job)
            if not state.is_final:
                return None
            # It may have answered in its last moment.
            answer = await self._answer(client, job, name)
            if answer is None:
                words = f"session {job} is {state.value} and has not analysed {name}"
                return event(WaitStatus.ENDED, self.remote_id, words, {"job_id": job, "state": JobState.failed.value})
        facts = {"job_id": job, **answer}
        if answer["state"] == "done":
            return event(WaitStatus.REACHED, self.remote_id, f"session {job} has analysed {name}", facts)
        words = f"the analysis of {name} in session {job} is {answer['state']} (exit code {answer['exit_code']})"
        return event(WaitStatus.ENDED, self.remote_id, words, facts)

    @staticmethod
    async def _answer(client: AsyncJobClient, job: str, name: str) -> dict[str, Any] | None:
        try:
            data = await client.download(job, f"outbox/{name}.json")
        except ServiceError as error:
            if error.status == 404:
                return None
            raise
        answer: dict[str, Any] = read_json(data)
        return answer

    async def cancel(self, client: AsyncJobClient) -> None:
        """End this analysis, not the session."""
        job, _, name = str(self.remote_id).partition("/")
        await client.upload(job, f"inbox/{name}.cancel", b"")
