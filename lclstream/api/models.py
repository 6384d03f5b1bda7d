"""Documents of the transfer service, compatible with the published `lclstream_api`; what is ours is optional there."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lclstream.jobs.models import JobState

__all__ = [
    "CacheMetrics",
    "ClientName",
    "JobState",
    "Lease",
    "LeaseRequest",
    "PortTransition",
    "TransferInfo",
    "TransferPhase",
    "TransferPlan",
    "TransferStatus",
]


class TransferPhase(StrEnum):
    """How far a transfer is; the last four never change again."""

    requested = "requested"
    buffer_starting = "buffer_starting"
    ready = "ready"
    producing = "producing"
    draining = "draining"
    done = "done"
    failed = "failed"
    canceled = "canceled"
    expired = "expired"

    @property
    def final(self) -> bool:
        """Whether the transfer has ended."""
        return self in _FINAL

    @property
    def pullable(self) -> bool:
        """Whether a consumer that connects to the transfer's URL now finds a buffer there."""
        return self in (TransferPhase.ready, TransferPhase.producing, TransferPhase.draining)

    @property
    def job_state(self) -> JobState:
        """The state that clients of the published service see."""
        return _JOB_STATES[self]


_FINAL = frozenset((TransferPhase.done, TransferPhase.failed, TransferPhase.canceled, TransferPhase.expired))
_JOB_STATES = {
    TransferPhase.requested: JobState.new,
    TransferPhase.buffer_starting: JobState.queued,
    TransferPhase.ready: JobState.queued,
    TransferPhase.producing: JobState.active,
    TransferPhase.draining: JobState.active,
    TransferPhase.done: JobState.completed,
    TransferPhase.failed: JobState.failed,
    TransferPhase.canceled: JobState.canceled,
    TransferPhase.expired: JobState.canceled,
}


class ClientName(StrEnum):
    """Whom a log entry is about: the buffer, the engine, or the one who asked for the transfer."""

    cache = "cache"
    producer = "producer"
    consumer = "consumer"


class PortTransition(BaseModel):
    """One entry of a transfer's log.

    Attributes:
        time: seconds since 1970.
        client: whom the entry is about.
        state: the state its job reached.
        info: the scheduler's id, an exit status, or a text for people.
        jobndx: which start of the job (or element of a job array).
    """

    time: float
    client: ClientName
    state: JobState
    info: str
    jobndx: int


class CacheMetrics(BaseModel):
    """What the buffer has counted, in messages.

    Attributes:
        time: when it was asked, seconds since 1970.
        producers: engine ranks connected now.
        recvd: messages taken from producers.
        sent: messages given to consumers.
        buffered: messages held now.
    """

    time: float
    producers: int
    recvd: int
    sent: int
    buffered: int


class TransferStatus(BaseModel):
    """A transfer in short.

    Attributes:
        time: when it last changed, seconds since 1970.
        jobndx: index of the job the last change came from.
        state: the compatible state, made from `phase`.
        info: why it is in this phase, for people.
        id: the transfer's number.
        url: where consumers pull from, such as ``tcp://host:port``.
        urls: all of them when the transfer has several buffers: each holds a part of the events, so pull from all.
        user: login of the certificate that asked for it.
        phase: how far it is.
        lease_expires: when it is ended unless its lease is renewed, seconds since 1970; None without a lease.
        name: the name it was given.
        tags: names and values it was given to find it by.
    """

    model_config = ConfigDict(extra="ignore")

    time: float
    jobndx: int
    state: JobState
    info: str
    id: int
    url: str
    user: str
    phase: TransferPhase
    lease_expires: float | None = None
    name: str = ""
    urls: list[str] = []
    tags: dict[str, str] = {}


class TransferInfo(BaseModel):
    """A transfer with its history and figures; kept after its end.

    Attributes:
        user: login of the certificate that asked for it.
        log: what happened, oldest first.
        metrics: the buffer's counts, live while it runs, the last ones afterwards.
        id: the transfer's number.
        url: where consumers pull from.
        state: the compatible state.
        phase: how far it is.
        info: why it is in this phase, for people.
        lease_expires: when it is ended unless its lease is renewed, seconds since 1970; None without a lease.
        name: the name it was given.
        tags: names and values it was given to find it by.
        urls: all addresses to pull from when it has several buffers.
        buffer: the buffer's last full status document; None until it answered once.
        buffers: those of all buffers when it has several.
        released: whether its jobs have ended and its ports are free again.
        readers: who may pull, as ``login@issuer``; None: its buffers have no such list.
    """

    model_config = ConfigDict(extra="ignore")

    user: str
    log: list[PortTransition]
    metrics: CacheMetrics
    id: int
    url: str
    state: JobState
    phase: TransferPhase
    info: str
    lease_expires: float | None = None
    name: str = ""
    urls: list[str] = []
    tags: dict[str, str] = {}
    buffer: dict[str, Any] | None = None
    buffers: list[dict[str, Any] | None] = []
    released: bool = False
    readers: list[str] | None = None


class TransferPlan(BaseModel):
    """What a request would start (`POST /transfers?dry_run=true`); nothing was started.

    Attributes:
        ranks: MPI ranks of the engine.
        producers: ranks that send.
        buffers: number of buffers.
        ports: ports it would take.
        ports_free: ports that are not leased now.
        config: the engine's configuration, with the buffers as its only data handler.
        scripts: the job scripts, by ``buffer`` and ``engine``.
        backends: where the jobs would run, by the same names.
        events: events the source will give, where it can tell.
        messages: messages they will make.
        bytes: size of their data before serialization and compression.
        notes: what is accepted and could be written better.
    """

    ranks: int
    producers: int
    buffers: int
    ports: int
    ports_free: int
    config: dict[str, Any]
    scripts: dict[str, str]
    backends: dict[str, str]
    events: int | None = None
    messages: int | None = None
    bytes: int | None = None
    notes: list[str] = []


class LeaseRequest(BaseModel):
    """Body of `POST /transfers/{id}/lease`.

    Attributes:
        lease_s: seconds from now until the transfer is ended, unless its lease is renewed again.
    """

    model_config = ConfigDict(extra="forbid")

    lease_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Lease(BaseModel):
    """Its answer.

    Attributes:
        lease_expires: seconds since 1970.
    """

    lease_expires: float
