"""The job service's configuration: one YAML file, checked before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lclstream import config_file
from lclstream.config_file import FilePath
from lclstream.security.limits import Limits, RouteLimits
from lclstream.security.rate import Rate


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _prefix(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(
            f"{value!r}: a callback prefix begins with https://HOST, such as https://api.example.org:8446/v1/"
        )
    if parts.username or parts.query or parts.fragment:
        raise ValueError(f"{value!r}: a callback prefix has no user, no query and no fragment")
    return value


class Listen(_Model):
    """Where the service listens.

    Attributes:
        host: address; the loopback address by default.
        port: port.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8447, ge=1, le=65535)


class LocalBackend(_Model):
    """Jobs are processes on the service's own machine, run as the service's own user.

    Attributes:
        type: ``local``.
        description: a sentence for users.
        mpirun: the MPI launcher; a job sees it with its number of processes as ``$mpirun``.
        kill_grace_s: seconds between SIGTERM and SIGKILL when a job is cancelled or exceeds its duration.
        max_duration_min: longest duration a job may ask for, in minutes.
        max_jobs: how many jobs run at a time; further ones are `queued`, and start in that order. None: all at once.
    """

    type: Literal["local"] = "local"
    description: str = "processes on the service's own machine"
    mpirun: str = "mpiexec"
    kill_grace_s: float = Field(default=5.0, ge=0, le=600)
    max_duration_min: float = Field(default=7 * 24 * 60, gt=0, le=527040)
    max_jobs: int | None = Field(default=None, ge=1)


#: Options of sbatch that would let a job leave its own folder, account or user, or run what its owner did not send.
_NEVER = re.compile(
    r"--(uid|gid|wrap|chdir|output|error|input|comment|parsable|array|export|export-file|get-user-env|job-name|prolog|"
    r"open-mode|clusters|bb|bbf|test-only|help|usage|version|batch|quiet|verbose|wait|propagate|spread-job)"
)


def _sbatch_option(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z0-9-]*", value):
        raise ValueError(f"{value!r}: a long option of sbatch, such as --qos")
    if _NEVER.fullmatch(value):
        raise ValueError(f"{value}: this option belongs to the service and cannot be allowed")
    return value


SbatchOption = Annotated[str, AfterValidator(_sbatch_option)]


class SlurmBackend(_Model):
    """Jobs of a Slurm cluster. The job folders (`prefix`) must be on a file system the compute nodes share.

    Attributes:
        type: ``slurm``.
        description: a sentence for users.
        queue_name: partition.
        project_name: account.
        reservation_id: reservation.
        attributes: further options of sbatch for every job, such as ``--qos: debug``; an empty value for an option
            without one.
        allow_attributes: options of sbatch a job may choose itself in its `attributes`.
        mpirun: what a job sees in ``$mpirun``.
        kill_grace_s: seconds between SIGTERM and SIGKILL; keep it below Slurm's own `KillWait`.
        max_duration_min: longest duration a job may ask for, in minutes.
        poll_s: seconds between two `squeue`, one for all jobs.
        command_timeout_s: seconds a Slurm command may take.
        python: Python (3.11 or later) on the compute nodes; by default the service's own.
    """

    type: Literal["slurm"]
    description: str = "a Slurm cluster"
    queue_name: str | None = None
    project_name: str | None = None
    reservation_id: str | None = None
    attributes: dict[SbatchOption, str] = {}
    allow_attributes: list[SbatchOption] = []
    mpirun: str = "srun"
    kill_grace_s: float = Field(default=5.0, ge=0, le=600)
    max_duration_min: float = Field(default=7 * 24 * 60, gt=0, le=527040)
    poll_s: float = Field(default=1.0, ge=0.1, le=600)
    command_timeout_s: float = Field(default=30.0, gt=0, le=600)
    python: str | None = None


def _service(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{value!r}: an https address, such as https://psik.example.org:8447")
    return value.rstrip("/")


class PsikBackend(_Model):
    """Jobs are handed on to another site's job service, and followed there.

    Attributes:
        type: ``psik``.
        description: a sentence for users.
        url: that service, such as ``https://psik.example.org:8447``.
        prefix: path before ``/jobs`` there.
        backend: name of the backend there.
        credentials: certificate folder to show there; by default the service's own.
        callback_url: our own address as that service reaches it, up to and with our ``/v2``. It is then told of
            changes at once; without it they are seen at the next look.
        poll_s: seconds between two looks at a job.
        timeout_s: seconds a call may take.
        fetch_bytes: most bytes of result files to bring here when a job has ended; 0 leaves them there.
    """

    type: Literal["psik"]
    description: str = "another site's job service"
    url: Annotated[str, AfterValidator(_service)]
    prefix: str = "/v2"
    backend: str = "default"
    credentials: FilePath | None = None
    callback_url: Annotated[str, AfterValidator(_service)] | None = None
    poll_s: float = Field(default=2.0, ge=0.1, le=600)
    timeout_s: float = Field(default=30.0, gt=0, le=600)
    fetch_bytes: int = Field(default=64 << 20, ge=0)


def _facility(value: str) -> str:
    parts = urlsplit(value)
    loopback = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not (parts.scheme == "https" or loopback) or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"{value!r}: an https address without a path, such as https://api.iri.nersc.gov")
    return value.rstrip("/")


class IriBackend(_Model):
    """Jobs run at a DOE facility, started and followed by its IRI facility API. What they print stays there.

    Attributes:
        type: ``iri``.
        description: a sentence for users.
        url: the facility's API, such as ``https://api.iri.nersc.gov``.
        prefix: path before ``/compute`` there.
        resource: the facility's id of the compute resource.
        token_file: file (mode 0600) with the bearer token, read at each use.
        directory: an existing folder at the facility; each job makes one of its own in it.
        queue_name: queue or partition.
        project_name: account.
        reservation_id: reservation.
        allow_attributes: options a job may choose itself in its `attributes`, in sbatch's words: ``--partition``,
            ``--account``, ``--reservation``; others become the facility's custom attributes, such as ``--constraint``.
        mpirun: what a job sees in ``$mpirun``.
        max_duration_min: longest duration a job may ask for, in minutes.
        poll_s: seconds between two looks at a job.
        timeout_s: seconds a call may take.
    """

    type: Literal["iri"]
    description: str = "a DOE facility"
    url: Annotated[str, AfterValidator(_facility)]
    prefix: str = Field(default="/api/v2", pattern=r"^(/[\w.-]+)*$")
    resource: str = Field(min_length=1)
    token_file: FilePath
    directory: str = Field(pattern=r"^/[A-Za-z0-9_./@+=,:-]*$")
    queue_name: str | None = None
    project_name: str | None = None
    reservation_id: str | None = None
    allow_attributes: list[SbatchOption] = []
    mpirun: str = "srun"
    max_duration_min: float = Field(default=24 * 60, gt=0, le=527040)
    poll_s: float = Field(default=10.0, ge=0.1, le=600)
    timeout_s: float = Field(default=30.0, gt=0, le=600)


BackendConfig = Annotated[LocalBackend | SlurmBackend | PsikBackend | IriBackend, Field(discriminator="type")]


class Callbacks(_Model):
    """Whom jobs may tell about their states.

    Attributes:
        allow: URL prefixes; a job whose callback is under none of them is refused. Empty: no callbacks.
        timeout_s: seconds a receiver may take to answer.
        retry_first_s: seconds before the first repetition; doubled for each further one.
        retry_most_s: longest time between two repetitions, in seconds.
        refused_most: how often a callback is sent that the receiver refuses (4xx).
        give_up_after_h: hours after which a callback that never arrived is dropped, with an error in the log.
    """

    allow: list[Annotated[str, AfterValidator(_prefix)]] = []
    timeout_s: float = Field(default=10.0, gt=0, le=600)
    retry_first_s: float = Field(default=0.5, gt=0, le=3600)
    retry_most_s: float = Field(default=60.0, gt=0, le=86400)
    refused_most: int = Field(default=8, ge=1, le=1000)
    give_up_after_h: float = Field(default=72.0, gt=0, le=10000)

    def permit(self, url: str) -> bool:
        """Whether a URL lies under one of the allowed prefixes: same host and port, and below its path."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            return False
        if parts.scheme != "https" or not parts.hostname or parts.username is not None or parts.fragment:
            return False
        # What a server may read as "..", in whichever way it is written, could lead out of the allowed path.
        if not url.isascii() or re.search(r"[\s\\]", url) or ".." in unquote(unquote(parts.path)).split("/"):
            return False
        for prefix in self.allow:
            known = urlsplit(prefix)
            if (known.hostname, known.port or 443) != (parts.hostname, port or 443):
                continue
            below = known.path.rstrip("/")
            if parts.path == below or parts.path.startswith(below + "/"):
                return True
        return False


class JobLimits(_Model):
    """How much, how long and how often a user may ask.

    Attributes:
        body_bytes: largest JSON body.
        upload_bytes: largest upload, all files of a request together.
        upload_s: longest time an upload may take, in seconds.
        log_bytes: most bytes of each log in one answer.
        rate: requests one user may make, `per_s` on average and `burst` at once; not limited by default.
    """

    body_bytes: int = Field(default=4 << 20, ge=1024)
    upload_bytes: int = Field(default=1 << 30, ge=1024)
    upload_s: float = Field(default=3600.0, gt=0)
    log_bytes: int = Field(default=4 << 20, ge=1024)
    rate: Rate | None = None

    def of_requests(self, prefix: str) -> Limits:
        """The same for the server, whose routes begin with `prefix`."""
        upload = f"{prefix}/jobs/{{jobid}}/files"
        return Limits(
            body_bytes=self.body_bytes,
            rate=self.rate,
            routes=tuple(
                RouteLimits(path=path, method="POST", body_bytes=self.upload_bytes, answer_s=self.upload_s)
                for path in (upload, upload + "/")
            ),
        )


class Keep(_Model):
    """How long the folders of finished jobs are kept; for ever by default.

    Attributes:
        days: remove them that many days after the job's end.
        jobs: keep that many of the finished jobs, those that ended last.
    """

    days: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    jobs: int | None = Field(default=None, ge=0)


class JobsConfig(_Model):
    """The job service.

    Attributes:
        listen: where it listens.
        credentials: its certificate folder (layout of `certified`).
        prefix: folder that holds one folder a job.
        backends: where jobs run, by the name a job specification uses; ``default`` is what it gets when it names none.
        callbacks: whom jobs may tell about their states.
        directories: folders a job may choose to run in instead of its own ``work/``, and everything below them.
        roles: file that names operators, who see and may cancel everybody's jobs (see
            :mod:`lclstream.security.roles`); none by default.
        cancel_jobs_on_exit: whether stopping the service ends its jobs. By default they keep running, and the service
            finds them when it starts again.
        max_lease_s: longest lease of a job, in seconds.
        keep: how long the folders of finished jobs are kept.
        limits: how much, how long and how often a user may ask.
        access_log: file for the access log, one JSON object a line; among the other log lines by default.
    """

    listen: Listen = Listen()
    credentials: FilePath
    prefix: FilePath
    backends: dict[str, BackendConfig] = Field(default={"default": LocalBackend()}, min_length=1)
    callbacks: Callbacks = Callbacks()
    directories: list[Path] = []
    roles: FilePath | None = None
    cancel_jobs_on_exit: bool = False
    max_lease_s: float = Field(default=86400.0, gt=0, allow_inf_nan=False)
    keep: Keep = Keep()
    limits: JobLimits = JobLimits()
    access_log: FilePath | None = None

    @model_validator(mode="after")
    def _folders_stay_apart(self) -> JobsConfig:
        for directory in self.directories:
            if not directory.is_absolute():
                raise ValueError(f"directories: {directory} is not an absolute path")
            for key, kept in (("prefix", self.prefix), ("credentials", self.credentials)):
                ours, theirs = kept.expanduser().resolve(), directory.resolve()
                if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
                    raise ValueError(
                        f"directories: {directory} and {key} ({kept}) lie inside each other, and a job could write to "
                        f"the service's own files; choose a folder apart from it"
                    )
        return self


def load(path: Path | None, **options: Any) -> JobsConfig:
    """Read the configuration file; options that are not None override it.

    Args:
        path: YAML file, or None when the options say everything.
        options: fields of :class:`JobsConfig`, with ``host`` and ``port`` for :class:`Listen`.

    Raises:
        ConfigError: the file cannot be read, or a value in it cannot be used.
    """
    listen = {f"listen.{key}": options.pop(key, None) for key in ("host", "port")}
    return config_file.load(JobsConfig, path, {**options, **listen})
