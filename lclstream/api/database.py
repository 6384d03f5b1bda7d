"""Opens a database, and brings it to the layout this version needs, with Alembic.

The service does both when it starts. ``python -m lclstream.api.database URL`` does it beforehand, for sites where the
service's own database account may not change tables.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import OperationalError

if TYPE_CHECKING:
    from alembic.config import Config

#: Database connections kept open; as many again may be opened for a moment. Request handlers run in 40 threads.
_CONNECTIONS = 25
#: An error would otherwise take what was to be written with it into the log: the secrets of jobs' callbacks too.
_OPTIONS: dict[str, Any] = {"pool_size": _CONNECTIONS, "max_overflow": _CONNECTIONS, "hide_parameters": True}

#: Seconds a write may wait for the others before it.
_TURN_S = 30.0


class LayoutError(ValueError):
    """The database was made by a newer version."""


class Turns:
    """Lets the threads of a service write to SQLite one after the other, in the order in which they came.

    SQLite lets one write at a time, and has the others sleep and try again: under load a request would wait for tens
    of seconds while whoever tries at the right moment goes first. PostgreSQL needs none of this.

    Args:
        engine: the database.
    """

    def __init__(self, engine: Engine) -> None:
        self._needed = engine.dialect.name == "sqlite"
        self._guard = threading.Lock()
        self._busy = False
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, and hold it within the block.

        Raises:
            OperationalError: it did not come within half a minute.
        """
        if not self._needed:
            yield
            return
        self._take()
        try:
            yield
        finally:
            self._give()

    def _take(self) -> None:
        with self._guard:
            if not self._busy:
                self._busy = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        if mine.wait(_TURN_S):
            return
        with self._guard:
            if not mine.is_set():
                self._waiting.remove(mine)
                raise OperationalError("BEGIN", None, TimeoutError(f"no turn to write within {_TURN_S:g} s"))

    def _give(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._busy = False


def open_database(url: str) -> Engine:
    """Connections to a database, as the service uses them.

    Raises:
        ValueError: a SQLite database that would not survive a restart.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True, **_OPTIONS)
    if parsed.database in (None, "", ":memory:"):
        raise ValueError(f"{url}: transfers must survive a restart: name a file, such as sqlite:///transfers.sqlite")
    path = Path(str(parsed.database)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(parsed, connect_args={"timeout": 30}, **_OPTIONS)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        # pysqlite would begin a transaction only at the first write, and two of them could then wait for each other.
        connection.isolation_level = None
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def upgrade(engine: Engine) -> None:
    """Apply what is missing, in one transaction.

    Raises:
        LayoutError: the database is newer than this program.
    """
    with engine.connect().execution_options(reading=True) as connection:
        if _layout(connection) == newest():
            return
    # Importing Alembic takes a fifth of a second, which a restart need not wait for.
    from alembic import command
    from alembic.util import CommandError

    with engine.begin() as connection:
        try:
            command.upgrade(_config(connection), "head")
        except CommandError as error:
            raise LayoutError(
                f"{engine.url.render_as_string(hide_password=True)}: this database was made by another version of "
                f"lclstream ({error}); this one knows layouts up to {newest()}: "
                "use the newer program, or another database"
            ) from error


def newest() -> str:
    """The layout this version needs: the last of the changes, whose names begin with their numbers."""
    names = (entry.name for entry in (files("lclstream.api") / "migrations" / "versions").iterdir())
    return max(name.partition("_")[0] for name in names if name[:4].isdigit())


def _layout(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return None if found is None else str(found)


def _config(connection: Connection | None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files("lclstream.api") / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m lclstream.api.database URL, such as postgresql+psycopg://host/transfers")
    database = open_database(sys.argv[1])
    try:
        upgrade(database)
        print(f"layout {newest()}")
    finally:
        database.dispose()
