"""The table of everything that was signed, and of what was revoked, in SQL."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from sqlalchemy import DateTime, Engine, ForeignKey, Integer, String, create_engine, event, func, make_url, select
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from lclstream.security.revocation import Revocation
from lclstream.signer.wire import Signature


class _Utc(TypeDecorator[datetime.datetime]):
    """Times with a zone; SQLite keeps them without one."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: Dialect) -> datetime.datetime | None:
        return None if value is None else value.astimezone(datetime.UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime.datetime | None, dialect: Dialect) -> datetime.datetime | None:
        return None if value is None else value.replace(tzinfo=datetime.UTC)


class _Base(DeclarativeBase):
    pass


class SignatureRow(_Base):
    """One signature; the columns are those of :class:`.wire.Signature`."""

    __tablename__ = "signatures"

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    serial: Mapped[str] = mapped_column(String(40), unique=True)
    login: Mapped[str] = mapped_column(String(255), index=True)
    uid: Mapped[int] = mapped_column(Integer)
    pid: Mapped[int] = mapped_column(Integer)
    issuer: Mapped[str] = mapped_column(String(1000))
    key_sha256: Mapped[str] = mapped_column(String(64), index=True)
    form: Mapped[str] = mapped_column(String(16))
    signed: Mapped[datetime.datetime] = mapped_column(_Utc)
    not_before: Mapped[datetime.datetime] = mapped_column(_Utc)
    not_after: Mapped[datetime.datetime] = mapped_column(_Utc, index=True)


_COLUMNS = [name for name in Signature.model_fields if name not in ("revoked", "reason")]


class RevocationRow(_Base):
    """One revoked certificate.

    Attributes:
        serial: which.
        since: when it was revoked.
        reason: why.
        by: login of who revoked it.
    """

    __tablename__ = "revocations"

    serial: Mapped[str] = mapped_column(ForeignKey("signatures.serial"), primary_key=True)
    since: Mapped[datetime.datetime] = mapped_column(_Utc)
    reason: Mapped[str] = mapped_column(String(500))
    by: Mapped[str] = mapped_column(String(255))


class Store:
    """The database. One thread uses it at a time.

    Args:
        url: SQLAlchemy URL. The folder of a SQLite file is made when it is missing, and the file has mode 0600.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the URL is wrong, or the database does not answer.
        OSError: the SQLite file cannot be made.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        _Base.metadata.create_all(self._engine)

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def add(self, signature: Signature) -> None:
        """Write a signature; it is on disk when this returns."""
        columns = signature.model_dump(exclude={"revoked", "reason"})
        with Session(self._engine) as session, session.begin():
            session.add(SignatureRow(**columns))

    def owner_of_key(self, key_sha256: str) -> str | None:
        """The login a public key was signed for, or None."""
        with Session(self._engine) as session:
            return session.scalar(select(SignatureRow.login).where(SignatureRow.key_sha256 == key_sha256).limit(1))

    def find(self, serial: str) -> Signature | None:
        """One signature, or None."""
        found = self._select(limit=1, serial=serial)
        return found[0] if found else None

    def newest(self, login: str | None, limit: int) -> list[Signature]:
        """Signatures, newest first; of everybody when `login` is None."""
        return self._select(limit=limit, login=login)

    def valid(self, login: str, now: datetime.datetime) -> list[Signature]:
        """A login's certificates that have neither expired nor been revoked."""
        found = self._select(limit=None, login=login, after=now)
        return [signature for signature in found if signature.revoked is None]

    def revoke(self, serials: list[str], since: datetime.datetime, reason: str, by: str) -> int:
        """Revoke certificates of this table; returns how many were not revoked before."""
        with Session(self._engine) as session, session.begin():
            known = set(session.scalars(select(RevocationRow.serial).where(RevocationRow.serial.in_(serials))))
            fresh = [serial for serial in dict.fromkeys(serials) if serial not in known]
            session.add_all(RevocationRow(serial=serial, since=since, reason=reason, by=by) for serial in fresh)
        return len(fresh)

    def revoked(self, now: datetime.datetime) -> list[Revocation]:
        """The revoked certificates that have not expired, oldest first."""
        query = (
            select(SignatureRow.serial, SignatureRow.issuer, RevocationRow.since, RevocationRow.reason)
            .join(RevocationRow, RevocationRow.serial == SignatureRow.serial)
            .where(SignatureRow.not_after > now)
            .order_by(RevocationRow.since, SignatureRow.number)
        )
        with Session(self._engine) as session:
            return [
                Revocation(serial=serial, issuer=issuer, since=since, reason=reason)
                for serial, issuer, since, reason in session.execute(query)
            ]

    def count(self) -> int:
        """How many signatures there are."""
        with Session(self._engine) as session:
            return session.scalar(select(func.count()).select_from(SignatureRow)) or 0

    def _select(
        self,
        *,
        limit: int | None,
        serial: str | None = None,
        login: str | None = None,
        after: datetime.datetime | None = None,
    ) -> list[Signature]:
        query = (
            select(SignatureRow, RevocationRow)
            .outerjoin(RevocationRow, RevocationRow.serial == SignatureRow.serial)
            .order_by(SignatureRow.number.desc())
            .limit(limit)
        )
        if serial is not None:
            query = query.where(SignatureRow.serial == serial)
        if login is not None:
            query = query.where(SignatureRow.login == login)
        if after is not None:
            query = query.where(SignatureRow.not_after > after)
        with Session(self._engine) as session:
            return [
                Signature(
                    **{name: getattr(row, name) for name in _COLUMNS},
                    revoked=None if revocation is None else revocation.since,
                    reason="" if revocation is None else revocation.reason,
                )
                for row, revocation in session.execute(query)
            ]


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if parsed.database and parsed.database != ":memory:":
        path = Path(parsed.database)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made here, because SQLite would let others read it.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def _settings(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        # A signature that was handed out must be in the table after a power cut, too.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine
