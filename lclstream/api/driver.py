"""One transfer's driver: does its effects in order, follows its jobs and buffers, watches its clocks."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from lclstream.api import launch
from lclstream.api.config import ApiConfig
from lclstream.api.models import JobState
from lclstream.api.states import Effect, Event, State, step
from lclstream.api.status import messages
from lclstream.api.store import Note, Role, Store
from lclstream.api.tables import JobRow, TransferRow
from lclstream.jobs.models import JobSpec, Transition
from lclstream.security.errors import PeerError, ServiceError

log = logging.getLogger(__name__)

#: Seconds until an effect that could not be done is tried again; doubled each time.
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 30.0
#: Period of looking whether a job that was cancelled has ended, and whether a starting buffer answers, in seconds.
_SOON_S = 0.25
#: How often a buffer's figures are written to the database, in seconds.
_KEEP_S = 5.0

_CHATTER = re.compile(r"\b(DEBUG|INFO)\b")
_TROUBLE = re.compile(r"error|critical|killed|cannot|failed|fatal", re.IGNORECASE)


class JobService(Protocol):
    """What a driver needs of :class:`lclstream.jobs.client.AsyncJobClient`."""

    async def create(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> str:
        """Make a job without starting it; the same key gives the same job."""

    async def upload(self, jobid: str, name: str, data: bytes) -> None:
        """Put a file into its work folder."""

    async def start(self, jobid: str) -> None:
        """Start it; without effect on a started one."""

    async def history(self, jobid: str) -> list[Transition]:
        """The states it reached."""

    async def cancel(self, jobid: str) -> None:
        """End it; without effect on a finished one."""

    async def download(self, jobid: str, path: str) -> bytes:
        """A file of its work folder."""

    async def logs(
        self, jobid: str, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> dict[str, str]:
        """Its logs, by name."""


class StatusReader(Protocol):
    """Reads one buffer's status over mutual TLS."""

    async def read(self) -> dict[str, Any]:
        """The status document.

        Raises:
            PeerError: the buffer does not answer (yet, or any more).
        """

    async def aclose(self) -> None:
        """Close its connection."""


class _NotYetError(Exception):
    """An effect waits for something that takes its time."""


class Driver:
    """Drives one transfer until nothing of it is left; see :mod:`.supervisor` for who calls whom.

    Args:
        transfer: its number.
        store: the transfers.
        jobs: the job service.
        config: the service's configuration.
        reader: makes a reader of a buffer's status from its URL.
        in_thread: runs a method of the store in a thread.
        timely: whether the clocks can be trusted: not while the time the database was away has still to be added.

    Attributes:
        documents: the buffers' last status documents.
    """

    def __init__(
        self,
        transfer: int,
        store: Store,
        jobs: JobService,
        config: ApiConfig,
        reader: Callable[[str], StatusReader],
        in_thread: Callable[..., Awaitable[Any]],
        timely: Callable[[], bool],
    ) -> None:
        self.transfer = transfer
        self.documents: list[dict[str, Any] | None] | None = None
        self._store = store
        self._jobs = jobs
        self._config = config
        self._reader = reader
        self._in_thread = in_thread
        self._timely = timely
        self._news = asyncio.Event()
        self._readers: dict[str, StatusReader] = {}
        self._trouble: dict[str, str] = {}
        self._retry_s = _FIRST_RETRY_S
        self._effects_due = self._poll_due = self._status_due = self._keep_due = 0.0
        self._empty_since: float | None = None

    def wake(self) -> None:
        """Something about this transfer was written: look at once."""
        self._news.set()

    async def run(self) -> None:
        """Drive the transfer until it is released."""
        # What happened while nobody looked comes before what ran out meanwhile: a transfer whose jobs have ended well
        # is not late.
        looked = False
        try:
            while True:
                self._news.clear()
                row: TransferRow = await self._in_thread(self._store.get, self.transfer)
                if row is None or row.released:
                    return
                if self.documents is None:
                    self.documents = list(row.buffers)
                if looked and await self._clocks(row):
                    continue
                if await self._effects() or await self._jobs_news(row) or await self._buffers_news(row):
                    continue
                if looked:
                    await self._rest(row)
                looked = True
        finally:
            for reader in self._readers.values():
                await reader.aclose()
            self._readers.clear()

    # Clocks

    async def _clocks(self, row: TransferRow) -> bool:
        if State(row.state).final or not self._timely():
            return False
        now = self._store.clock()
        if row.lease_expires is not None and now >= row.lease_expires:
            return await self._happen(Event.lease_expired, "its lease was not renewed in time")
        if row.deadline is not None and now >= row.deadline:
            if row.spill and State(row.state) is State.draining:
                return await self._happen(
                    Event.set_aside, f"nobody pulled the rest in time: the buffer writes it to {self._kept(row)}"
                )
            limit = self._config.limit_s(State(row.state))
            troubles = "".join(f": {text}" for text in self._trouble.values())
            reason = f"{State(row.state).phase} for more than {limit:g} s{troubles}{self._held(row)}"
            if State(row.state) is State.keeping:
                reason = (
                    f"the buffer has not ended within {limit:g} s{troubles}: whether it has kept everything in "
                    f"{self._kept(row)} is not known"
                )
            notes = await self._tails(await self._in_thread(self._store.jobs, self.transfer))
            return await self._happen(Event.time_limit, reason, notes)
        return False

    def _kept(self, row: TransferRow) -> str:
        folders = (launch.spill_folder(row, position, self._config) for position in range(len(row.endpoints)))
        return ", ".join(str(folder) for folder in folders)

    def _held(self, row: TransferRow) -> str:
        if State(row.state) is not State.draining:
            return ""
        held = sum(messages(document, "held") for document in self.documents or [] if document)
        return f": consumers have left {held} messages in the buffer" if held else ""

    async def _rest(self, row: TransferRow) -> None:
        now = self._now()
        due = [self._poll_due, self._status_due]
        if self._effects_due > now:
            due.append(self._effects_due)
        for moment in (row.lease_expires, row.deadline):
            if moment is not None and not State(row.state).final and self._timely():
                due.append(now + moment - self._store.clock())
        try:
            await asyncio.wait_for(self._news.wait(), max(0.01, min(due) - now))
        except TimeoutError:
            return
        # Somebody wrote something: perhaps about a job, so do not wait for the next period.
        self._effects_due = self._poll_due = 0.0

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # Effects

    async def _effects(self) -> bool:
        if self._now() < self._effects_due:
            return False
        for row in await self._in_thread(self._store.effects, self.transfer):
            try:
                await self._do(Effect(row.kind))
            except _NotYetError:
                self._effects_due = self._now() + _SOON_S
                return False
            except PeerError as error:
                if isinstance(error, ServiceError) and not error.retry and await self._refused(Effect(row.kind), error):
                    return True
                self._trouble["effect"] = str(error)
                log.warning("transfer %d: %s: %s; again in %g s", self.transfer, row.kind, error, self._retry_s)
                self._effects_due = self._now() + self._retry_s
                self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
                return False
            self._retry_s = _FIRST_RETRY_S
            self._trouble.pop("effect", None)
            await self._in_thread(self._store.effect_done, row.id)
            return True
        self._effects_due = 0.0
        return False

    async def _refused(self, effect: Effect, error: ServiceError) -> bool:
        if effect is Effect.start_buffer:
            return await self._happen(Event.buffer_failed, f"the buffer job was refused: {error.detail}")
        if effect is Effect.start_engine:
            return await self._happen(Event.engine_failed, f"the engine job was refused: {error.detail}")
        return False

    async def _do(self, effect: Effect) -> None:
        row: TransferRow = await self._in_thread(self._store.get, self.transfer)
        if effect is Effect.start_buffer:
            files = launch.buffer_files(row)
            for position in range(len(row.endpoints)):
                await self._start(Role.buffer, position, launch.buffer_job(row, position, self._config), files)
        elif effect is Effect.start_engine:
            files = {launch.CONFIG_FILE: json.dumps(row.config, indent=2).encode()}
            await self._start(Role.engine, 0, launch.engine_job(row, self._config), files)
        elif effect is Effect.stop_engine:
            await self._stop(Role.engine)
        elif effect is Effect.stop_buffer:
            await self._stop(Role.buffer)
        elif effect is Effect.collect:
            await self._collect()
        else:
            await self._in_thread(self._store.release, self.transfer)
            log.info("transfer %d: its ports are free", self.transfer)

    async def _start(self, role: Role, position: int, spec: JobSpec, files: dict[str, bytes]) -> None:
        # Unique over databases as well: a new one counts from 1 again, and the job service remembers.
        key = f"{spec.name}-{secrets.token_hex(8)}"
        job: JobRow | None = await self._in_thread(
            self._store.plan_job, self.transfer, role, position, key, spec.document()
        )
        if job is None or job.started:
            return
        jobid = job.jobid
        if jobid is None:
            jobid = await self._jobs.create(job.spec, idempotency_key=job.key)
            await self._in_thread(self._store.job_created, job.id, jobid)
        for name, data in files.items():
            await self._jobs.upload(jobid, name, data)
        await self._jobs.start(jobid)
        await self._in_thread(self._store.job_started, job.id)
        log.info("transfer %d: %s job %s started", self.transfer, role.value, jobid)

    async def _stop(self, role: Role) -> None:
        for job in await self._in_thread(self._store.jobs, self.transfer):
            if Role(job.role) is not role or JobState(job.state).is_final:
                continue
            jobid = job.jobid
            if jobid is None:
                # The job was asked for, and the answer was lost with a crash: the same key finds it, or makes one that
                # was never started.
                try:
                    jobid = await self._jobs.create(job.spec, idempotency_key=job.key)
                except ServiceError as error:
                    if error.retry:
                        raise
                    await self._in_thread(self._store.record, job.id, [self._lost(job, f"refused: {error.detail}")])
                    continue
                await self._in_thread(self._store.job_created, job.id, jobid)
            try:
                await self._jobs.cancel(jobid)
            except ServiceError as error:
                if error.status != 404:
                    raise
                await self._in_thread(self._store.record, job.id, [self._lost(job, "the job service does not know it")])
            log.info("transfer %d: %s job %s cancelled", self.transfer, role.value, jobid)

    async def _collect(self) -> None:
        jobs: Sequence[JobRow] = await self._in_thread(self._store.jobs, self.transfer)
        await self._follow(jobs, also_ended=True)
        jobs = await self._in_thread(self._store.jobs, self.transfer)
        if not all(JobState(job.state).is_final for job in jobs):
            raise _NotYetError
        # Without a summary, the figures asked for last are the last ones.
        documents: list[dict[str, Any] | None] = list(self.documents or [])
        for position, summary in (await self._summaries(jobs)).items():
            documents[position] = summary
        self.documents = documents
        await self._in_thread(self._store.keep_buffers, self.transfer, documents)

    async def _summaries(self, jobs: Iterable[JobRow]) -> dict[int, dict[str, Any]]:
        """The last figures of the buffers that have ended, by position; a buffer that was killed has none.

        Raises:
            PeerError: the job service does not answer.
        """
        found = {}
        for job in jobs:
            if Role(job.role) is not Role.buffer or not job.started or job.jobid is None:
                continue
            try:
                summary = json.loads(await self._jobs.download(job.jobid, launch.SUMMARY_FILE))
            except (ServiceError, ValueError) as error:
                if isinstance(error, ServiceError) and error.retry:
                    raise
                continue
            if isinstance(summary, dict):
                found[job.position] = summary
        return found

    async def _kept_news(self, row: TransferRow, jobs: Sequence[JobRow]) -> bool:
        """Whether the buffers have ended, and what they say they have kept."""
        buffers = [job for job in jobs if Role(job.role) is Role.buffer]
        if not all(JobState(job.state).is_final for job in buffers):
            return False
        try:
            summaries = await self._summaries(buffers)
        except PeerError as error:
            self._trouble["job"] = str(error)
            return False
        folders = self._kept(row)
        silent = [job for job in buffers if job.position not in summaries]
        if silent:
            ends = ", ".join(_reason(Event.buffer_failed, job) for job in silent)
            reason = (
                f"nobody pulled the rest in time, and it is not known whether it is kept in {folders}: without last "
                f"figures, {ends}. Was it killed while it wrote? Then give jobs more time to end (`kill_grace_s`)"
            )
            return await self._happen(Event.not_kept, reason, await self._tails(silent))
        lost = sum(messages(summary, "lost") for summary in summaries.values())
        if lost:
            reason = f"nobody pulled the rest in time, and {lost} messages are lost; what is kept is in {folders}"
            return await self._happen(Event.not_kept, reason, await self._tails(buffers))
        return await self._happen(Event.kept, f"nobody pulled the rest in time: it is kept in {folders}")

    # Jobs

    async def _jobs_news(self, row: TransferRow) -> bool:
        """Turn what the jobs did into events, from what is stored; ask the job service when it is time."""
        jobs: Sequence[JobRow] = await self._in_thread(self._store.jobs, self.transfer)
        if self._now() >= self._poll_due:
            self._poll_due = self._now() + self._config.poll_s
            await self._follow(jobs)
            jobs = await self._in_thread(self._store.jobs, self.transfer)
        if State(row.state).final:
            return False
        if State(row.state) is State.keeping:
            return await self._kept_news(row, jobs)
        if any(_ended_badly(job) for job in jobs):
            # A buffer that dies takes the engine with it within a moment: look at both before one is blamed.
            await self._follow(jobs)
            jobs = await self._in_thread(self._store.jobs, self.transfer)
        for event, job in events(jobs, len(row.endpoints)):
            if step(State(row.state), event) is None:
                continue
            notes = await self._tails([one for one in jobs if _ended_badly(one)])
            line = _telling_line(notes, job) if _ended_badly(job) else ""
            reason = _reason(event, job) + (f": {line}" if line else "")
            if await self._happen(event, reason, notes, job.jobndx):
                return True
        return False

    async def _follow(self, jobs: Iterable[JobRow], *, also_ended: bool = False) -> None:
        for job in jobs:
            if job.jobid is None or (JobState(job.state).is_final and not also_ended):
                continue
            try:
                history = await self._jobs.history(job.jobid)
            except ServiceError as error:
                if error.status != 404:
                    self._unknown(job, error)
                    continue
                history = [self._lost(job, "the job service does not know it any more")]
            except PeerError as error:
                # Not to be reached is not "ended": the job may well be running.
                self._unknown(job, error)
                continue
            self._trouble.pop("job", None)
            await self._in_thread(self._store.record, job.id, history)

    def _unknown(self, job: JobRow, error: PeerError) -> None:
        self._trouble["job"] = str(error)
        log.warning("transfer %d: how job %s is cannot be found out: %s", self.transfer, job.jobid, error)

    def _lost(self, job: JobRow, reason: str) -> Transition:
        return Transition(time=self._store.clock(), jobndx=job.jobndx, state=JobState.failed, info=reason)

    async def _tails(self, jobs: Iterable[JobRow]) -> list[Note]:
        """The end of what each job wrote, as log entries: stdout before stderr, which says most in its last line."""
        notes = []
        for job in jobs:
            if job.jobid is None or not job.started:
                continue
            # MPICH tells on stdout that a rank was killed.
            for stream in ("stdout", "stderr"):
                name = f"{stream}.{max(job.jobndx, 1)}"
                try:
                    logs = await self._jobs.logs(job.jobid, name, -self._config.tail_bytes, self._config.tail_bytes)
                except PeerError as error:
                    log.warning("transfer %d: %s of job %s: %s", self.transfer, name, job.jobid, error)
                    continue
                text = logs.get(name, "").strip()
                if text:
                    notes.append(Note(Role(job.role).client, JobState(job.state), text, job.jobndx))
        return notes

    # Buffers

    async def _buffers_news(self, row: TransferRow) -> bool:
        state = State(row.state)
        if state in (State.requested, State.emptied) or state.final:
            self._status_due = self._now() + self._config.poll_s
            return False
        if self._now() < self._status_due:
            return False
        self._status_due = self._now() + (_SOON_S if state is State.buffer_starting else self._config.status_s)
        answers = [await self._status(row, position) for position in range(len(row.endpoints))]
        documents = self.documents or []
        self.documents = [new or old for new, old in zip(answers, documents, strict=True)]
        if all(answers):
            self._trouble.pop("buffer", None)
        if self._now() >= self._keep_due and any(answers):
            self._keep_due = self._now() + _KEEP_S
            await self._in_thread(self._store.keep_buffers, self.transfer, self.documents)
        if state is State.buffer_starting and all(answers):
            return await self._happen(Event.buffer_answers, "consumers may connect")
        if state is State.draining and await self._drained(answers):
            return await self._happen(Event.buffer_drained, "the buffer is empty, and no producer is left")
        return False

    async def _status(self, row: TransferRow, position: int) -> dict[str, Any] | None:
        url = row.endpoints[position]["status"]
        if url not in self._readers:
            self._readers[url] = self._reader(url)
        try:
            document = await self._readers[url].read()
        except PeerError as error:
            self._trouble["buffer"] = str(error)
            if State(row.state) is not State.buffer_starting:
                # It may have ended, and the callback that says so may be lost.
                self._poll_due = min(self._poll_due, self._now() + _SOON_S)
            return None
        if document.get("name") != launch.buffer_name(row.id, position):
            self._trouble["buffer"] = f"at {url} somebody else's buffer answers, called {document.get('name')!r}"
            return None
        return document

    async def _drained(self, answers: Sequence[dict[str, Any] | None]) -> bool:
        empty = all(one and messages(one, "held") == 0 and one.get("producers") == 0 for one in answers)
        if not empty:
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since = self._now()
        return self._now() - self._empty_since >= self._config.settle_s

    async def _happen(self, event: Event, info: str, notes: Sequence[Note] = (), jobndx: int = 0) -> bool:
        state = await self._in_thread(self._store.happen, self.transfer, event, info, notes, jobndx)
        if state is None:
            return False
        log.info("transfer %d: %s: %s", self.transfer, state, info)
        self._effects_due = self._status_due = 0.0
        self._retry_s = _FIRST_RETRY_S
        return True


def events(jobs: Sequence[JobRow], buffers: int) -> list[tuple[Event, JobRow]]:
    """What the states of a transfer's jobs amount to, with the job that tells; a buffer's failure comes first.

    The same events come again and again while the jobs stay as they are: the table ignores what it has had, and nothing
    is lost when a crash comes between the news and what follows from it.

    Args:
        jobs: the transfer's jobs.
        buffers: how many buffers it has.
    """
    forwarders = [job for job in jobs if Role(job.role) is Role.buffer]
    found: list[tuple[Event, JobRow]] = [(Event.buffer_failed, job) for job in forwarders if _ended_badly(job)][:1]
    if len(forwarders) == buffers and all(job.started for job in forwarders):
        found.append((Event.buffer_submitted, forwarders[-1]))
    for job in jobs:
        if Role(job.role) is Role.engine:
            if _ended_badly(job):
                found.append((Event.engine_failed, job))
            elif JobState(job.state) is JobState.completed:
                found.append((Event.engine_completed, job))
            elif JobState(job.state) is JobState.active:
                found.append((Event.engine_active, job))
    if len(forwarders) == buffers and all(JobState(job.state) is JobState.completed for job in forwarders):
        found.append((Event.buffer_completed, forwarders[-1]))
    return found


def _ended_badly(job: JobRow) -> bool:
    return JobState(job.state) in (JobState.failed, JobState.canceled)


def _reason(event: Event, job: JobRow) -> str:
    what = f"the {job.role} job {job.jobid}"
    if event is Event.buffer_submitted:
        return f"{what} is submitted"
    if event is Event.engine_active:
        return f"{what} runs"
    if JobState(job.state) is JobState.completed:
        return f"{what} has completed"
    if JobState(job.state) is JobState.canceled:
        return f"{what} was cancelled at the job service"
    status = f"exit status {job.info}" if job.info.lstrip("-").isdigit() else job.info
    return f"{what} failed ({status or 'no reason given'})"


def _telling_line(notes: Sequence[Note], job: JobRow) -> str:
    """The last line of a job's output that speaks of an error, else the last line that is not mere information."""
    lines = [
        line.strip()
        for note in notes
        if note.client is Role(job.role).client
        for line in note.info.splitlines()
        if line.strip(" =-\t") and not _CHATTER.search(line)
    ]
    telling = [line for line in lines if _TROUBLE.search(line)]
    return (telling or lines or [""])[-1][:500]
