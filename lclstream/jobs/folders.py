"""A job's folder on disk, in the layout of the published psik, with our own notes beside it.

::

    PREFIX/1712345678.123/
        spec.json             the specification, mode 0600; readable by psik 3
        status.csv            time,jobndx,state,info: one line a transition, only ever appended to
        scripts/job           the script
        work/                 where it runs, unless its specification says otherwise
        log/console           messages of the runner or the scheduler
        log/stdout.1          output of the first attempt; stderr.1 beside it
        control/job.json      ours, mode 0600: owner, idempotency key, exact specification
        control/start         there once the job is to be started
        control/cancel        there once the job is to be ended; holds the reason, when it is not its owner's wish
        control/lease         seconds the job lives without a renewal of its lease; not there without a lease
        control/plan.json     ours, mode 0600: what the runner runs
        control/1/            what the runner of the first attempt wrote: see lclstream.jobs.runner

A job is made under another name and renamed: it exists completely or not at all, whatever is interrupted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lclstream.jobs.models import JOB_ID, JobSpec, JobState, Transition

_UNFINISHED = ".new-"
_REMOVED = ".old-"


class DamagedJobError(ValueError):
    """A job's folder lacks something or holds what cannot be read."""


class JobNotes(BaseModel):
    """What ``control/job.json`` holds.

    Attributes:
        login: who owns the job, by his certificate.
        issuer: who issued that certificate.
        idempotency_key: key the job was submitted with.
        request_sha256: digest of what was submitted.
        spec: the specification as it was submitted, without its secret.
        tags: names and values to find it by.
    """

    model_config = ConfigDict(extra="ignore")

    login: str
    issuer: str
    idempotency_key: str | None = None
    request_sha256: str
    spec: dict[str, Any]
    tags: dict[str, str] = {}


class JobFolder:
    """One job on disk.

    Args:
        path: ``PREFIX/<job id>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = path.name
        self.log = path / "log"
        self.scripts = path / "scripts"
        self.control = path / "control"

    @property
    def start_requested(self) -> bool:
        """Whether somebody asked for the job's start."""
        return (self.control / "start").exists()

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the job's end."""
        return (self.control / "cancel").exists()

    def request_start(self) -> None:
        """Ask for the start, so that even a restarted service knows."""
        (self.control / "start").touch()

    def request_cancel(self, reason: str = "") -> None:
        """Ask for the end, so that even a restarted service knows; `reason` will be in the history."""
        # A service that is killed meanwhile must not end the job for no reason.
        _write_whole(self.control / "cancel", reason)

    @property
    def cancel_reason(self) -> str:
        """Why the end was asked for; empty when its owner wanted it, or nobody did."""
        try:
            return (self.control / "cancel").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def keep_lease(self, lease_s: float) -> None:
        """Write down how long the job lives without a renewal of its lease."""
        _write_whole(self.control / "lease", repr(lease_s))

    @property
    def lease_s(self) -> float | None:
        """How long the job lives without a renewal of its lease, in seconds; None: it has no lease.

        Raises:
            DamagedJobError: it cannot be read.
        """
        path = self.control / "lease"
        try:
            return float(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DamagedJobError(f"{path}: {error}") from error

    def attempt(self, jobndx: int) -> Path:
        """The control folder of one attempt."""
        return self.control / str(jobndx)

    def append(self, lines: Sequence[Transition]) -> None:
        """Add lines to the history, safe against a power failure; all of them or, with an error, none."""
        data = "".join(_line(line) for line in lines).encode(errors="replace")
        with open(self.path / "status.csv", "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "status.csv"))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def history(self) -> list[Transition]:
        """All lines of the history, oldest first.

        Raises:
            DamagedJobError: there is none, or its first line is not `new`.
        """
        lines: list[Transition] = []
        text = (self.path / "status.csv").read_text(encoding="utf-8", errors="replace")
        for number, row in enumerate(text.splitlines(), 1):
            fields = row.split(",", 3)
            try:
                lines.append(
                    Transition(time=float(fields[0]), jobndx=int(fields[1]), state=JobState(fields[2]), info=fields[3])
                )
            except (ValueError, IndexError) as error:
                raise DamagedJobError(f"{self.path / 'status.csv'}, line {number}: {row!r} is no transition") from error
        if not lines or lines[0].state is not JobState.new:
            raise DamagedJobError(f"{self.path / 'status.csv'} does not begin with the state `new`")
        return lines

    def repair_history(self) -> None:
        """Cut off a last line that was not written completely when the machine lost power."""
        path = self.path / "status.csv"
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def notes(self) -> JobNotes:
        """Owner, idempotency key and specification.

        Raises:
            DamagedJobError: they are missing, or cannot be read.
        """
        path = self.control / "job.json"
        try:
            return JobNotes.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise DamagedJobError(f"{path}: {error}") from error

    def spec(self) -> JobSpec:
        """The specification with its secret.

        Raises:
            DamagedJobError: it cannot be read.
        """
        path = self.path / "spec.json"
        try:
            kept = json.loads(path.read_text())
            return JobSpec.model_validate({**kept, **self.notes().spec, "cb_secret": kept.get("cb_secret")})
        except (OSError, ValueError) as error:
            raise DamagedJobError(f"{path}: {error}") from error


def _line(line: Transition) -> str:
    # A line break in what a scheduler said would look like another transition.
    info = " ".join(line.info.split())
    return f"{line.time:.6f},{line.jobndx},{line.state.value},{info}\n"


def is_job(path: Path) -> bool:
    """Whether a folder is a job of ours."""
    return JOB_ID.fullmatch(path.name) is not None and (path / "control" / "job.json").is_file()


def find(prefix: Path) -> Iterator[JobFolder]:
    """All jobs below a prefix, oldest first; what an interrupted service left half made or half removed is removed."""
    for path in sorted(prefix.iterdir()):
        if path.name.startswith((_UNFINISHED, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
        elif is_job(path):
            yield JobFolder(path)


def remove(folder: JobFolder) -> None:
    """Remove a job with everything in its folder; it is there completely or not at all, whatever is interrupted.

    Raises:
        OSError: the folder cannot be moved away; it is left as it was.
    """
    away = folder.path.with_name(f"{_REMOVED}{folder.stamp}")
    folder.path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def make(
    prefix: Path, spec: JobSpec, *, login: str, issuer: str, idempotency_key: str | None, request_sha256: str,
    backend: dict[str, Any], start: bool, lease_s: float | None = None, tags: Mapping[str, str] | None = None,
) -> JobFolder:  # fmt: skip
    """Make a job's folder with the state `new`.

    Args:
        prefix: where jobs lie.
        spec: the job.
        login: its owner.
        issuer: who issued the owner's certificate.
        idempotency_key: key it was submitted with.
        request_sha256: digest of what was submitted.
        backend: what psik expects to know about the backend: ``type`` and others of its fields.
        start: whether it is to be started at once.
        lease_s: seconds it lives without a renewal of its lease; None: no lease.
        tags: names and values to find it by.

    Raises:
        OSError: the folder cannot be written.
    """
    unfinished = prefix / f"{_UNFINISHED}{secrets.token_hex(8)}"
    unfinished.mkdir(mode=0o700)
    try:
        for name in ("log", "scripts", "control", *(() if spec.directory else ("work",))):
            (unfinished / name).mkdir()
        script = unfinished / "scripts" / "job"
        script.write_text(spec.script, encoding="utf-8")
        script.chmod(0o700)
        notes = JobNotes(
            login=login, issuer=issuer, idempotency_key=idempotency_key, request_sha256=request_sha256,
            spec={key: value for key, value in spec.document().items() if key not in ("cb_secret", "cb_headers")},
            tags=dict(tags or {}),
        )  # fmt: skip
        _write(unfinished / "control" / "job.json", notes.model_dump_json())
        if start:
            (unfinished / "control" / "start").touch()
        if lease_s is not None:
            JobFolder(unfinished).keep_lease(lease_s)
        while True:
            path = prefix / f"{time.time():.3f}"
            directory = spec.directory or str(path / "work")
            _write(unfinished / "spec.json", json.dumps(_psik_spec(spec, directory), indent=4))
            new = Transition(
                time=time.time(),
                jobndx=0,
                state=JobState.new,
                info=json.dumps({"backend": backend}, separators=(",", ":")),
            )
            (unfinished / "status.csv").write_text(_line(new))
            if path.exists():
                # More than one job a millisecond.
                time.sleep(0.001)
                continue
            try:
                unfinished.rename(path)
            except OSError as error:
                if not path.exists():
                    raise
                del error
                continue
            return JobFolder(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_whole(path: Path, text: str) -> None:
    """Write a file that others see with all of this text, or as it was before."""
    part = path.with_name(f".{path.name}")
    _write(part, text)
    part.replace(path)


def _psik_spec(spec: JobSpec, directory: str) -> dict[str, Any]:
    # psik takes whole minutes only, and does not show a job whose specification it cannot read.
    document = {**spec.document(), "directory": directory}
    if "resources" in document and "duration" in document["resources"]:
        document["resources"]["duration"] = math.ceil(document["resources"]["duration"])
    return document
