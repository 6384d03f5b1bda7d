"""Waiting for a session's end, and for a session to have analysed one stream."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from lclstream_airflow.hooks.elog import ElogHook
from lclstream_airflow.hooks.patience import PeerError, ServiceError
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

    A logbook that is away, or knows no such experiment yet, ends nothing: it is asked again.
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
        self._logbook = ElogHook(elog_conn_id)
        self._asked = 0.0
        self._unheard = False

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        ours = {"elog_conn_id": self.elog_conn_id, "experiment": self.experiment, "tag": self.tag, "since": self.since}
        return {**super().arguments(), **ours, "ends_at": self.ends_at}

    async def look(self, client: AsyncJobClient) -> dict[str, Any] | None:
        """Renew the job's lease, then see whether anything ends the session."""
        payload = await super().look(client)
        if payload is not None:
            return payload if payload["status"] == WaitStatus.ENDED else self._over("its job")
        if self.ends_at is not None and time.time() >= self.ends_at:
            return self._over("time")
        if self.tag and time.time() - self._asked >= min(_LOGBOOK_EVERY_S, 5 * self.poll_interval):
            self._asked = time.time()
            if await self._logbook_says_so():
                return self._over("the logbook")
        return None

    async def _logbook_says_so(self) -> bool:
        """Whether there is such an entry; no trouble with the logbook may take a shift's nodes away."""
        since = datetime.fromtimestamp(self.since, UTC)
        try:
            # A client for each question reads our certificates again: a session outlives them.
            async with await self._logbook.get_async_conn() as logbook:
                entries = await logbook.elog_entries(self.experiment)
        except (PeerError, ValueError) as error:
            if not self._unheard:
                words = "whether the logbook ends session %s is not known; it is asked again and again: %s"
                self.log.warning(words, self.remote_id, error)
            self._unheard = True
            return False
        self._unheard = False
        return any(
            self.tag in entry.tags and entry.insert_time is not None and entry.insert_time >= since for entry in entries
        )

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
