"""The transfer service's configuration: one YAML file; only `credentials` and `job_service.url` have no default."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from lclstream import config_file
from lclstream.api.states import LIVING, TIME_LIMITS_S, State
from lclstream.config_file import FilePath
from lclstream.security.limits import Limits
from lclstream.security.rate import Rate

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Minutes = Annotated[int, Field(gt=0)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _template(*names: str) -> AfterValidator:
    """A check that a script uses no other ``{placeholders}`` than these."""

    def check(text: str) -> str:
        used = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
        unknown = used - set(names)
        if unknown:
            raise ValueError(
                f"unknown placeholder {', '.join(sorted('{' + name + '}' for name in unknown))}: "
                f"there are {', '.join('{' + name + '}' for name in names)}; write a literal brace twice"
            )
        return text

    return AfterValidator(check)


class JobServiceConfig(_Section):
    """Where jobs are started.

    Attributes:
        url: the job service, such as ``https://sdfiana001:8447``.
        prefix: path before its routes.
    """

    url: Annotated[str, Field(pattern="^https://")]
    prefix: str = "/v2"


class PortsConfig(_Section):
    """The ports of buffers; each transfer takes three.

    Attributes:
        host: name or address of the machine the buffers run on, as consumers and the engine reach it.
        first: lowest port.
        last: highest port. The default range ends below the ports Linux takes for outgoing connections (32768 on).
        scheme: ``tls+tcp``: events travel encrypted, and whoever sends or pulls them shows a certificate.
        readers: with ``tls+tcp``, who may pull: ``owner``: a transfer's owner, the members of its experiment, and those
            its request names; a list of logins (``login`` or ``login@issuer``): they as well, from every transfer;
            ``anyone-trusted``: everybody with a certificate of an issuer the buffers trust.
    """

    host: str = "127.0.0.1"
    first: PortNumber = 30001
    last: PortNumber = 32700
    scheme: Literal["tcp", "tls+tcp"] = "tcp"
    readers: Literal["owner", "anyone-trusted"] | tuple[Annotated[str, Field(min_length=1)], ...] = "owner"

    @model_validator(mode="after")
    def _wide_enough(self) -> Self:
        if self.last - self.first < 2:
            raise ValueError(f"ports {self.first} to {self.last} are fewer than the three that one transfer needs")
        return self


class JobConfig(_Section):
    """What both kinds of job have.

    Attributes:
        backend: name of the job service's backend.
        duration_min: walltime in minutes.
        environment: variables set for the job.
        attributes: options for the backend's scheduler, as the job service allows them.
    """

    backend: str = "default"
    duration_min: Minutes = 600
    environment: dict[str, str] = {}
    attributes: dict[str, str] = {}


BUFFER_SCRIPT = """#!/bin/sh
exec nngstream --name {name} --in {input} --out {output} --capacity {capacity} --producers {producers} \\
  --grace {grace_s} --drain {drain_s} --sentinel {sentinel} --status {status} \\
  --tls-certificate {certificate} --tls-key {key} --tls-ca {ca} --summary {summary} {access} {spill}
"""
ENGINE_SCRIPT = """#!/bin/sh
exec mpiexec -n {ranks} lclstreamer --config {config}
"""


class BufferConfig(JobConfig):
    """The buffer job.

    Attributes:
        duration_min: as long as the engine, and the draining after it.
        capacity: memory for held messages, with its unit.
        grace_s: how long a buffer without producers waits for one to come back.
        drain_s: how long a buffer that is cancelled goes on giving out what it holds; shorter than the time the job
            service leaves a cancelled job, so that the buffer can still write its last figures.
        sentinel: empty messages each ZeroMQ consumer gets at the end of the stream when the request does not say. The
            published clients do not expect any and would keep them as files of no bytes.
        credentials: certificate folder of the buffer, on the machine it runs on; None: the service's own.
        issuer: certificates (PEM) of the authorities whose members the buffer serves, on the machine it runs on: the
            one that signed this service's certificate, with which the status is read, and, with encrypted data
            sockets, those of the engine and of everybody who may pull; None: the only issuer in the folder's
            ``known_clients/``, or ``org.crt``.
        max_per_transfer: the most buffers one transfer may have, for more bandwidth.
        spill: folder on the buffers' machine in which transfers that ask for it keep what nobody pulls, each in a
            folder of its own; None: that is not offered.
        script: the job script; ``{spill}`` stands for that option, or for nothing, and ``{access}`` for the one that
            names the file of those who may push and pull.
    """

    duration_min: Minutes = 660
    capacity: Annotated[str, Field(pattern=r"^[0-9.]+ *([KMGT]i?)?B?$")] = "1GiB"
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    sentinel: Annotated[int, Field(ge=0)] = 0
    credentials: FilePath | None = None
    issuer: FilePath | None = None
    max_per_transfer: Annotated[int, Field(ge=1)] = 4
    spill: FilePath | None = None
    script: Annotated[
        str,
        _template(
            "name", "input", "output", "capacity", "producers", "grace_s", "drain_s", "sentinel", "status",
            "certificate", "key", "ca", "summary", "spill", "access",
        ),
    ] = BUFFER_SCRIPT  # fmt: skip

    @model_validator(mode="after")
    def _spill_has_a_place(self) -> Self:
        if self.spill is not None and "{spill}" not in self.script:
            raise ValueError("spill: the script has no {spill}, so its buffers would keep nothing in files")
        return self


class EngineConfig(JobConfig):
    """The engine job.

    Attributes:
        ranks: MPI ranks when the request names none.
        max_ranks: the most a request may ask for.
        library: how the engine speaks to the buffer.
        patience_s: how long the engine bears a full buffer, because nobody pulls, before it fails.
        nodes: nodes the ranks are spread over.
        cpu_cores_per_rank: cores for each rank.
        credentials: with encrypted data sockets, the engine's certificate folder on the machine it runs on; None: the
            buffer's.
        issuer: with encrypted data sockets, certificate of the authority that signed the buffer's, on the machine the
            engine runs on; None: the only issuer in the folder's ``known_servers/``, or ``org.crt``.
        identity: with encrypted data sockets, the engine's login (``login`` or ``login@issuer``): nobody else may push;
            None: the one in the folder's ``id.crt``, which must then be readable here.
        script: the job script; the engine's configuration lies beside it as ``{config}``.
    """

    ranks: Annotated[int, Field(ge=1)] = 1
    max_ranks: Annotated[int, Field(ge=1)] = 128
    library: Literal["zmq", "nng"] = "zmq"
    patience_s: Seconds = 3600.0
    nodes: Annotated[int, Field(ge=1)] = 1
    cpu_cores_per_rank: Annotated[int, Field(ge=1)] = 1
    credentials: FilePath | None = None
    issuer: FilePath | None = None
    identity: Annotated[str, Field(min_length=1)] | None = None
    script: Annotated[str, _template("ranks", "config")] = ENGINE_SCRIPT

    @model_validator(mode="after")
    def _default_allowed(self) -> Self:
        if self.ranks > self.max_ranks:
            raise ValueError(f"ranks {self.ranks} is more than max_ranks {self.max_ranks}")
        return self


class QuotaConfig(_Section):
    """How much one user may have at a time; a transfer counts until its jobs have ended and its ports are free.

    Attributes:
        transfers: transfers; None: any number.
        ranks: engine ranks of all of them together; None: any number.
    """

    transfers: Annotated[int, Field(ge=1)] | None = 32
    ranks: Annotated[int, Field(ge=1)] | None = None


class RequestsConfig(_Section):
    """How long and how often one may ask.

    Attributes:
        answer_s: seconds from a request's head until its answer begins, the upload included.
        stall_s: seconds a peer may pause within a body or an answer.
        rate: requests one identity may make, `per_s` on average and `burst` at once; None: not limited. The job
            service's callbacks count as its requests; those refused come again later.
    """

    answer_s: Seconds = 60.0
    stall_s: Seconds = 60.0
    rate: Rate | None = None


class ApiConfig(_Section):
    """Everything the service can be told.

    Attributes:
        host: address to listen at.
        port: port to listen at.
        credentials: the service's certificate folder.
        public_url: how the job service reaches us for callbacks; None: ``https://host:port``.
        database: SQLAlchemy URL; a SQLite file is relative to the working directory.
        job_service: where jobs are started.
        ports: the buffers' ports.
        buffer: the buffer job.
        engine: the engine job.
        quota: how much one user may have at a time.
        roles: file that names operators and members of experiments (see :mod:`lclstream.security.roles`); None:
            everybody has to do with his own transfers only, and may ask for all that the engine's account may read.
        open_folders: folders, as the engine sees them, whose files everybody may ask for. Where the roles file lists
            experiments, files elsewhere are for its operators and services.
        keep_days: how long an ended transfer and its idempotency key are remembered.
        limits_s: how long a transfer may stay in each state.
        settle_s: how long a buffer must be empty and without producers, the engine having completed, to count as
            drained although it waits for more producers.
        max_lease_s: the longest lease one may ask for.
        poll_s: period of asking the job service how jobs are; callbacks are quicker, and may be lost.
        status_s: period of asking buffers for their figures.
        max_request_bytes: the largest request body that is read.
        requests: how long and how often one may ask.
        tail_bytes: how much of a failed job's stderr goes into the transfer's log.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8446
    credentials: FilePath
    public_url: Annotated[str, Field(pattern="^https://")] | None = None
    database: str = "sqlite:///lclstream-transfers.sqlite"
    job_service: JobServiceConfig
    ports: PortsConfig = PortsConfig()
    buffer: BufferConfig = BufferConfig()
    engine: EngineConfig = EngineConfig()
    quota: QuotaConfig = QuotaConfig()
    roles: FilePath | None = None
    open_folders: tuple[FilePath, ...] = ()
    keep_days: Annotated[float, Field(gt=0)] = 90.0
    limits_s: dict[State, Seconds] = {}
    settle_s: Seconds = 10.0
    max_lease_s: Seconds = 86400.0
    poll_s: Seconds = 5.0
    status_s: Seconds = 1.0
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1024 * 1024
    requests: RequestsConfig = RequestsConfig()
    tail_bytes: Annotated[int, Field(ge=1)] = 4000

    @field_validator("limits_s")
    @classmethod
    def _limits_of_living(cls, limits: dict[State, float]) -> dict[State, float]:
        for state in limits:
            if state.final:
                raise ValueError(f"{state} is an end and has no limit: the states with one are {', '.join(LIVING)}")
        return limits

    @model_validator(mode="after")
    def _lists_reach_the_buffer(self) -> Self:
        if self.ports.scheme == "tls+tcp" and "{access}" not in self.buffer.script:
            raise ValueError(
                "buffer.script has no {access}: its buffers would serve everybody whose issuer they trust; put it at "
                "the end of nngstream's options"
            )
        return self

    def limit_s(self, state: State) -> float | None:
        """How long a transfer may stay in a state; None for an end."""
        return self.limits_s.get(state, TIME_LIMITS_S.get(state))

    @property
    def limits_of_requests(self) -> Limits:
        """The same for the server."""
        asked = self.requests
        return Limits(
            body_bytes=self.max_request_bytes, answer_s=asked.answer_s, stall_s=asked.stall_s, rate=asked.rate
        )

    @property
    def callback_base(self) -> str:
        """URL under which the job service's callbacks come in."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{(self.public_url or f'https://{host}:{self.port}').rstrip('/')}/v1/callback"


def load_config(path: Path | None, **overrides: object) -> ApiConfig:
    """Read a configuration file; options given on the command line win.

    Args:
        path: the YAML file; paths in it are relative to its folder. None: the options alone.
        overrides: values for top-level keys, and with a dot (``job_service.url``) for those in sections; None: not
            given.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or wrong.
    """
    return config_file.load(ApiConfig, path, overrides)
