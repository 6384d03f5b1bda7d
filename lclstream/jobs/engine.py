"""The owner of all jobs: makes them, starts them, follows them to their end, and finds them again after a restart.

The event loop owns everything here. Each live job has one task, and only that task adds to the job's history and
talks to its backend about it; whoever wants something of a job writes it down in the job's folder and rings the job's
bell. So there is nothing to lock, and nothing is lost when the service is killed: the next run reads the folders.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from lclstream.jobs import folders, pruning
from lclstream.jobs.backends import Backend, BackendUnavailableError, RefusedError, SubmissionRejectedError
from lclstream.jobs.backends.iri import IriBackend
from lclstream.jobs.backends.local import LocalBackend
from lclstream.jobs.backends.psik import PsikBackend
from lclstream.jobs.backends.slurm import SlurmBackend
from lclstream.jobs.config import BackendConfig, JobsConfig, Keep
from lclstream.jobs.config import IriBackend as IriConfig
from lclstream.jobs.config import LocalBackend as LocalConfig
from lclstream.jobs.config import PsikBackend as PsikConfig
from lclstream.jobs.config import SlurmBackend as SlurmConfig
from lclstream.jobs.job import Job
from lclstream.jobs.leases import Leases
from lclstream.jobs.machine import Fact, Report, advance
from lclstream.jobs.models import BackendInfo, Callback, JobSpec, JobState, Transition
from lclstream.jobs.outbox import Outbox
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.roles import NOBODY, Action, Person, RolesFile, Ruling

log = logging.getLogger(__name__)

#: Longest time between two tries when a backend cannot be asked or a disk is full, in seconds.
_RETRY_MOST_S = 30.0
#: Seconds within which all jobs end when the service ends them at its own stop.
_CANCEL_ALL_WITHIN_S = 60.0
#: Seconds between two looks for finished jobs whose folders are kept no longer.
_PRUNE_EVERY_S = 600.0
#: In which order jobs are taken up after a restart: those that run keep their places from those that wait for one.
_TAKEN_UP = {JobState.active: 0, JobState.queued: 1, JobState.new: 2}
#: Seconds for telling receivers about the jobs that ended with the service; the rest is told by its next run.
_LAST_CALLBACKS_WITHIN_S = 3.0


class PrefixInUseError(RuntimeError):
    """Another job service works in the same folder."""


class NoSuchJobError(LookupError):
    """There is no such job, or it belongs to somebody else."""


class NoSuchBackendError(LookupError):
    """The configuration names no such backend."""


class ConflictError(ValueError):
    """The request contradicts an earlier one: same idempotency key, other job; or the job has ended already."""


class Engine:
    """All jobs below one folder.

    Args:
        config: the service's configuration.
        credentials: its certificate folder, for callbacks.

    Raises:
        ConfigError: a backend cannot work on this machine.
        CredentialsError: the file of roles, or a backend's certificate folder, cannot be used.
        PrefixInUseError: another service has the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, config: JobsConfig, credentials: Credentials) -> None:
        self.config = config
        self.prefix = config.prefix.expanduser().resolve()
        self.prefix.mkdir(parents=True, exist_ok=True, mode=0o700)
        ours = self.prefix / ".service"
        ours.mkdir(exist_ok=True, mode=0o700)
        self._lock = os.open(ours / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise PrefixInUseError(
                f"{self.prefix}: another job service works in this folder; choose another `prefix`"
            ) from error
        self._roles = RolesFile(config.roles.expanduser()) if config.roles is not None else None
        self._outbox = Outbox(ours / "outbox.sqlite", config.callbacks, credentials, self._spec_of)
        self._jobs: dict[str, Job] = {}
        self._by_key: dict[tuple[str, str, str], str] = {}
        self._backends = {name: _backend(settings, credentials) for name, settings in config.backends.items()}
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._making = asyncio.Lock()
        self._made: set[asyncio.Task[Job]] = set()
        self._leases = Leases(self._lease_expired)
        self._watches: list[asyncio.Task[None]] = []

    # --- life of the service

    async def start(self) -> None:
        """Read all folders, and go on with every job that has not ended."""
        for backend in self._backends.values():
            await backend.start()
        for folder in folders.find(self.prefix):
            try:
                folder.repair_history()
                job = Job.load(folder)
            except (OSError, ValueError) as error:
                log.error("job %s is left alone: %s", folder.stamp, error)
                continue
            self._know(job, folder.notes())
            if job.has_callback:
                self._outbox.note(job.stamp, job.history)
        self._outbox.resume()
        live = [job for job in self._jobs.values() if job.is_live]
        log.info("%s: %d jobs, %d of them not ended", self.prefix, len(self._jobs), len(live))
        for job in sorted(live, key=lambda job: (_TAKEN_UP[job.state], job.last.time)):
            self._follow(job)
        for job in self._jobs.values():
            if job.lease_s is not None and not job.is_final and not job.cancel_requested:
                self._leases.renew(job.stamp, job.lease_s)
        self._watches.append(asyncio.create_task(self._leases.watch(), name="leases of jobs"))
        if self.config.keep != Keep():
            self._watches.append(asyncio.create_task(self._prune_again_and_again(), name="old jobs"))

    async def stop(self) -> None:
        """Stop following. Jobs keep running, unless the configuration says that they end with the service."""
        while self._made:
            await asyncio.wait(self._made)
        if self.config.cancel_jobs_on_exit:
            await self._cancel_all()
            await self._outbox.flush(_LAST_CALLBACKS_WITHIN_S)
        tasks = [*self._followers.values(), *self._watches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for backend in self._backends.values():
            await backend.close()
        await self._outbox.close()
        os.close(self._lock)

    async def _cancel_all(self) -> None:
        live = [job for job in self._jobs.values() if not job.is_final]
        for job in live:
            self.cancel(job)
        followers = [self._followers[job.stamp] for job in live if job.stamp in self._followers]
        if followers:
            await asyncio.wait(followers, timeout=_CANCEL_ALL_WITHIN_S)
        for job in live:
            if not job.is_final:
                log.error("job %s could not be ended within %g s", job.stamp, _CANCEL_ALL_WITHIN_S)

    async def _prune_again_and_again(self) -> None:
        while True:
            for job in pruning.superfluous(self._jobs.values(), self.config.keep, time.time()):
                await self._prune(job)
            await asyncio.sleep(_PRUNE_EVERY_S)

    async def _prune(self, job: Job) -> None:
        if job.stamp in self._followers or self._outbox.has_to_tell(job.stamp):
            return
        async with self._making:
            try:
                key = job.folder.notes().idempotency_key
                await asyncio.to_thread(folders.remove, job.folder)
            except (OSError, ValueError) as error:
                log.error("job %s is kept, its folder cannot be removed: %s", job.stamp, error)
                return
            del self._jobs[job.stamp]
            self._by_key.pop((job.login, job.issuer, key or ""), None)
        self._outbox.forget(job.stamp)
        log.info("job %s of %s is removed: %s since %s", job.stamp, job.login, job.state, _day(job.last.time))

    # --- requests

    async def make(
        self,
        spec: JobSpec,
        owner: Identity,
        *,
        start: bool,
        idempotency_key: str | None = None,
        lease_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Job:
        """Make a job.

        Args:
            spec: the job.
            owner: whose it is.
            start: whether it is started at once.
            idempotency_key: the same key with the same job gives the job made the first time.
            lease_s: seconds the job lives without a renewal of its lease; None: it gets none. For the job made the
                first time it is a renewal.
            tags: names and values to find it by; those given the first time stay.

        Raises:
            NoSuchBackendError: the specification names a backend that is not configured.
            RefusedError: an attribute, directory or callback is not allowed.
            ValueError: a resource or lease cannot be given.
            ConflictError: the key was used for another job.
            OSError: the folder cannot be written.
        """
        self._check_lease(lease_s)
        # A request that is cut off while it waits makes no job. From here on it makes a whole one: the thread that
        # makes the folder goes on, and nobody would know of that job before the next start; the same key would make
        # another one.
        await self._making.acquire()
        making = asyncio.create_task(self._make(spec, owner, start, idempotency_key, lease_s, tags), name="new job")
        self._made.add(making)
        making.add_done_callback(self._made.discard)
        return await asyncio.shield(making)

    async def _make(
        self,
        spec: JobSpec,
        owner: Identity,
        start: bool,
        idempotency_key: str | None,
        lease_s: float | None,
        tags: Mapping[str, str] | None,
    ) -> Job:
        """Make a job while we hold the lock, and let it go."""
        try:
            digest = _digest(spec)
            key = (owner.login, owner.issuer, idempotency_key) if idempotency_key is not None else None
            if key is not None and key in self._by_key:
                job = self._jobs[self._by_key[key]]
                if job.folder.notes().request_sha256 != digest:
                    raise ConflictError(f"idempotency key {idempotency_key!r} was used for another job, {job.stamp}")
            else:
                backend = self._check(spec)
                folder = await asyncio.to_thread(
                    folders.make,
                    self.prefix,
                    spec,
                    login=owner.login,
                    issuer=owner.issuer,
                    idempotency_key=idempotency_key,
                    request_sha256=digest,
                    backend=backend.psik_backend(),
                    start=start,
                    lease_s=lease_s,
                    tags=tags,
                )
                job = Job.load(folder)
                self._know(job, folder.notes())
            if lease_s is not None and not job.is_final and not job.cancel_requested:
                self.renew(job, lease_s)
            if start:
                self.start_job(job)
            return job
        finally:
            self._making.release()

    def _check_lease(self, lease_s: float | None) -> None:
        if lease_s is not None and lease_s > self.config.max_lease_s:
            raise ValueError(
                f"lease_s: {lease_s:g} s, and this service gives {self.config.max_lease_s:g} at most (`max_lease_s`): "
                "ask for less, and renew it"
            )

    def _check(self, spec: JobSpec) -> Backend:
        backend = self._backends.get(spec.backend)
        if backend is None:
            raise NoSuchBackendError(f"backend {spec.backend!r}: this service has {', '.join(sorted(self._backends))}")
        if spec.callback is not None and not self.config.callbacks.permit(spec.callback):
            raise RefusedError(
                f"callback {spec.callback}: this service does not allow it (its `callbacks.allow` lists what is)"
            )
        if spec.directory is not None:
            directory = Path(spec.directory)
            allowed = [allowed.resolve() for allowed in self.config.directories]
            if not directory.is_absolute() or not any(directory.resolve().is_relative_to(one) for one in allowed):
                raise RefusedError(
                    f"directory {spec.directory}: this service does not allow it (its `directories` lists what is)"
                )
            if not directory.is_dir():
                raise ValueError(f"directory: {spec.directory} is not there")
        backend.check(spec)
        return backend

    def start_job(self, job: Job) -> None:
        """Have a job started; without effect when it was.

        Raises:
            ConflictError: it was cancelled before it was started.
        """
        if job.is_final and not job.start_requested:
            raise ConflictError(f"job {job.stamp} is {job.state}: it cannot be started any more; make a new one")
        if not job.start_requested:
            job.folder.request_start()
            job.start_requested = True
        if not job.is_final:
            self._follow(job)

    def cancel(self, job: Job, reason: str = "") -> None:
        """Have a job ended; without effect on one that has ended.

        Args:
            job: the job.
            reason: for its history, when this is not its owner's wish.
        """
        if job.is_final:
            return
        if not job.cancel_requested:
            job.folder.request_cancel(reason)
            job.cancel_requested, job.cancel_reason = True, reason
        self._leases.drop(job.stamp)
        self._follow(job)

    def renew(self, job: Job, lease_s: float) -> float:
        """Let a job's lease end `lease_s` seconds from now; it gets one if it had none.

        Returns:
            When it ends, unix time.

        Raises:
            ValueError: the lease is longer than the configuration allows.
            ConflictError: the job has ended, or is being ended.
        """
        self._check_lease(lease_s)
        if job.is_final:
            raise ConflictError(f"job {job.stamp} has ended: it is {job.state}")
        if job.cancel_requested:
            why = f" ({job.cancel_reason})" if job.cancel_reason else ""
            raise ConflictError(f"job {job.stamp} is being cancelled{why}")
        if job.lease_s != lease_s:
            job.folder.keep_lease(lease_s)
            job.lease_s = lease_s
        self._leases.renew(job.stamp, lease_s)
        return time.time() + lease_s

    def _lease_expired(self, stamp: str) -> None:
        job = self._jobs[stamp]
        log.warning("job %s is cancelled: its lease of %g s was not renewed in time", stamp, job.lease_s or 0)
        try:
            self.cancel(job, f"its lease of {job.lease_s:g} s was not renewed in time")
        except OSError as error:
            # The disk is full, perhaps: the job must end all the same, soon.
            log.error("job %s cannot be cancelled, again soon: %s", stamp, error)
            self._leases.renew(stamp, _RETRY_MOST_S)

    def told(self, callback: Callback, body: bytes, signature: str | None) -> bool:
        """Take a signed callback of another service as a reason to look after a job.

        Args:
            callback: what it says.
            body: the raw body it came as.
            signature: value of ``x-hub-signature-256``.

        Returns:
            Whether it is about a job forwarded there, and signed with that job's secret.
        """
        for backend in self._backends.values():
            job = backend.told(callback.jobid, body, signature)
            if job is not None:
                job.bell.set()
                return True
        return False

    def job(self, stamp: str, caller: Identity, action: Action) -> Job:
        """One job, for what the caller wants to do with it.

        Raises:
            NoSuchJobError: there is none that he may see.
            RefusedError: he may see it, and not do this with it.
        """
        job = self._jobs.get(stamp)
        if job is None or not self._may(caller, Action.see, job):
            raise NoSuchJobError(f"no job {stamp}")
        if not (ruling := self._may(caller, action, job)):
            raise RefusedError(ruling.rule)
        return job

    def jobs(self, caller: Identity, *, others: bool = False) -> Iterable[Job]:
        """The caller's jobs, newest first; with `others` everybody's that he may see."""
        found = [
            job
            for job in self._jobs.values()
            if (Person.of(caller) == Person(login=job.login, issuer=job.issuer))
            or (others and self._may(caller, Action.see, job))
        ]
        return sorted(found, key=lambda job: float(job.stamp), reverse=True)

    def backends(self) -> dict[str, BackendInfo]:
        """Where jobs run, by name."""
        return {name: backend.info(name) for name, backend in sorted(self._backends.items())}

    def _may(self, caller: Identity, action: Action, job: Job) -> Ruling:
        roles = self._roles.current if self._roles is not None else NOBODY
        return roles.may(caller, action, owner=Person(login=job.login, issuer=job.issuer))

    # --- following

    def _know(self, job: Job, notes: folders.JobNotes) -> None:
        self._jobs[job.stamp] = job
        if notes.idempotency_key is not None:
            self._by_key[notes.login, notes.issuer, notes.idempotency_key] = job.stamp

    def _spec_of(self, stamp: str) -> JobSpec:
        job = self._jobs.get(stamp)
        if job is None:
            raise ValueError(f"job {stamp} is gone")
        return job.spec()

    def _follow(self, job: Job) -> None:
        job.bell.set()
        if job.stamp not in self._followers:
            self._followers[job.stamp] = asyncio.create_task(self._follow_to_end(job), name=f"job {job.stamp}")

    async def _follow_to_end(self, job: Job) -> None:
        failures = 0
        try:
            while True:
                job.bell.clear()
                try:
                    await self._look_after(job)
                    failures = 0
                except (BackendUnavailableError, OSError) as error:
                    failures += 1
                    log.warning("job %s: %s", job.stamp, error)
                except Exception as error:
                    failures += 1
                    log.exception("job %s: %s", job.stamp, error)
                if job.is_final:
                    return
                backend = self._backends.get(job.backend)
                pause = backend.poll_s if backend else _RETRY_MOST_S
                if failures:
                    pause = min(_RETRY_MOST_S, pause * 2 ** min(failures, 10))
                try:
                    await asyncio.wait_for(job.bell.wait(), pause)
                except TimeoutError:
                    continue
        finally:
            del self._followers[job.stamp]

    async def _look_after(self, job: Job) -> None:
        """Do the next thing for a job, and write down what is known about it."""
        backend = self._backends.get(job.backend)
        if backend is None:
            raise BackendUnavailableError(
                f"backend {job.backend!r} is no longer configured: nothing can be known about the job"
            )
        if job.state is JobState.new:
            await self._submit(job, backend)
        if not job.is_final and job.state is not JobState.new:
            await self._record(job, await backend.observe(job))
        if not job.is_final and job.cancel_requested and job.state is not JobState.new:
            await backend.cancel(job)

    async def _submit(self, job: Job, backend: Backend) -> None:
        if job.cancel_requested and not job.folder.attempt(job.jobndx).exists():
            await self._record(job, [Report(Fact.canceled, time.time())])
            return
        try:
            native_id = await backend.submit(job)
        except SubmissionRejectedError as error:
            await self._record(job, [Report(Fact.rejected, time.time(), info=str(error))])
            return
        await self._record(job, [Report(Fact.accepted, time.time(), info=native_id)])

    async def _record(self, job: Job, reports: list[Report]) -> None:
        """Put facts into the history: on disk first, then in memory, then to whoever is told."""
        added: list[Transition] = []
        for report in reports:
            if report.fact is Fact.canceled and not report.info:
                report = dataclasses.replace(report, info=job.cancel_reason)
            added += advance([*job.history, *added], report)
        if not added:
            return
        await asyncio.to_thread(job.folder.append, added)
        job.history.extend(added)
        if job.is_final:
            self._leases.drop(job.stamp)
        for line in added:
            log.info("job %s: attempt %d %s %s", job.stamp, line.jobndx, line.state.value, line.info)
        if job.has_callback:
            self._outbox.note(job.stamp, job.history)


def _backend(settings: BackendConfig, credentials: Credentials) -> Backend:
    match settings:
        case SlurmConfig():
            return SlurmBackend(settings)
        case PsikConfig():
            return PsikBackend(settings, credentials)
        case IriConfig():
            return IriBackend(settings)
        case LocalConfig():
            return LocalBackend(settings)


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


def _digest(spec: JobSpec) -> str:
    return hashlib.sha256(json.dumps(spec.document(), sort_keys=True).encode()).hexdigest()
