"""The database: layouts, and the same behaviour on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from lclstream.api import database
from lclstream.api.config import PortsConfig
from lclstream.api.models import ClientName, JobState
from lclstream.api.states import Effect, Event, State
from lclstream.api.store import Note, Order, Receipt, Role, Store
from lclstream.api.tables import Base
from lclstream.jobs.models import Transition
from lclstream.security.identity import Identity

ALICE = Identity(login="alice", issuer="CN=s3df", subject="UID=alice", serial="1")
PORTS = PortsConfig(first=21700, last=21999)


def _postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty PostgreSQL database, on a UNIX socket of its own."""
    pytest.importorskip("psycopg")
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed here")
    folder = tmp_path_factory.mktemp("postgresql", numbered=True)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        try:
            import pwd

            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no account postgres")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        short = Path(f"/tmp/lclstream-postgresql-{os.getpid()}")
        short.mkdir(mode=0o700)
        os.chown(short, account.pw_uid, account.pw_gid)
        folder = short
    try:
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "test", "--auth=trust", "-E", "UTF8", "--no-sync"],
            check=True, capture_output=True, cwd="/", **user,
        )  # fmt: skip
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-F"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **user,
        )  # fmt: skip
        try:
            yield f"postgresql+psycopg://test@/postgres?host={folder}"
        finally:
            server.terminate()
            server.wait(20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path, wait_until: Callable[..., None]) -> str:
    """A database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/transfers.sqlite"
    url = str(request.getfixturevalue("postgresql"))
    engine = database.open_database(url)

    def emptied() -> bool:
        from sqlalchemy.exc import OperationalError

        try:
            with engine.begin() as connection:
                connection.execute(text("DROP SCHEMA public CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
        except OperationalError:
            return False  # it is still starting
        return True

    wait_until(emptied, 60, "PostgreSQL")
    engine.dispose()
    return url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url, lambda state: 100.0)
    yield store
    store.close()


def order(**changes: Any) -> Order:
    return Order(
        **{
            "owner": ALICE,
            "name": "",
            "experiment": None,
            "ranks": 1,
            "producers": 1,
            "buffers": 1,
            "lease_s": None,
            "key": None,
            "request": {},
            "config": lambda inputs: {"urls": inputs},
            "quota": None,
            **changes,
        }
    )


def test_the_changes_make_exactly_the_tables_of_the_program(url: str) -> None:
    engine = database.open_database(url)
    database.upgrade(engine)
    database.upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert "transfers" in inspect(connection).get_table_names()
    engine.dispose()


def test_the_newest_layout_is_known_without_alembic() -> None:
    from alembic.script import ScriptDirectory

    assert database.newest() == ScriptDirectory.from_config(database._config(None)).get_current_head()


def test_a_database_of_the_first_layout_is_brought_to_this_one(url: str) -> None:
    from alembic import command

    engine = database.open_database(url)
    with engine.begin() as connection:
        command.upgrade(database._config(connection), "0001")
        connection.execute(
            text(
                "INSERT INTO transfers (owner, issuer, name, request_sha256, config, ranks, producers, endpoints,"
                " state, info, jobndx, created, changed, buffers, released)"
                " VALUES ('alice', 'CN=s3df', '', '', '{}', 1, 1, '[]', 'done', '', 0, 1, 1, '[]', true)"
            )
        )
    engine.dispose()
    store = Store(url, lambda state: None)
    (row,) = store.list(ALICE, index=0, limit=None, states=list(State))
    assert (row.owner, row.spill) == ("alice", False)
    store.close()


def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    engine = database.open_database(url)
    database.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(database.LayoutError, match=r"made by another version.*use the newer program"):
        Store(url, lambda state: None)


def test_a_whole_life_in_rows(store: Store) -> None:
    row, new = store.create(order(lease_s=5, key="k"), PORTS)
    assert new
    assert store.create(order(key="k"), PORTS)[1] is False
    assert [effect.kind for effect in store.effects(row.id)] == [Effect.start_buffer]
    job = store.plan_job(row.id, Role.buffer, 0, "key", {"script": "x"})
    assert job is not None
    again = store.plan_job(row.id, Role.buffer, 0, "another", {"script": "y"})
    assert again is not None
    assert (again.id, again.key, again.spec) == (job.id, "key", {"script": "x"}), "what was written first is kept"
    store.job_created(job.id, "1.5")
    store.job_started(job.id)
    late = Transition(time=3.0, jobndx=1, state=JobState.active, info="here\0\ud800")
    assert store.accept_callback(job.id, b"body", late, ALICE) is Receipt.taken
    assert store.accept_callback(job.id, b"body", late, ALICE) is Receipt.repeated
    stranger = Identity(login="alice", issuer="CN=elsewhere", subject="UID=alice", serial="1")
    assert store.accept_callback(job.id, b"body", late, stranger) is Receipt.replayed
    store.record(
        job.id, [Transition(time=2.0, jobndx=1, state=JobState.queued, info="7"), late.model_copy(update={"time": 2.5})]
    )
    (known,) = store.jobs(row.id)
    assert known.state == "active", "a late `queued` does not turn it back"
    entries = [(entry.state, entry.time) for entry in store.log(row.id) if entry.job == job.id]
    assert entries == [("queued", 2.0), ("active", 2.5)], "the history corrects the callback's time"
    store.record(
        job.id,
        [Transition(time=4.0, jobndx=1, state=JobState.failed), Transition(time=5.0, jobndx=2, state=JobState.queued)],
    )
    assert store.jobs(row.id)[0].state == "failed", "an end is never left"
    assert (
        store.happen(row.id, Event.buffer_failed, "why", [Note(ClientName.cache, JobState.failed, "tail")])
        is State.failed
    )
    assert store.happen(row.id, Event.cancel, "late") is None
    assert [effect.kind for effect in store.effects(row.id)] == ["stop_engine", "stop_buffer", "collect", "free_ports"]
    assert store.plan_job(row.id, Role.engine, 0, "key2", {}) is None, "nothing is started after the end"
    assert store.renew(row.id, 5) is None
    store.keep_buffers(row.id, [{"held": 1}])
    store.keep_buffers(row.id, [None])
    assert len(store.leased_ports()) == 3
    store.release(row.id)
    kept = store.get(row.id)
    assert kept is not None
    assert (kept.released, kept.buffers) == (True, [{"held": 1}])
    assert store.leased_ports() == {}
    assert store.unreleased() == []


def test_a_write_that_fails_does_not_tell_the_secret_of_a_job(store: Store) -> None:
    """Its words go into the log, which more people read than the database."""
    values = {"transfer": 10**6, "spec": '{"cb_secret": "a-secret-nobody-reads"}'}
    row = "(transfer, role, position, key, spec, state, jobndx, info, started)"
    insert = f"INSERT INTO jobs {row} VALUES (:transfer, 'buffer', 0, 'key', :spec, 'new', 0, '', false)"
    with pytest.raises(IntegrityError, match="INSERT INTO jobs") as caught, store._engine.begin() as connection:
        connection.execute(text(insert), values)
    assert "a-secret-nobody-reads" not in str(caught.value)


def test_ports_and_keys_under_concurrent_requests(store: Store) -> None:
    """Each port to one transfer, each key to one transfer, whoever comes at the same moment."""
    gate = threading.Barrier(12)

    def ask(number: int) -> int:
        gate.wait()
        return store.create(order(key=f"key-{number % 6}"), PORTS)[0].id

    with ThreadPoolExecutor(12) as threads:
        ids = list(threads.map(ask, range(12)))
    assert len(set(ids)) == 6
    leased = store.leased_ports()
    assert len(leased) == 18
    rows = [store.get(number) for number in set(ids)]
    ports = [url.rpartition(":")[2] for row in rows if row for endpoint in row.endpoints for url in endpoint.values()]
    assert sorted(map(int, ports)) == sorted(leased)


def test_a_clock_that_was_moved_on_meanwhile_has_not_run_out(store: Store) -> None:
    row, _ = store.create(order(lease_s=100), PORTS)
    assert store.happen(row.id, Event.lease_expired, "late look") is None
    assert store.happen(row.id, Event.time_limit, "late look") is None
    store.renew(row.id, 0.0001)
    later = store.clock() + 50
    store.clock = lambda: later
    assert store.happen(row.id, Event.time_limit, "late look") is None
    assert store.happen(row.id, Event.lease_expired, "now") is State.expired


def test_concurrent_events_are_applied_one_after_another(store: Store) -> None:
    row, _ = store.create(order(), PORTS)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: store.happen(row.id, Event.cancel, "now"), range(8)))
    assert answers.count(State.canceled) == 1
    assert len(store.effects(row.id)) == 4


def test_writers_to_sqlite_come_in_the_order_in_which_they_asked(
    tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    turns = database.Turns(database.open_database(f"sqlite:///{tmp_path}/turns.sqlite"))
    order: list[int] = []

    def write(number: int) -> None:
        with turns.taken():
            order.append(number)

    threads = []
    with turns.taken():
        for number in range(8):
            threads.append(threading.Thread(target=write, args=(number,)))
            threads[-1].start()
            wait_until(lambda number=number: len(turns._waiting) == number + 1, 60, "writer in the queue")
    for thread in threads:
        thread.join(60)
    assert order == list(range(8))


def test_a_writer_that_waits_too_long_is_told_so_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    monkeypatch.setattr(database, "_TURN_S", 0.05)
    turns = database.Turns(database.open_database(f"sqlite:///{tmp_path}/turns.sqlite"))
    with (
        turns.taken(),
        ThreadPoolExecutor(1) as thread,
        pytest.raises(OperationalError, match=r"no turn to write within 0\.05 s"),
    ):
        thread.submit(turns.taken().__enter__).result(20)
    with turns.taken():
        assert turns._busy
    assert not turns._busy


def test_whoever_asks_is_not_kept_waiting_by_a_crowd_that_writes(tmp_path: Path) -> None:
    """Left to themselves, threads that write to SQLite starve each other for seconds."""
    store = Store(f"sqlite:///{tmp_path}/crowd.sqlite", lambda state: 100.0)
    row, _ = store.create(order(), PORTS)
    written: dict[int, int] = dict.fromkeys(range(16), 0)
    over, gate = threading.Event(), threading.Barrier(len(written))

    def write(number: int) -> None:
        gate.wait(60)
        while not over.is_set():
            store.renew(row.id, 60)
            written[number] += 1

    with ThreadPoolExecutor(16) as threads:
        running = [threads.submit(write, number) for number in written]
        while max(written.values()) < 30 and all(not one.done() for one in running):
            over.wait(0.01)
        over.set()
    store.close()
    assert 2 * min(written.values()) >= max(written.values()), written
