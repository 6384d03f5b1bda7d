"""The rows a transfer is kept in (SQLAlchemy 2); :mod:`.store` is the only one that reads and writes them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by itself only in a column of exactly this type.
_Id = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """All tables of the service."""


class TransferRow(Base):
    """One transfer.

    Attributes:
        id: its number.
        owner: login of the certificate that asked for it.
        issuer: who vouches for that login; the same login of another issuer is somebody else.
        name: a name for people.
        experiment: the experiment whose data they are, if the configuration says; its members may see the transfer.
        key: the idempotency key it was asked for with, if any.
        request_sha256: what was asked for, to recognise the same key with another request.
        config: the engine's configuration, with the buffer as its only data handler.
        ranks: MPI ranks of the engine.
        producers: ranks that send.
        endpoints: for each buffer its `input`, `output` and `status` URL.
        spill: whether its buffers keep in files what nobody pulls.
        sentinel: empty messages each ZeroMQ consumer gets at the end.
        tags: names and values to find it by.
        access: who may come to each side of its buffers (:data:`.readers.Access`); None: whoever reaches them
            and, with encrypted data sockets, has a certificate of an issuer they trust.
        state: a :class:`.State`.
        info: why it is in this state.
        jobndx: index of the job the last change came from.
        created: seconds since 1970.
        changed: when it came into this state, seconds since 1970.
        deadline: when the state's time limit passes, seconds since 1970.
        lease_expires: when the lease ends, seconds since 1970; None without a lease.
        lease_s: how long it was when it was given or renewed last; None for those of before this was kept.
        buffers: the last status document of each buffer, or None.
        released: whether its jobs have ended and its ports are free.
    """

    __tablename__ = "transfers"
    __table_args__ = (UniqueConstraint("owner", "issuer", "key", name="transfers_key"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    owner: Mapped[str] = mapped_column(String(255), index=True)
    issuer: Mapped[str] = mapped_column(String(1024))
    name: Mapped[str] = mapped_column(String(128))
    experiment: Mapped[str | None] = mapped_column(String(64))
    key: Mapped[str | None] = mapped_column(String(255))
    request_sha256: Mapped[str] = mapped_column(String(64))
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    ranks: Mapped[int] = mapped_column(Integer)
    producers: Mapped[int] = mapped_column(Integer)
    endpoints: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    spill: Mapped[bool] = mapped_column(default=False, server_default=false())
    sentinel: Mapped[int] = mapped_column(Integer, default=0, server_default="1")
    tags: Mapped[dict[str, str]] = mapped_column(JSON, default=dict, server_default="{}")
    access: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    state: Mapped[str] = mapped_column(String(32), index=True)
    info: Mapped[str] = mapped_column(Text)
    jobndx: Mapped[int] = mapped_column(Integer, default=0)
    created: Mapped[float]
    changed: Mapped[float]
    deadline: Mapped[float | None]
    lease_expires: Mapped[float | None]
    lease_s: Mapped[float | None]
    buffers: Mapped[list[dict[str, Any] | None]] = mapped_column(JSON, default=list)
    released: Mapped[bool] = mapped_column(default=False, index=True)


class JobRow(Base):
    """A job of a transfer. The row is written before the job is asked for: after a crash in between it is found again.

    Attributes:
        id: the row's number.
        transfer: the transfer's number.
        role: a :class:`.Role`.
        position: which of several buffers; 0 for the engine.
        key: the idempotency key the job service knows it by.
        spec: the job specification as sent, with the secret of its callbacks.
        jobid: the job service's id; None until it answered.
        state: the last state known.
        jobndx: its start (or array element) in that state.
        info: the scheduler's id, exit status or reason of that state.
        started: whether the job service has accepted its start.
    """

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("transfer", "role", "position", name="jobs_role"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    transfer: Mapped[int] = mapped_column(ForeignKey("transfers.id", ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(String(16))
    position: Mapped[int] = mapped_column(Integer)
    key: Mapped[str] = mapped_column(String(255))
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    jobid: Mapped[str | None] = mapped_column(String(64), index=True)
    state: Mapped[str] = mapped_column(String(16), default="new")
    jobndx: Mapped[int] = mapped_column(Integer, default=0)
    info: Mapped[str] = mapped_column(Text, default="")
    started: Mapped[bool] = mapped_column(default=False)


class EffectRow(Base):
    """Something the supervisor has still to do for a transfer; deleted when it is done.

    Attributes:
        id: the row's number; a transfer's effects are done in this order.
        transfer: the transfer's number.
        kind: an :class:`.Effect`.
    """

    __tablename__ = "effects"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    transfer: Mapped[int] = mapped_column(ForeignKey("transfers.id", ondelete="CASCADE"), index=True)
    kind: Mapped[str] = mapped_column(String(32))


class LogRow(Base):
    """One entry of a transfer's log.

    Attributes:
        id: the row's number.
        transfer: the transfer's number.
        job: the job the entry is about; None for the transfer itself.
        time: seconds since 1970.
        client: a :class:`.ClientName`.
        state: a job state.
        info: a text for people.
        jobndx: the job's index.
    """

    __tablename__ = "log"
    __table_args__ = (Index("log_job", "job", "jobndx", "state"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    transfer: Mapped[int] = mapped_column(ForeignKey("transfers.id", ondelete="CASCADE"), index=True)
    job: Mapped[int | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    time: Mapped[float]
    client: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    info: Mapped[str] = mapped_column(Text)
    jobndx: Mapped[int] = mapped_column(Integer)


class CallbackRow(Base):
    """A callback that was accepted: its sender may repeat it without effect, and nobody else may.

    Attributes:
        job: the job it was about.
        sha256: of its raw body.
        login: of the certificate it came with; None for those accepted before this was kept.
        issuer: who vouches for that login.
    """

    __tablename__ = "callbacks"

    job: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    login: Mapped[str | None] = mapped_column(String(255))
    issuer: Mapped[str | None] = mapped_column(String(1024))


class PortRow(Base):
    """A port that a transfer holds; no row: free for us.

    Attributes:
        host: the machine.
        port: the port.
        transfer: who holds it.
        leased: since when, seconds since 1970.
    """

    __tablename__ = "ports"

    host: Mapped[str] = mapped_column(String(255), primary_key=True)
    port: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    transfer: Mapped[int] = mapped_column(ForeignKey("transfers.id", ondelete="CASCADE"), index=True)
    leased: Mapped[float]


class ServiceRow(Base):
    """The service itself; one row.

    Attributes:
        id: 1.
        seen: when it was there last, seconds since 1970.
    """

    __tablename__ = "service"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    seen: Mapped[float]
