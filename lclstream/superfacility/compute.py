"""Jobs as NERSC's users send them: a script with ``#SBATCH`` lines, run by our own job engine.

The engine keeps every job in a folder, so what this module answers survives a restart; a task of the API is the job's
folder name. Its Slurm backend talks to the cluster; a local backend serves where there is none.
"""

from __future__ import annotations

import asyncio
import datetime
import getpass
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lclstream.jobs.backends import RefusedError, plans
from lclstream.jobs.config import JobsConfig
from lclstream.jobs.engine import Engine, NoSuchJobError
from lclstream.jobs.job import Job
from lclstream.jobs.models import JobSpec, JobState, ResourceSpec
from lclstream.jobs.sbatch import directives, parse_options
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.roles import Action
from lclstream.superfacility.config import SuperfacilityConfig
from lclstream.superfacility.files import UserFiles

#: Where the scripts of jobs are kept in a user's folder, out of his way.
_SCRIPTS = ".superfacility"
_LONGEST_SCRIPT = 4 << 20
#: How long a submission waits for the scheduler's answer before it is only a task, in seconds.
_SETTLE_S = 0.5
#: Ends that Slurm has words of its own for, by the beginning of what our engine says.
_ENDS = {
    "duration of": "TIMEOUT", "TIMEOUT": "TIMEOUT", "DEADLINE": "DEADLINE", "NODE_FAIL": "NODE_FAIL",
    "OUT_OF_MEMORY": "OUT_OF_MEMORY", "PREEMPTED": "PREEMPTED", "BOOT_FAIL": "BOOT_FAIL",
}  # fmt: skip


class SubmissionError(ValueError):
    """A script is no job; the message is for its user."""


def owner(user: str) -> Identity:
    """A user as the engine knows the owners of jobs."""
    return Identity(login=user, issuer="superfacility", subject=user, serial="")


def make_engine(config: SuperfacilityConfig) -> Engine:
    """The engine that runs the jobs of all machines.

    Raises:
        ConfigError, PrefixInUseError, OSError: see :class:`lclstream.jobs.engine.Engine`.
    """
    files = config.files.expanduser().resolve()
    files.mkdir(parents=True, exist_ok=True, mode=0o755)
    jobs = JobsConfig(
        credentials=config.state,
        prefix=config.state,
        backends=dict(config.machines),
        directories=[files],
        cancel_jobs_on_exit=config.cancel_jobs_on_exit,
    )
    return Engine(jobs, _NoCertificate())


class _NoCertificate(Credentials):
    """Stands where a certificate folder is asked for: that is for callbacks, which these jobs cannot have."""

    def __init__(self) -> None:
        self.folder = Path(os.devnull)


class Compute:
    """The jobs of all machines. The event loop owns it, as it does the engine.

    Args:
        engine: runs them.
        config: the service's configuration.
    """

    def __init__(self, engine: Engine, config: SuperfacilityConfig) -> None:
        self._engine = engine
        self._config = config
        self._kinds = {str(name): backend.type for name, backend in config.machines.items()}

    async def submit(self, user: UserFiles, machine: str, job: str, is_path: bool, args: Sequence[str]) -> str:
        """Make a job of a script, and start it. Returns the task.

        Args:
            user: the user's files.
            machine: where.
            job: the script's text, or its path among the user's files.
            is_path: whether it is a path.
            args: words for a script that is a file.

        Raises:
            SubmissionError: it is no job, or asks for what is not there or not allowed.
            OSError: it cannot be kept.
        """
        script = user.read(job, _LONGEST_SCRIPT).decode(errors="replace") if is_path else job.replace("\r\n", "\n")
        if not script.startswith("#!"):
            raise SubmissionError("sbatch: error: This does not look like a batch script: its first line lacks #!")
        try:
            options = parse_options(directives(script))
            folder = user.folder(options.directory) if options.directory else user.home
            kept = user.keep(_SCRIPTS, script)
            spec = JobSpec(
                name=options.name or (Path(job).name if is_path else "sbatch"),
                directory=str(folder),
                script=self._wrapper(machine, folder, kept, script, args, options.output, options.error),
                resources=ResourceSpec.model_validate(options.resources),
                backend=machine,
                attributes=self._attributes(machine, options.attributes),
            )
            made = await self._engine.make(spec, owner(user.name), start=True)
        except (RefusedError, ValueError) as error:
            raise SubmissionError(f"sbatch: error: {error}") from error
        # The client asks for its task at once, and then every second: most are through with a little patience.
        until = time.monotonic() + _SETTLE_S
        while made.native_id is None and not made.is_final and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return made.stamp

    def _attributes(self, machine: str, asked: dict[str, str]) -> dict[str, str]:
        if self._kinds[machine] == "local":
            return {}
        return {name: value for name, value in asked.items() if name not in self._config.ignore_options}

    def _wrapper(
        self, machine: str, folder: Path, kept: Path, script: str, args: Sequence[str], output: str | None,
        error: str | None,
    ) -> str:  # fmt: skip
        """A script that sends what the user's script prints where ``--output`` says."""
        slurm = self._kinds[machine] == "slurm"
        number = "$SLURM_JOB_ID" if slurm else '$(basename "$base" | tr -d .)'
        out = _pattern(output or "slurm-%j.out", folder)
        err = f'2>>"{_pattern(error, folder)}"' if error else "2>&1"
        command = " ".join(shlex.quote(word) for word in (*plans.interpreter(script), str(kept), *args))
        lines = ["#!/bin/sh", f"number={number}", f'exec >>"{out}" {err}']
        if not slurm:
            lines.append('export SLURM_JOB_ID="$number"')
        return "\n".join([*lines, f"exec {command}", ""])

    def task(self, user: str, stamp: str) -> dict[str, Any]:
        """A task: done as soon as the scheduler has the job.

        Raises:
            NoSuchJobError: there is none.
        """
        job = self._engine.job(stamp, owner(user), Action.see)
        result: dict[str, Any] | None = None
        if job.native_id is not None:
            result = {"status": "ok", "jobid": self.number(job), "error": None}
        elif job.is_final:
            words = job.last.info or f"the job is {job.state.value}"
            result = {"status": "error", "jobid": None, "error": f"sbatch: error: {words}"}
        return {
            "id": stamp,
            "status": "new" if result is None else "completed",
            "result": None if result is None else json.dumps(result),
        }

    def tasks(self, user: str) -> list[dict[str, Any]]:
        """The user's tasks, newest first."""
        return [self.task(user, job.stamp) for job in self._engine.jobs(owner(user))]

    def number(self, job: Job) -> str:
        """A job's number, as Slurm counts; of a local job the digits of its folder."""
        if self._kinds.get(job.backend) == "slurm":
            return job.native_id or ""
        return job.stamp.replace(".", "")

    async def query(self, user: str, machine: str, wanted: dict[str, set[str]], *, ended: bool) -> list[dict[str, str]]:
        """Jobs as squeue (live ones) or sacct (`ended`: all) shows them, newest first.

        Args:
            user: who asks; others' jobs are not shown.
            machine: where.
            wanted: ``jobid``, ``user``, ``partition``, ``name``: any of these values.
            ended: whether those that have ended are shown.
        """
        asked = [
            job
            for job in self._engine.jobs(owner(user))
            if job.backend == machine and job.native_id is not None and (ended or not job.is_final)
        ]
        specs = await asyncio.to_thread(lambda: [job.spec() for job in asked])
        shown = []
        for job, spec in zip(asked, specs, strict=True):
            if job.is_final and not ended:
                # It ended while the files were read.
                continue
            line = self._sacct(job, spec) if ended else self._squeue(job, spec)
            name = line["jobname" if ended else "name"]
            values = {"jobid": line["jobid"], "user": user, "partition": line["partition"], "name": name}
            if all(values.get(key) in among for key, among in wanted.items()):
                shown.append(line)
        return shown

    def cancel(self, user: str, machine: str, number: str) -> None:
        """Ask for a job's end; without effect when it has ended.

        Raises:
            NoSuchJobError: there is no such job of this user.
        """
        for job in self._engine.jobs(owner(user)):
            if job.backend == machine and self.number(job) == number:
                self._engine.cancel(job)
                return
        raise NoSuchJobError(f"scancel: error: Kill job error on job id {number}: Invalid job id specified")

    def _common(self, job: Job, spec: JobSpec) -> dict[str, str]:
        return {
            "jobid": self.number(job),
            "user": job.login,
            "account": spec.attributes.get("--account", ""),
            "partition": spec.attributes.get("--partition", ""),
            "qos": spec.attributes.get("--qos", ""),
            "nodes": str(spec.resources.node_count or 1),
            "comment": spec.attributes.get("--comment", ""),
            "nodelist": next((line.info for line in reversed(job.history) if line.state is JobState.active), ""),
        }

    def _squeue(self, job: Job, spec: JobSpec) -> dict[str, str]:
        state = "RUNNING" if job.state is JobState.active else "PENDING"
        return {
            **self._common(job, spec),
            "name": job.name,
            "state": state,
            "st": state[0] if state == "RUNNING" else "PD",
            "submit_time": _time(job, JobState.queued),
            "start_time": _time(job, JobState.active),
            "time_limit": f"{spec.resources.duration:g}:00",
            "reason": "None",
        }

    def _sacct(self, job: Job, spec: JobSpec) -> dict[str, str]:
        state, code = _end(job)
        common = self._common(job, spec)
        return {
            **common,
            "jobname": job.name,
            "jobidraw": common["jobid"],
            "state": state,
            "exitcode": code,
            "submit": _time(job, JobState.queued),
            "start": _time(job, JobState.active),
            "end": _iso(job.last.time) if job.is_final else "Unknown",
        }


def _end(job: Job) -> tuple[str, str]:
    """Slurm's words for how a job stands: its state, and its exit code with the signal."""
    info = job.last.info
    match job.state:
        case JobState.completed:
            return "COMPLETED", "0:0"
        case JobState.canceled:
            return f"CANCELLED by {os.getuid()}", "0:15"
        case JobState.failed:
            state = next((word for start, word in _ENDS.items() if info.startswith(start)), "FAILED")
            return state, f"{info}:0" if info.isdigit() else "1:0"
        case JobState.active:
            return "RUNNING", "0:0"
        case _:
            return "PENDING", "0:0"


def _time(job: Job, state: JobState) -> str:
    times = [line.time for line in job.history if line.state is state]
    return _iso(times[-1]) if times else "Unknown"


def _iso(time: float) -> str:
    return datetime.datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%dT%H:%M:%S")


def _pattern(pattern: str, folder: Path) -> str:
    """A log's name as double-quoted shell text: ``%j`` is the job's number, ``%u`` the user, ``%%`` a percent sign.

    Raises:
        SubmissionError: another place is in it, or it leads out of the user's folders.
    """

    def place(match: re.Match[str]) -> str:
        values = {"j": "$number", "J": "$number", "A": "$number", "u": getpass.getuser(), "%": "%"}
        if match.group(1) not in values:
            raise SubmissionError(f"--output: {match.group(0)} is not known here; %j, %u and %% are")
        return values[match.group(1)]

    if ".." in Path(pattern).parts:
        raise SubmissionError(f"--output: {pattern}: leads out of the folder")
    full = pattern if pattern.startswith("/") else f"{folder}/{pattern}"
    return re.sub(r"%(.)", place, re.sub(r'(["\\`$])', r"\\\1", full))
