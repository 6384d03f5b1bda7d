from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer
from sqlalchemy import Engine

from lclstream.elog.database import open_database
from lclstream.elog.logbook import Logbook
from lclstream.elog.outbox import Outbox
from lclstream.kafka import EmbeddedKafka

EXPERIMENT = "mfx100852324"


@pytest.fixture
def broker() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(["runs", "experiments"]) as broker:
        yield broker


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path}/elog.sqlite")
    yield engine
    engine.dispose()


def runs_told(broker: EmbeddedKafka, count: int, timeout: float = 60) -> list[tuple[str, int]]:
    """CRUD and run number of the first messages in ``runs``, and that they have no key."""
    consumer = Consumer(
        {"bootstrap.servers": broker.bootstrap_servers, "group.id": uuid.uuid4().hex, "auto.offset.reset": "earliest"}
    )
    consumer.subscribe(["runs"])
    told: list[tuple[str, int]] = []
    deadline = time.monotonic() + timeout
    while len(told) < count and time.monotonic() < deadline:
        message = consumer.poll(0.5)
        if message is not None and message.error() is None:
            assert message.key() is None
            envelope = json.loads(message.value())
            assert envelope["experiment_name"] == EXPERIMENT
            told.append((envelope["CRUD"], envelope["value"]["num"]))
    consumer.close()
    return told


def test_messages_leave_in_the_order_things_happened(broker: EmbeddedKafka, engine: Engine, wait_until: Any) -> None:
    outbox = Outbox(engine, broker.bootstrap_servers)
    book = Logbook(engine, announce=outbox.announce)
    outbox.start()
    try:
        for _ in range(3):
            book.start_run(EXPERIMENT)
        wait_until(lambda: book.waiting()[0] == 0, 60, "empty outbox")
    finally:
        outbox.close()
    assert runs_told(broker, 5) == [("Create", 1), ("Update", 1), ("Create", 2), ("Update", 2), ("Create", 3)]


def test_what_happens_while_the_broker_is_down_is_told_when_it_is_back(
    broker: EmbeddedKafka, engine: Engine, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broker.set_down()
    outbox = Outbox(engine, broker.bootstrap_servers)
    book = Logbook(engine, announce=outbox.announce)
    outbox.start()
    try:
        book.start_run(EXPERIMENT)
        book.end_run(EXPERIMENT)
        wait_until(lambda: outbox.trouble, 60, "trouble")
        assert "messages stay in the outbox" in caplog.text
        assert book.waiting()[0] == 3
        broker.set_up()
        wait_until(lambda: book.waiting()[0] == 0, 60, "empty outbox")
        wait_until(lambda: outbox.trouble is None, 60, "end of trouble")
    finally:
        outbox.close()
    assert runs_told(broker, 2) == [("Create", 1), ("Update", 1)]


def test_what_an_earlier_process_left_goes_out_at_the_next_start(
    broker: EmbeddedKafka, engine: Engine, wait_until: Any
) -> None:
    book = Logbook(engine)
    book.start_run(EXPERIMENT)
    outbox = Outbox(engine, broker.bootstrap_servers)
    outbox.start()
    try:
        wait_until(lambda: book.waiting()[0] == 0, 60, "empty outbox")
    finally:
        outbox.close()
    assert runs_told(broker, 1) == [("Create", 1)]


def test_closing_is_prompt_while_the_broker_is_down_and_keeps_the_messages(
    broker: EmbeddedKafka, engine: Engine, wait_until: Any
) -> None:
    broker.set_down()
    outbox = Outbox(engine, broker.bootstrap_servers)
    book = Logbook(engine, announce=outbox.announce)
    outbox.start()
    book.start_run(EXPERIMENT)
    outbox.close()
    # It has not merely given up to wait for its thread.
    assert not outbox._thread.is_alive()
    assert book.waiting()[0] == 2
