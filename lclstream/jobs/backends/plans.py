"""What a backend writes for a runner, and what it reads of it: see :mod:`lclstream.jobs.runner`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lclstream.jobs.job import Job
from lclstream.jobs.machine import Fact, Report
from lclstream.jobs.models import JobSpec


def write(
    job: Job,
    spec: JobSpec,
    *,
    mpirun: str,
    grace_s: float,
    nodes: str | None = None,
    keep_environment: tuple[str, ...] = (),
) -> None:
    """Write ``plan.json``, mode 0600: the environment of a job may hold secrets.

    Args:
        job: the job.
        spec: its specification.
        mpirun: command that starts an MPI program, as the script sees it in ``$mpirun``.
        grace_s: seconds between SIGTERM and SIGKILL.
        nodes: number of nodes; None leaves it to the runner to ask the scheduler.
        keep_environment: beginnings of variable names the script gets even when it inherits no environment.
    """
    ours = {"base": str(job.folder.path), "mpirun": mpirun}
    if nodes is not None:
        ours["nodes"] = nodes
    plan = {
        "argv": [*interpreter(spec.script), str(job.folder.scripts / "job")],
        "directory": job.directory,
        "environment": {**spec.environment, **ours},
        "inherit_environment": spec.inherit_environment,
        "keep_environment": list(keep_environment),
        "walltime_s": 60 * spec.resources.duration,
        "grace_s": grace_s,
        "log": str(job.folder.log),
    }
    replace(job.folder.control / "plan.json", plan)


def replace(path: Path, document: dict[str, Any]) -> None:
    """Write a file, mode 0600, that is there completely or as it was, even after a power failure."""
    temporary = path.with_name(f".{path.name}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """What a runner wrote, or None when it has not."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return document


def interpreter(script: str) -> list[str]:
    """The program that reads a script, from its ``#!`` line, split as the kernel splits it; bash without one."""
    first = script.split("\n", 1)[0]
    words = first[2:].strip().split(None, 1) if first.startswith("#!") else []
    return words or [shutil.which("bash", path="/bin:/usr/bin") or "/bin/sh"]


def outcome(job: Job, ended: dict[str, Any], jobndx: int | None = None) -> Report:
    """The fact that ``exit.json`` tells.

    Args:
        job: the job.
        ended: what the file holds.
        jobndx: the attempt; None means the present one.
    """
    reason, code, message = ended["reason"], ended["code"], ended["message"]
    number = job.jobndx if jobndx is None else jobndx
    if reason == "exit" and code == 0:
        return Report(Fact.succeeded, ended["time"], number, "0")
    if reason == "terminated" and job.cancel_requested:
        return Report(Fact.canceled, ended["time"], number)
    if reason == "exit" and code > 0:
        message = str(code)
    return Report(Fact.broken, ended["time"], number, message)
