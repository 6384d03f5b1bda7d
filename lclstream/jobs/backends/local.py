"""Jobs as processes of this machine. Each has a runner (:mod:`lclstream.jobs.runner`) that outlives the service.

The event loop owns this object. It watches each runner by a pidfd, which tells the end of a process at once, even when
it is not our child because the service was restarted; a look every second is the second way to notice.

With `max_jobs` a job takes a place when its runner is started or found alive, and gives it back when its end is known.
Jobs without a place are `queued`; they start in the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclstream.jobs import runner
from lclstream.jobs.backends import BackendUnavailableError, RefusedError, plans
from lclstream.jobs.config import LocalBackend as LocalConfig
from lclstream.jobs.job import Job
from lclstream.jobs.machine import Fact, Report
from lclstream.jobs.models import BackendInfo, JobSpec

log = logging.getLogger(__name__)

#: Seconds beyond the grace time after which a runner that does not end its job is itself killed.
_STUCK_AFTER_S = 20.0


@dataclass
class _Watch:
    process: subprocess.Popen[bytes] | None
    pidfd: int | None


class LocalBackend:
    """See the module's text.

    Args:
        config: its settings.
    """

    poll_s = 1.0

    def __init__(self, config: LocalConfig) -> None:
        self._config = config
        self._watches: dict[str, _Watch] = {}
        self._canceled: dict[str, float] = {}
        #: Jobs that have a place.
        self._placed: set[str] = set()
        #: Jobs that wait for one, the first to come first.
        self._waiting: dict[str, Job] = {}
        self._boot_id = runner.boot_id()

    def check(self, spec: JobSpec) -> None:
        """See :class:`lclstream.jobs.backends.Backend`."""
        if spec.attributes:
            raise RefusedError(f"attributes {sorted(spec.attributes)}: a job of a `local` backend has no attributes")
        if spec.resources.duration > self._config.max_duration_min:
            raise ValueError(
                f"resources.duration: {spec.resources.duration} min, "
                f"and this backend allows {self._config.max_duration_min:g}"
            )
        if (spec.resources.node_count or 1) > 1:
            raise ValueError(f"resources.node_count: {spec.resources.node_count}, and a `local` backend has one node")

    def psik_backend(self) -> dict[str, object]:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return {"type": "local"}

    def info(self, name: str) -> BackendInfo:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return BackendInfo(
            name=name,
            full_name=name,
            description=self._config.description,
            system_type="local",
            status="active",
            configuration=self._config.model_dump(mode="json"),
        )

    def told(self, native_id: str, body: bytes, signature: str | None) -> Job | None:
        """Nobody sends callbacks about local jobs."""
        return None

    async def start(self) -> None:
        """Nothing is needed."""

    async def submit(self, job: Job) -> str:
        """Start a runner. Of several for one attempt, only the first to write ``runner.json`` does anything.

        Returns:
            Its process id; words where it has to wait for a place.
        """
        attempt = job.folder.attempt(job.jobndx)
        if (claim := plans.read(attempt / "runner.json")) is not None:
            self._placed.add(job.stamp)
            return str(claim["pid"])
        try:
            attempt.mkdir(exist_ok=True)
            spec = job.spec()
            mpirun = f"{self._config.mpirun} -n {spec.resources.processes}"
            plans.write(job, spec, mpirun=mpirun, grace_s=self._config.kill_grace_s, nodes="1")
            if not self._take_place(job):
                return f"waits: {self._config.max_jobs} jobs run here at a time"
            return str(self._launch(job))
        except OSError as error:
            raise BackendUnavailableError(f"the runner cannot be started: {error}") from error

    def _take_place(self, job: Job) -> bool:
        """Whether the job may start now; otherwise it stands in the queue."""
        if job.stamp in self._placed:
            return True
        self._waiting.setdefault(job.stamp, job)
        full = self._config.max_jobs is not None and len(self._placed) >= self._config.max_jobs
        if full or next(iter(self._waiting)) != job.stamp:
            return False
        del self._waiting[job.stamp]
        self._placed.add(job.stamp)
        self._call_next()
        return True

    def _call_next(self) -> None:
        if self._waiting:
            next(iter(self._waiting.values())).bell.set()

    def _launch(self, job: Job) -> int:
        read, write = os.pipe()
        try:
            with open(job.folder.log / "console", "ab") as console:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", runner.__file__, str(job.folder.control), str(job.jobndx), str(write)],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    cwd=job.folder.path,
                    pass_fds=(write,),
                    start_new_session=True,
                )
        except OSError:
            os.close(read)
            raise
        finally:
            os.close(write)
        loop = asyncio.get_running_loop()

        def began() -> None:
            loop.remove_reader(read)
            os.close(read)
            job.bell.set()

        loop.add_reader(read, began)
        self._watch(job, process.pid, process)
        return process.pid

    def _watch(self, job: Job, pid: int, process: subprocess.Popen[bytes] | None) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if not isinstance(error, ProcessLookupError):
                log.debug("no pidfd for %d (%s): looking once a second instead", pid, error)
            self._watches[job.stamp] = _Watch(process, None)
            return
        watch = self._watches[job.stamp] = _Watch(process, pidfd)
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            watch.pidfd = None
            if process is not None:
                process.poll()  # collects it
            if job.is_final:
                self._watches.pop(job.stamp, None)
            job.bell.set()

        loop.add_reader(pidfd, ended)

    async def observe(self, job: Job) -> list[Report]:
        """Read what the runner wrote, and look whether it lives."""
        attempt = job.folder.attempt(job.jobndx)
        claim = plans.read(attempt / "runner.json")
        if claim is None:
            claim = self._unclaimed(job, attempt)
            if claim is None:
                return []
        self._waiting.pop(job.stamp, None)
        self._placed.add(job.stamp)
        watch = self._watches.get(job.stamp)
        if watch is None and self._lives(claim):
            self._watch(job, claim["pid"], None)
        reports = []
        if claim["time"]:
            reports.append(Report(Fact.running, claim["time"], job.jobndx, claim["host"]))
        # In this order: a runner that has gone wrote what it had to write before.
        lives = self._lives(claim)
        ended = plans.read(attempt / "exit.json")
        if ended is None and not lives:
            ended = await self._runner_is_gone(job, attempt, claim)
        if ended is not None:
            self._forget(job)
            reports.append(plans.outcome(job, ended))
        return reports

    def _lives(self, claim: dict[str, Any]) -> bool:
        return claim["boot_id"] == self._boot_id and runner.is_alive(claim["pid"], claim["start_ticks"])

    def _unclaimed(self, job: Job, attempt: Path) -> dict[str, Any] | None:
        """No runner has begun: start one when none is on its way, or find out that it could not."""
        watch = self._watches.get(job.stamp)
        if watch is not None and watch.process is not None and watch.process.poll() is None:
            return None
        if (claim := plans.read(attempt / "runner.json")) is not None:
            return claim
        if job.cancel_requested or watch is not None:
            # It was stopped, or failed, before it could begin: take its place, so that no other can begin later.
            nobody = {"pid": 0, "start_ticks": 0, "boot_id": "", "host": "", "jobid": "", "time": 0.0}
            try:
                runner.write_once(attempt / "runner.json", nobody)
            except FileExistsError:
                return plans.read(attempt / "runner.json")
            message = f"the runner could not start: {_tail(job.folder.log / 'console')}"
            reason = "terminated" if job.cancel_requested else "error"
            runner.write_once(
                attempt / "exit.json", {"reason": reason, "code": None, "message": message, "time": time.time()}
            )
            return nobody
        if not self._take_place(job):
            return None
        try:
            self._launch(job)
        except OSError as error:
            raise BackendUnavailableError(f"the runner cannot be started: {error}") from error
        return None

    async def _runner_is_gone(self, job: Job, attempt: Path, claim: dict[str, Any]) -> dict[str, Any]:
        """The runner was killed: end what it left, and write down what it could not."""
        same_boot = claim["boot_id"] == self._boot_id
        if same_boot:
            await asyncio.to_thread(_kill_members, job.folder.path, claim)
        message = "its runner was killed" if same_boot else "the machine was restarted while it ran"
        outcome = {
            "reason": "terminated" if job.cancel_requested else "error",
            "code": None,
            "message": message,
            "time": time.time(),
        }
        try:
            runner.write_once(attempt / "exit.json", outcome)
        except FileExistsError:
            outcome = plans.read(attempt / "exit.json") or outcome
        return outcome

    async def cancel(self, job: Job) -> None:
        """SIGTERM to the runner, which ends its script; SIGKILL to all of them when it does not."""
        asked = self._canceled.setdefault(job.stamp, time.monotonic())
        claim = plans.read(job.folder.attempt(job.jobndx) / "runner.json")
        watch = self._watches.get(job.stamp)
        if time.monotonic() - asked > self._config.kill_grace_s + _STUCK_AFTER_S:
            log.error("job %s: its runner does not end it: killing both", job.stamp)
            await asyncio.to_thread(_kill_members, job.folder.path, claim)
        elif watch is not None and watch.pidfd is not None:
            try:
                signal.pidfd_send_signal(watch.pidfd, signal.SIGTERM)
            except ProcessLookupError:
                job.bell.set()
        elif claim is not None and self._lives(claim):
            os.kill(claim["pid"], signal.SIGTERM)

    def _forget(self, job: Job) -> None:
        self._canceled.pop(job.stamp, None)
        self._waiting.pop(job.stamp, None)
        self._placed.discard(job.stamp)
        self._call_next()
        watch = self._watches.get(job.stamp)
        if watch is not None and watch.pidfd is None:
            if watch.process is not None:
                # Its last words are written; it needs a moment to go.
                watch.process.wait(runner.KILLED_WITHIN_S)
            del self._watches[job.stamp]

    async def close(self) -> None:
        """Stop watching. The runners go on."""
        loop = asyncio.get_running_loop()
        for watch in self._watches.values():
            if watch.pidfd is not None:
                loop.remove_reader(watch.pidfd)
                os.close(watch.pidfd)
            if watch.process is not None and watch.process.poll() is None:
                watch.process.returncode = 0  # it is init's child from now on, and no leak of ours
        self._watches.clear()


def _members(base: Path, claim: dict[str, Any] | None) -> list[int]:
    """Processes of a job whose runner is gone: of its session, or with its folder in their environment."""
    mark = b"base=" + os.fsencode(base) + b"\0"
    everybody = runner.processes()
    session = claim["pid"] if claim else 0
    # While a session has members its number is not given to a new process; if another process has it, it has none.
    if session in everybody and claim and everybody[session][3] != claim["start_ticks"]:
        session = 0
    found = []
    for pid, (state, _, in_session, _) in everybody.items():
        if state in "ZX" or pid == os.getpid():
            continue
        try:
            if (session and in_session == session) or mark in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue  # somebody else's, or gone
    return found


def _kill_members(base: Path, claim: dict[str, Any] | None) -> None:
    deadline = time.monotonic() + runner.KILLED_WITHIN_S
    while members := _members(base, claim):
        if time.monotonic() > deadline:
            log.error("%s: processes %s cannot be killed", base, members)
            return
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _tail(path: Path, size: int = 500) -> str:
    try:
        return path.read_bytes()[-size:].decode(errors="replace").strip() or "it said nothing"
    except OSError:
        return "it said nothing"
