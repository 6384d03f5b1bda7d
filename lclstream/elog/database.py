"""The stand-in's tables. Documents are kept as JSON text, keys beside them; the outbox is a table among them.

The logbook takes NaN and Infinity, which PostgreSQL's JSON type refuses: hence text.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from sqlalchemy import BigInteger, Engine, Float, Integer, String, Text, UniqueConstraint, create_engine, event
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator


class JsonText(TypeDecorator[dict[str, Any]]):
    """A JSON object in a text column, bare NaN and Infinity included."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> str | None:
        """Python to database."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:
        """Database to Python."""
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    """All tables of the stand-in."""


class Experiment(Base):
    """An experiment, and the number its latest run got (0: none yet)."""

    __tablename__ = "experiments"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    last_run: Mapped[int] = mapped_column(BigInteger, default=0)


class Run(Base):
    """A run; `num_int` is empty where runs have names instead of numbers."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("experiment", "num_text"),)
    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    experiment: Mapped[str] = mapped_column(String(64), index=True)
    num_int: Mapped[int | None] = mapped_column(BigInteger)
    num_text: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any]] = mapped_column(JsonText)


class LatestRun(Base):
    """Which run of an experiment was started last: neither numbers, names nor begin times, which are given, tell."""

    __tablename__ = "latest_runs"
    experiment: Mapped[str] = mapped_column(String(64), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(24))


class File(Base):
    """A file of a run."""

    __tablename__ = "files"
    __table_args__ = (UniqueConstraint("experiment", "run_text", "path"),)
    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    experiment: Mapped[str] = mapped_column(String(64), index=True)
    run_text: Mapped[str] = mapped_column(Text)
    path: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any]] = mapped_column(JsonText)


class Definition(Base):
    """A workflow definition."""

    __tablename__ = "workflow_definitions"
    __table_args__ = (UniqueConstraint("experiment", "name"),)
    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    experiment: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any]] = mapped_column(JsonText)


class Job(Base):
    """A workflow job; `sequence` keeps the order in which they were asked for."""

    __tablename__ = "workflow_jobs"
    __table_args__ = ({"sqlite_autoincrement": True},)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(24), unique=True)
    experiment: Mapped[str] = mapped_column(String(64), index=True)
    def_id: Mapped[str] = mapped_column(String(24), index=True)
    document: Mapped[dict[str, Any]] = mapped_column(JsonText)


class Entry(Base):
    """A text in the logbook."""

    __tablename__ = "entries"
    __table_args__ = ({"sqlite_autoincrement": True},)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(24), unique=True)
    experiment: Mapped[str] = mapped_column(String(64), index=True)
    document: Mapped[dict[str, Any]] = mapped_column(JsonText)


class Message(Base):
    """A message the broker does not have yet. `id` is the order in which they go out, `created` in Unix seconds."""

    __tablename__ = "outbox"
    __table_args__ = ({"sqlite_autoincrement": True},)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    topic: Mapped[str] = mapped_column(String(64))
    payload: Mapped[str] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float)


def open_database(url: str) -> Engine:
    """An engine whose tables exist.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the URL is wrong, or the database does not answer.
    """
    # What users write down about their runs is not for the log of an error.
    engine = create_engine(url, hide_parameters=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_at_once)
    Base.metadata.create_all(engine)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
    # Python's sqlite3 begins a transaction by itself, too late: two writers that both read first would dead-lock.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=10000")
    # A run that was announced must survive a power cut, so that its number is not given twice.
    connection.execute("PRAGMA synchronous=FULL")


def _begin_at_once(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
