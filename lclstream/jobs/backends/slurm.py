"""Jobs of a Slurm cluster. The scheduler says where a job is; its runner's notes say exactly how its script ended.

The event loop owns this object. One `squeue --json` a period answers for all jobs; what it no longer lists is asked
from `sacct`, or read from the runner's notes where there is no accounting. A query that fails says nothing about any
job. The job folders must be on a file system the compute nodes share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from lclstream.config_file import ConfigError
from lclstream.jobs import runner
from lclstream.jobs.backends import BackendUnavailableError, RefusedError, SubmissionRejectedError, plans
from lclstream.jobs.config import SlurmBackend as SlurmConfig
from lclstream.jobs.job import Job
from lclstream.jobs.machine import Fact, Report
from lclstream.jobs.models import BackendInfo, JobSpec

log = logging.getLogger(__name__)

#: What sbatch and squeue say when the controller cannot be asked: not a judgement about the job.
_AWAY = (
    "unable to contact slurm controller",
    "slurm controller not responding",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "zero bytes were transmitted",
    "slurm_persist_conn_open",
    "resource temporarily unavailable",
    "unable to establish",
    "authentication credential",
)
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
#: Seconds between two scancel of the same job.
_CANCEL_AGAIN_S = 10.0
#: A job that squeue, sacct and the runner's notes do not know for this long is gone, in seconds.
_GONE_AFTER_S = 15.0


@dataclass(frozen=True)
class _Record:
    """What the scheduler knows about a job."""

    state: str
    restarts: int
    started: float
    ended: float
    exit_code: str
    nodes: str
    reason: str


@dataclass
class _Snapshot:
    at: float = -math.inf
    records: dict[str, _Record] = field(default_factory=dict)
    #: job folder -> scheduler's id, to find a submission whose answer was lost.
    by_comment: dict[str, str] = field(default_factory=dict)


class SlurmBackend:
    """See the module's text.

    Args:
        config: its settings.

    Raises:
        ConfigError: Slurm's commands are not installed here.
    """

    def __init__(self, config: SlurmConfig) -> None:
        self._config = config
        self.poll_s = config.poll_s
        self._snapshot = _Snapshot()
        self._asking = asyncio.Lock()
        self._canceled: dict[str, float] = {}
        self._missing: dict[str, float] = {}
        self._trouble = ""
        self._commands = {name: _found(name) for name in ("sbatch", "squeue", "scancel")}
        self._sacct = shutil.which("sacct")

    def check(self, spec: JobSpec) -> None:
        """See :class:`lclstream.jobs.backends.Backend`."""
        for name, value in spec.attributes.items():
            if name not in self._config.allow_attributes:
                allowed = ", ".join(sorted(self._config.allow_attributes)) or "none"
                raise RefusedError(f"attributes: {name}: this backend does not allow it; allowed: {allowed}")
            if any(not character.isprintable() for character in value):
                raise RefusedError(f"attributes: {name}: its value has characters that cannot be printed")
        if spec.resources.duration > self._config.max_duration_min:
            raise ValueError(
                f"resources.duration: {spec.resources.duration} min, "
                f"and this backend allows {self._config.max_duration_min:g}"
            )

    def psik_backend(self) -> dict[str, object]:
        """See :class:`lclstream.jobs.backends.Backend`."""
        known = {
            "type": "slurm",
            "queue_name": self._config.queue_name,
            "project_name": self._config.project_name,
            "reservation_id": self._config.reservation_id,
        }
        return {key: value for key, value in known.items() if value is not None}

    def info(self, name: str) -> BackendInfo:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return BackendInfo(
            name=name,
            full_name=name,
            description=self._config.description,
            system_type="slurm",
            status="unavailable" if self._trouble else "active",
            notes=[self._trouble] if self._trouble else [],
            configuration=self._config.model_dump(mode="json"),
        )

    def told(self, native_id: str, body: bytes, signature: str | None) -> Job | None:
        """Nobody sends callbacks about Slurm's jobs."""
        return None

    async def start(self) -> None:
        """Nothing is needed."""

    async def submit(self, job: Job) -> str:
        """Give the job to sbatch; after a lost answer, look for it first."""
        attempt = job.folder.attempt(1)
        if attempt.exists():
            # An earlier call, perhaps of an earlier run of the service, may have succeeded.
            snapshot = await self._ask(fresh=True)
            if (known := snapshot.by_comment.get(_comment(job))) is not None:
                return known
        spec = job.spec()
        plans.write(
            job, spec, mpirun=self._config.mpirun, grace_s=self._config.kill_grace_s, keep_environment=("SLURM_",)
        )
        attempt.mkdir(exist_ok=True)
        status, out, words = await self._run("sbatch", *self._arguments(job, spec), stdin=_script(job, self._python))
        if status != 0:
            if _is_away(words):
                self._trouble = f"sbatch: {words}"
                raise BackendUnavailableError(self._trouble)
            raise SubmissionRejectedError(words or f"sbatch ended with {status}")
        # `--parsable` prints "<id>" or "<id>;<cluster>".
        return out.strip().split(";")[0]

    @property
    def _python(self) -> str:
        return self._config.python or sys.executable

    def _arguments(self, job: Job, spec: JobSpec) -> list[str]:
        resources = spec.resources
        arguments = [
            "--parsable",
            f"--comment={_comment(job)}",
            f"--job-name={spec.name or 'lclstream'}",
            f"--output={job.folder.log}/console",
            "--open-mode=append",
            f"--chdir={job.folder.path}",
            f"--time={math.ceil(resources.duration)}",
            f"--cpus-per-task={resources.cpu_cores_per_process}",
        ]
        optional: dict[str, object] = {
            "--nodes": resources.node_count,
            "--ntasks": resources.process_count,
            "--ntasks-per-node": resources.processes_per_node,
            "--gpus-per-task": resources.gpu_cores_per_process or None,
            "--partition": self._config.queue_name,
            "--account": self._config.project_name,
            "--reservation": self._config.reservation_id,
        }
        arguments += [f"{name}={value}" for name, value in optional.items() if value is not None]
        if resources.exclusive_node_use:
            arguments.append("--exclusive")
        for name, value in {**self._config.attributes, **spec.attributes}.items():
            arguments.append(f"{name}={value}" if value else name)
        return arguments

    async def observe(self, job: Job) -> list[Report]:
        """What squeue says, with the exact times and exit codes of the runner's notes."""
        snapshot = await self._ask()
        native_ids = _native_ids(job)
        record = next((snapshot.records[one] for one in native_ids if one in snapshot.records), None)
        if record is None:
            try:
                record = await self._account(native_ids[0])
            except BackendUnavailableError:
                if (reports := self._from_notes(job)) is not None:
                    return reports
                raise
        if record is None:
            return self._vanished(job)
        self._missing.pop(job.stamp, None)
        return self._reports(job, record)

    def _reports(self, job: Job, record: _Record) -> list[Report]:
        jobndx = 1 + record.restarts
        if record.state in _WAITING:
            # Only news when the scheduler put the job back into its queue.
            return [Report(Fact.accepted, time.time(), jobndx, job.native_id or "")] if jobndx > job.jobndx else []
        attempt = job.folder.attempt(jobndx)
        claim = plans.read(attempt / "runner.json")
        reports = []
        if record.state in _RUNNING or claim is not None:
            began = claim["time"] if claim else record.started or time.time()
            reports.append(Report(Fact.running, began, jobndx, claim["nodes"] if claim else record.nodes))
        if record.state in _RUNNING:
            return reports
        ended = plans.read(attempt / "exit.json")
        reports.append(_end(job, record, ended, jobndx))
        self._canceled.pop(job.stamp, None)
        return reports

    def _from_notes(self, job: Job) -> list[Report] | None:
        """How the job ended by what its latest runner wrote; None when none wrote that."""
        for jobndx in range(job.jobndx + 9, 0, -1):
            attempt = job.folder.attempt(jobndx)
            ended = plans.read(attempt / "exit.json")
            if ended is not None:
                claim = plans.read(attempt / "runner.json")
                running = [Report(Fact.running, claim["time"], jobndx, claim["nodes"])] if claim else []
                return [*running, plans.outcome(job, ended, jobndx)]
        return None

    def _vanished(self, job: Job) -> list[Report]:
        """The scheduler answers, and does not know the job any more."""
        if (reports := self._from_notes(job)) is not None:
            return reports
        since = self._missing.setdefault(job.stamp, time.monotonic())
        if time.monotonic() - since < _GONE_AFTER_S:
            return []
        del self._missing[job.stamp]
        if job.cancel_requested:
            return [Report(Fact.canceled, time.time())]
        return [Report(Fact.broken, time.time(), info="Slurm no longer knows the job, and it left no exit code")]

    async def cancel(self, job: Job) -> None:
        """Scancel, and again after a while when it had no effect."""
        if time.monotonic() - self._canceled.get(job.stamp, -math.inf) < _CANCEL_AGAIN_S:
            return
        status, _, words = await self._run("scancel", *_native_ids(job))
        if status != 0 and _is_away(words):
            raise BackendUnavailableError(f"scancel: {words}")
        self._canceled[job.stamp] = time.monotonic()
        self._snapshot.at = -math.inf

    async def close(self) -> None:
        """Nothing is kept open."""

    # --- asking the scheduler

    async def _ask(self, *, fresh: bool = False) -> _Snapshot:
        """The scheduler's list of jobs, at most a period old.

        Raises:
            BackendUnavailableError: it could not be asked.
        """
        async with self._asking:
            if not fresh and time.monotonic() - self._snapshot.at < self._config.poll_s * 0.9:
                return self._snapshot
            try:
                self._snapshot = await self._list()
            except BackendUnavailableError as error:
                self._trouble = str(error)
                raise
            self._trouble = ""
            return self._snapshot

    async def _list(self) -> _Snapshot:
        began = time.monotonic()
        status, out, words = await self._run("squeue", "--json", "--me")
        if status != 0:
            raise BackendUnavailableError(f"squeue: {words or f'ended with {status}'}")
        try:
            document = json.loads(out)
            if document.get("errors"):
                raise BackendUnavailableError(f"squeue: {document['errors']}")
            return _snapshot_of(document, began)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendUnavailableError(f"squeue --json printed what we cannot read: {error}") from error

    async def _account(self, native_id: str) -> _Record | None:
        """What accounting knows about a job that squeue does not list; None where there is no accounting."""
        if self._sacct is None:
            return None
        fields = "State,Start,End,ExitCode,NodeList,Reason"
        try:
            status, out, words = await self._run("sacct", "-n", "-P", "-X", "-D", "-j", native_id, "-o", fields)
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"sacct: {error}") from error
        if status != 0:
            if "accounting storage is disabled" in words.lower():
                self._sacct = None
                return None
            raise BackendUnavailableError(f"sacct: {words}")
        return _accounted(out.strip().splitlines())

    async def _run(self, name: str, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        """Run one of Slurm's commands within a bound; returns exit status, output and its words.

        Raises:
            BackendUnavailableError: it did not end in time, or could not be started.
        """
        program = self._sacct if name == "sacct" else self._commands[name]
        assert program is not None
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise BackendUnavailableError(f"{name} cannot be started: {error}") from error
        try:
            async with asyncio.timeout(self._config.command_timeout_s):
                out, words = await process.communicate(stdin.encode())
        except TimeoutError as error:
            raise BackendUnavailableError(f"{name}: no answer within {self._config.command_timeout_s:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode(errors="replace"), words.decode(errors="replace").strip()


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ConfigError(
            f"backends: type slurm needs the command {name}, which is not in PATH: run the service on a machine that "
            "submits to the cluster"
        )
    return path


def _native_ids(job: Job) -> list[str]:
    """The scheduler's ids of a job: of the submission that runs the script, then of the one we know of.

    They differ when the answer to a submission was lost and it was found out too late to prevent a second one, whose
    runner then did nothing.
    """
    claim = plans.read(job.folder.attempt(job.jobndx) / "runner.json")
    return list(dict.fromkeys(one for one in (claim and claim["jobid"], job.native_id) if one))


def _comment(job: Job) -> str:
    return f"lclstream:{job.folder.path}"


def _script(job: Job, python: str) -> str:
    """What sbatch gets on its standard input. The number of the attempt is known only when it starts."""
    words = [_quoted(word) for word in (python, "-I", "-S", runner.__file__, str(job.folder.control))]
    return f'#!/bin/sh\nexec {" ".join(words)} "$((1 + ${{SLURM_RESTART_COUNT:-0}}))"\n'


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _is_away(words: str) -> bool:
    return any(sign in words.lower() for sign in _AWAY)


def _end(job: Job, record: _Record, ended: dict[str, Any] | None, jobndx: int) -> Report:
    if record.state == "COMPLETED" and ended is None:
        return Report(Fact.succeeded, record.ended or time.time(), jobndx, "0")
    if record.state in ("COMPLETED", "FAILED") and ended is not None:
        return plans.outcome(job, ended, jobndx)
    when = ended["time"] if ended is not None else record.ended or time.time()
    if record.state.startswith("CANCELLED"):
        return Report(Fact.canceled, when, jobndx)
    reason = "" if record.reason in ("", "None") else f" ({record.reason})"
    words = f"exit code {record.exit_code}" if record.state == "FAILED" else f"{record.state}{reason}"
    return Report(Fact.broken, when, jobndx, words)


def _snapshot_of(document: dict[str, Any], at: float) -> _Snapshot:
    snapshot = _Snapshot(at)
    for entry in document["jobs"]:
        native_id = str(entry["job_id"])
        state = entry["job_state"]
        snapshot.records[native_id] = _Record(
            # Since 23.11 a list, the base state first.
            state=state[0] if isinstance(state, list) else state,
            restarts=int(_number(entry.get("restart_cnt", 0))),
            started=_number(entry.get("start_time", 0)),
            ended=_number(entry.get("end_time", 0)),
            exit_code=_exit_code(entry.get("exit_code", 0)),
            nodes=entry.get("nodes") or "",
            reason=entry.get("state_reason") or "",
        )
        comment = entry.get("comment") or ""
        if isinstance(comment, str) and comment.startswith("lclstream:"):
            snapshot.by_comment[comment] = native_id
    return snapshot


def _number(value: Any) -> float:
    """A number as Slurm writes it: plain, or since 23.02 ``{"set": true, "infinite": false, "number": 5}``."""
    if isinstance(value, dict):
        return float(value.get("number", 0)) if value.get("set") else 0.0
    return float(value or 0)


def _exit_code(value: Any) -> str:
    if isinstance(value, dict) and "return_code" in value:
        return str(int(_number(value["return_code"])))
    status = int(_number(value))
    return str(status >> 8 if status > 255 else status)


def _accounted(lines: list[str]) -> _Record | None:
    """The last of sacct's lines: a job that was put back into the queue has one for each attempt."""
    if not lines:
        return None
    state, started, ended, exit_code, nodes, reason = lines[-1].split("|", 5)
    return _Record(
        state=state.split()[0],
        restarts=len(lines) - 1,
        started=_when(started),
        ended=_when(ended),
        exit_code=exit_code.split(":")[0],
        nodes=nodes,
        reason=reason,
    )


def _when(text: str) -> float:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0  # "Unknown"
