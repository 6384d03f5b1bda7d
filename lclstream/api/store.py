"""Everything durable about transfers. Each method is one transaction; what it wrote survives a crash right after it.

Methods block for a moment and may be called from any thread. They return detached rows, which are read, never changed.
One service process owns a database; several threads of it may call at the same time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, true
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lclstream.api import absence
from lclstream.api.config import PortsConfig, QuotaConfig
from lclstream.api.database import Turns, open_database, upgrade
from lclstream.api.models import ClientName, JobState
from lclstream.api.ports import candidates, is_free
from lclstream.api.states import INITIAL, LIVING, Effect, Event, State, step
from lclstream.api.tables import CallbackRow, EffectRow, JobRow, LogRow, PortRow, TransferRow
from lclstream.jobs.models import Transition
from lclstream.security.identity import Identity

#: How often ports are chosen anew when other requests lease the same ones at the same moment.
_PORT_ATTEMPTS = 20


class Role(StrEnum):
    """What a job does for its transfer."""

    buffer = "buffer"
    engine = "engine"

    @property
    def client(self) -> ClientName:
        """Its name in the log."""
        return ClientName.cache if self is Role.buffer else ClientName.producer


class Receipt(StrEnum):
    """What became of a callback with a right signature."""

    taken = "taken"
    repeated = "repeated"
    replayed = "replayed"


class NoFreePortError(RuntimeError):
    """Every port of the range is leased or in use."""


class QuotaError(RuntimeError):
    """The user has as many transfers, or engine ranks, as he may have at a time."""


class KeyReusedError(ValueError):
    """An idempotency key was used before, for something else."""


@dataclass(frozen=True)
class Order:
    """What somebody asks for.

    Attributes:
        owner: who.
        name: a name for people.
        ranks: MPI ranks of the engine.
        producers: ranks that send.
        buffers: number of buffers.
        lease_s: seconds until it ends unless the lease is renewed; None: no lease.
        key: idempotency key, if any.
        request: what was asked for, as far as it must be the same when the key is used again.
        config: makes the engine's configuration from the buffers' input URLs.
        experiment: the experiment whose data are wanted, if that is known.
        spill: whether its buffers keep in files what nobody pulls.
        sentinel: empty messages each ZeroMQ consumer gets at the end.
        quota: how much the owner may have at a time; None: as much as he likes.
        tags: names and values to find it by.
        access: who may come to each side of its buffers (:data:`.readers.Access`); None: they ask nobody.
    """

    owner: Identity
    name: str
    ranks: int
    producers: int
    buffers: int
    lease_s: float | None
    key: str | None
    request: dict[str, Any]
    config: Callable[[list[str]], dict[str, Any]]
    experiment: str | None = None
    spill: bool = False
    sentinel: int = 0
    quota: QuotaConfig | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    access: Mapping[str, Any] | None = None

    @property
    def sha256(self) -> str:
        """A fingerprint of the request."""
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Note:
    """A log entry to be written together with an event."""

    client: ClientName
    state: JobState
    info: str
    jobndx: int = 0


class Store:
    """The database.

    Args:
        url: SQLAlchemy URL. A new SQLite file can be read by its owner only, because it holds the callbacks' secrets.
        limit_s: how long a transfer may stay in a state; None: for ever.
        clock: the time, in seconds since 1970.
    """

    def __init__(
        self, url: str, limit_s: Callable[[State], float | None], clock: Callable[[], float] = time.time
    ) -> None:
        self._limit_s = limit_s
        self.clock = clock
        self._engine = open_database(url)
        self._turns = Turns(self._engine)
        try:
            upgrade(self._engine)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def present(self, *, returned: bool) -> float:
        """Write down that the service is there (:func:`.absence.mark`); how many seconds it was away."""
        with self._writing() as session:
            return absence.mark(session, self.clock(), returned=returned)

    # Transfers

    def create(self, order: Order, ports: PortsConfig) -> tuple[TransferRow, bool]:
        """Store a transfer with its ports and its first effect; the flag tells whether it is a new one.

        Raises:
            NoFreePortError: too few ports are left.
            KeyReusedError: the key belongs to another request of the same owner.
            QuotaError: the owner has as much as he may have.
        """
        for _ in range(_PORT_ATTEMPTS):
            known = self._by_key(order)
            if known is not None:
                return known, False
            chosen = self._free_ports(ports, 3 * order.buffers)
            try:
                return self._insert(order, ports, chosen), True
            except IntegrityError:
                continue  # somebody else was quicker: with this key, or with one of these ports
        raise NoFreePortError(
            f"{_PORT_ATTEMPTS} times in a row other requests took the ports chosen at {ports.host}: try again"
        )

    def _by_key(self, order: Order) -> TransferRow | None:
        if order.key is None:
            return None
        with self._reading() as session:
            row = session.scalar(
                select(TransferRow).where(
                    TransferRow.owner == order.owner.login,
                    TransferRow.issuer == order.owner.issuer,
                    TransferRow.key == order.key,
                )
            )
        if row is not None and row.request_sha256 != order.sha256:
            raise KeyReusedError(
                f"Idempotency-Key {order.key!r} was used for transfer {row.id} with another configuration, "
                "other ranks or another name: use a new key for a new request"
            )
        return row

    def _free_ports(self, ports: PortsConfig, count: int) -> list[int]:
        with self._reading() as session:
            taken = set(session.scalars(select(PortRow.port).where(PortRow.host == ports.host)))
        chosen: list[int] = []
        for port in candidates(ports.first, ports.last, taken):
            if is_free(ports.host, port):
                chosen.append(port)
                if len(chosen) == count:
                    return chosen
        raise NoFreePortError(
            f"{count} ports are needed, and of {ports.first} to {ports.last} at {ports.host} {len(taken)} are leased "
            f"and only {len(chosen)} others are free: wait until a transfer ends, or widen `ports` in the configuration"
        )

    def _insert(self, order: Order, where: PortsConfig, ports: Sequence[int]) -> TransferRow:
        now = self.clock()
        host = where.host
        named = f"[{host}]" if ":" in host else host
        endpoints = [
            {
                "input": f"{where.scheme}://{named}:{first}",
                "output": f"{where.scheme}://{named}:{second}",
                "status": f"https://{named}:{third}",
            }
            for first, second, third in zip(ports[0::3], ports[1::3], ports[2::3], strict=True)
        ]
        row = TransferRow(
            owner=order.owner.login,
            issuer=order.owner.issuer,
            name=order.name,
            experiment=order.experiment,
            key=order.key,
            request_sha256=order.sha256,
            config=order.config([endpoint["input"] for endpoint in endpoints]),
            ranks=order.ranks,
            producers=order.producers,
            endpoints=endpoints,
            spill=order.spill,
            sentinel=order.sentinel,
            tags=dict(order.tags),
            access=None if order.access is None else dict(order.access),
            state=INITIAL.state.value,
            info="requested",
            jobndx=0,
            created=now,
            changed=now,
            deadline=self._deadline(INITIAL.state, now),
            lease_expires=None if order.lease_s is None else now + order.lease_s,
            lease_s=order.lease_s,
            buffers=[None] * order.buffers,
            released=False,
        )
        with self._writing() as session:
            if order.quota is not None:
                self._within_quota(session, order, order.quota)
            session.add(row)
            session.flush()
            session.add_all(PortRow(host=host, port=port, transfer=row.id, leased=now) for port in ports)
            self._enqueue(session, row.id, INITIAL.effects)
            self._log(session, row.id, Note(ClientName.consumer, INITIAL.state.phase.job_state, "requested"), now)
        return row

    @staticmethod
    def _within_quota(session: Session, order: Order, quota: QuotaConfig) -> None:
        owner = order.owner
        if session.get_bind().dialect.name == "postgresql":
            # One request of a user after the other, or two could both be the last that is allowed.
            session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"{owner.login} {owner.issuer}"))))
        transfers, ranks = session.execute(
            select(func.count(), func.coalesce(func.sum(TransferRow.ranks), 0)).where(
                TransferRow.owner == owner.login, TransferRow.issuer == owner.issuer, TransferRow.released.is_(False)
            )
        ).one()
        if quota.transfers is not None and transfers >= quota.transfers:
            raise QuotaError(
                f"{owner.login} has {transfers} transfers, and may have {quota.transfers}: wait or cancel one"
            )
        if quota.ranks is not None and ranks + order.ranks > quota.ranks:
            raise QuotaError(
                f"{owner.login} uses {ranks} engine ranks, and with {order.ranks} more would have more than the "
                f"{quota.ranks} allowed: ask for fewer, or wait until a transfer has ended"
            )

    def get(self, transfer: int) -> TransferRow | None:
        """A transfer; None when there is none of that number."""
        with self._reading() as session:
            return session.get(TransferRow, transfer)

    def list(
        self,
        owner: Identity | None,
        *,
        index: int,
        limit: int | None,
        states: Iterable[State],
        experiments: Iterable[str] = (),
        tags: Mapping[str, str] | None = None,
    ) -> list[TransferRow]:
        """Transfers in one of these states, newest first, from the `index`-th on, at most `limit`.

        Args:
            owner: only his, and those of `experiments`; None: everybody's.
            index: how many of the newest to leave out.
            limit: how many at most; None: all.
            states: in which states.
            experiments: experiments whose transfers are listed whoever owns them.
            tags: only those that have all of these.
        """
        whose = (
            true()
            if owner is None
            else or_(
                and_(TransferRow.owner == owner.login, TransferRow.issuer == owner.issuer),
                TransferRow.experiment.in_([*experiments]),
            )
        )
        tagged = [TransferRow.tags[name].as_string() == value for name, value in (tags or {}).items()]
        with self._reading() as session:
            return [
                *session.scalars(
                    select(TransferRow)
                    .where(whose, TransferRow.state.in_([state.value for state in states]), *tagged)
                    .order_by(TransferRow.id.desc())
                    .offset(index)
                    .limit(limit)
                )
            ]

    def unreleased(self) -> Sequence[int]:
        """Numbers of the transfers for which something is still to be done."""
        with self._reading() as session:
            return [
                *session.scalars(select(TransferRow.id).where(TransferRow.released.is_(False)).order_by(TransferRow.id))
            ]

    def renew(self, transfer: int, lease_s: float) -> float | None:
        """Move the end of a lease to `lease_s` seconds from now; None when the transfer has ended."""
        with self._writing() as session:
            row = session.get_one(TransferRow, transfer, with_for_update=True)
            if State(row.state).final:
                return None
            row.lease_expires, row.lease_s = self.clock() + lease_s, lease_s
            return row.lease_expires

    def happen(
        self, transfer: int, what: Event, info: str, notes: Sequence[Note] = (), jobndx: int = 0
    ) -> State | None:
        """Apply an event: state, time limit, what is to be done and the log change together.

        Args:
            transfer: its number.
            what: the event.
            info: why, for people.
            notes: log entries that belong to it.
            jobndx: index of the job it came from.

        Returns:
            The new state, or None when the event means nothing in the present one.
        """
        with self._writing() as session:
            row = session.get_one(TransferRow, transfer, with_for_update=True)
            answer = step(State(row.state), what)
            now = self.clock()
            moment = {
                Event.lease_expired: row.lease_expires,
                Event.time_limit: row.deadline,
                Event.set_aside: row.deadline,
            }.get(what, now)
            # A lease renewed since the caller looked has not expired.
            if answer is None or moment is None or moment > now:
                return None
            row.state, row.info, row.changed, row.jobndx = answer.state.value, storable(info), now, jobndx
            row.deadline = self._deadline(answer.state, now)
            if answer.state.final:
                # What has not been begun must not be begun any more; what was begun is found by its job row.
                session.execute(delete(EffectRow).where(EffectRow.transfer == transfer))
            self._enqueue(session, transfer, answer.effects)
            for note in (*notes, Note(ClientName.consumer, answer.state.phase.job_state, info, jobndx)):
                self._log(session, transfer, note, now)
            return answer.state

    def note(self, transfer: int, note: Note) -> None:
        """Add a log entry."""
        with self._writing() as session:
            self._log(session, transfer, note, self.clock())

    def log(self, transfer: int) -> Sequence[LogRow]:
        """A transfer's log, oldest first."""
        with self._reading() as session:
            return [
                *session.scalars(select(LogRow).where(LogRow.transfer == transfer).order_by(LogRow.time, LogRow.id))
            ]

    def keep_buffers(self, transfer: int, documents: Sequence[dict[str, Any] | None]) -> None:
        """Keep the last status document of each buffer; None keeps the one before."""
        with self._writing() as session:
            row = session.get_one(TransferRow, transfer, with_for_update=True)
            row.buffers = [new or old for new, old in zip(documents, row.buffers, strict=True)]

    def release(self, transfer: int) -> None:
        """Give a transfer's ports back: nothing of it is left."""
        with self._writing() as session:
            session.execute(delete(PortRow).where(PortRow.transfer == transfer))
            session.execute(delete(EffectRow).where(EffectRow.transfer == transfer))
            session.get_one(TransferRow, transfer, with_for_update=True).released = True

    def prune(self, before: float) -> int:
        """Forget transfers that were over and released before that time (seconds since 1970); how many they were."""
        with self._writing() as session:
            old = (TransferRow.released.is_(True), TransferRow.changed < before)
            count = session.scalar(select(func.count()).select_from(TransferRow).where(*old)) or 0
            session.execute(delete(TransferRow).where(*old))
            return count

    def leased_ports(self) -> dict[int, int]:
        """Leased ports and the transfers that hold them."""
        with self._reading() as session:
            return {row.port: row.transfer for row in session.scalars(select(PortRow))}

    # Effects

    def effects(self, transfer: int) -> Sequence[EffectRow]:
        """What is still to be done for a transfer, in order."""
        with self._reading() as session:
            return [*session.scalars(select(EffectRow).where(EffectRow.transfer == transfer).order_by(EffectRow.id))]

    def effect_done(self, effect: int) -> None:
        """Forget an effect that was done; one that an end has overtaken is gone already."""
        with self._writing() as session:
            session.execute(delete(EffectRow).where(EffectRow.id == effect))

    # Jobs

    def plan_job(self, transfer: int, role: Role, position: int, key: str, spec: dict[str, Any]) -> JobRow | None:
        """Write down a job before it is asked for.

        Returns:
            The job's row (the one written before a crash, if there is one), or None when the transfer has ended
            meanwhile, so that the job must not be asked for.
        """
        with self._writing() as session:
            row = session.get_one(TransferRow, transfer, with_for_update=True)
            job = session.scalar(
                select(JobRow).where(
                    JobRow.transfer == transfer, JobRow.role == role.value, JobRow.position == position
                )
            )
            if State(row.state).final:
                return None
            if job is None:
                job = JobRow(transfer=transfer, role=role.value, position=position, key=key, spec=spec, state="new")
                job.jobndx, job.info, job.started = 0, "", False
                session.add(job)
            return job

    def jobs(self, transfer: int) -> Sequence[JobRow]:
        """A transfer's jobs, buffers first."""
        with self._reading() as session:
            return [
                *session.scalars(
                    select(JobRow).where(JobRow.transfer == transfer).order_by(JobRow.role, JobRow.position)
                )
            ]

    def job_created(self, job: int, jobid: str) -> None:
        """Keep the id the job service gave."""
        with self._writing() as session:
            session.get_one(JobRow, job).jobid = jobid

    def job_started(self, job: int) -> None:
        """Keep that the job service has accepted the start."""
        with self._writing() as session:
            session.get_one(JobRow, job).started = True

    def record(self, job: int, transitions: Iterable[Transition]) -> None:
        """Take over a job's history: the log gets what it lacks, the state follows and never leaves an end."""
        with self._writing() as session:
            self._record(session, session.get_one(JobRow, job, with_for_update=True), transitions, exact=True)

    def job_by_id(self, role: Role, jobid: str) -> JobRow | None:
        """The job of that role that the job service knows by that id."""
        with self._reading() as session:
            return session.scalar(select(JobRow).where(JobRow.role == role.value, JobRow.jobid == jobid))

    def accept_callback(self, job: int, body: bytes, transition: Transition, sender: Identity) -> Receipt:
        """Take over what a verified callback says, once.

        Returns:
            `taken`, or for exactly one that was accepted before `repeated` (its sender did not get the answer) or
            `replayed` (it comes from somebody else); neither changes anything.
        """
        digest = hashlib.sha256(body).hexdigest()
        with self._writing() as session:
            row = session.get_one(JobRow, job, with_for_update=True)
            known = session.get(CallbackRow, (job, digest))
            if known is not None:
                same = (known.login, known.issuer) in ((None, None), (sender.login, sender.issuer))
                return Receipt.repeated if same else Receipt.replayed
            session.add(CallbackRow(job=job, sha256=digest, login=sender.login, issuer=sender.issuer))
            # A callback does not say when: its time is corrected by the history that is asked for next.
            self._record(session, row, [transition], exact=False)
        return Receipt.taken

    def _record(self, session: Session, row: JobRow, transitions: Iterable[Transition], *, exact: bool) -> None:
        for transition in transitions:
            known = session.scalar(
                select(LogRow).where(
                    LogRow.job == row.id, LogRow.jobndx == transition.jobndx, LogRow.state == transition.state.value
                )
            )
            if known is None:
                note = Note(Role(row.role).client, transition.state, transition.info, transition.jobndx)
                self._log(session, row.transfer, note, transition.time, job=row.id)
                session.flush()
            elif exact:
                known.time = transition.time
            if not JobState(row.state).is_final and _later(row, transition):
                row.state, row.jobndx, row.info = transition.state.value, transition.jobndx, storable(transition.info)

    # The rest is private.

    def _deadline(self, state: State, now: float) -> float | None:
        limit = self._limit_s(state)
        return None if limit is None else now + limit

    @staticmethod
    def _enqueue(session: Session, transfer: int, effects: Iterable[Effect]) -> None:
        for effect in effects:
            session.add(EffectRow(transfer=transfer, kind=effect.value))
            session.flush()  # one by one, so that their numbers are in order

    @staticmethod
    def _log(session: Session, transfer: int, note: Note, when: float, job: int | None = None) -> None:
        session.add(
            LogRow(
                transfer=transfer, job=job, time=when, client=note.client.value, state=note.state.value,
                info=storable(note.info), jobndx=note.jobndx,
            )
        )  # fmt: skip

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with self._engine.connect().execution_options(reading=True) as connection, Session(connection) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._turns.taken(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session


_ORDER = {JobState.new: 0, JobState.queued: 1, JobState.active: 2}


def _later(row: JobRow, transition: Transition) -> bool:
    """Whether the news is not older than what is known: callbacks come in any order."""
    if transition.state.is_final:
        return True
    known = JobState(row.state)
    return (transition.jobndx, _ORDER[transition.state]) > (row.jobndx, _ORDER[known])


def storable(text: str) -> str:
    """What a job printed, without what a database refuses: NUL in PostgreSQL, halves of surrogate pairs in both."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def states_seen_as(state: JobState | None) -> tuple[State, ...]:
    """The states that clients of the published service see as this one; all for None."""
    return tuple(known for known in (*LIVING, *_ENDS) if state is None or known.phase.job_state is state)


_ENDS = tuple(state for state in State if state.final)
