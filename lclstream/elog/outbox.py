"""Hands the outbox's messages to Kafka, in their order, until the broker has confirmed each of them.

One thread owns the producer and reads the outbox table. A message leaves the table after the broker confirmed it, so a
crash or a broker that is down delays messages and loses none; a crash between confirmation and deletion sends one
twice, which consumers of the logbook must expect anyway. Messages carry no key, as the original's.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from confluent_kafka import KafkaException, Producer
from sqlalchemy import Engine, delete, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from lclstream.elog.database import Message

log = logging.getLogger("lclstream.elog.outbox")

#: Seconds the broker may take to confirm one message.
CONFIRM_S = 4.0
#: Seconds between attempts while the broker does not confirm: the first pause, and the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
#: Seconds after which the table is read although nobody announced a message (another process may share the database).
IDLE_S = 2.0
_BATCH = 200
# librdkafka looks for messages that took too long about once a second.
_SLACK_S = 3.0


class Outbox:
    """The thread that delivers; :meth:`start` it, :meth:`announce` new messages, :meth:`close` it.

    Args:
        engine: the database with the outbox table.
        bootstrap_servers: the brokers.
    """

    def __init__(self, engine: Engine, bootstrap_servers: str) -> None:
        self._engine = engine
        self.bootstrap_servers = bootstrap_servers
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elog-outbox", daemon=True)
        #: Why the broker did not confirm the last message; None while all is well.
        self.trouble: str | None = None
        self._reason: str | None = None
        #: Messages confirmed since the start.
        self.delivered = 0

    def start(self) -> None:
        """Begin to deliver; what an earlier process left goes out first."""
        self._thread.start()

    def announce(self) -> None:
        """Say that there are new messages. Any thread may call it."""
        self._wake.set()

    def close(self) -> None:
        """Stop within the time one message may take; what is left waits in the table for the next start."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CONFIRM_S + _SLACK_S)

    def _heard(self, error: Any) -> None:
        # The delivery report only says "timed out"; the reason, such as "connection refused", comes here.
        self._reason = str(error.str())

    def _run(self) -> None:
        producer = Producer(
            {
                "bootstrap.servers": self.bootstrap_servers,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 0,
                # We retry, with the message safe in the table: the producer must not keep it longer than that.
                "message.timeout.ms": int(CONFIRM_S * 1000),
                "socket.connection.setup.timeout.ms": 2000,
                "reconnect.backoff.max.ms": 1000,
                # What goes wrong is told once, by us, with what it means; librdkafka would say it at every attempt.
                "log_level": 2,
                "error_cb": self._heard,
            }
        )
        pause = FIRST_PAUSE_S
        while not self._stop.is_set():
            self._wake.clear()
            try:
                emptied = self._deliver_batch(producer)
                trouble = None
            except (KafkaException, SQLAlchemyError, BufferError) as error:
                emptied, trouble = False, self._reason or str(error.args[0] if error.args else error)
            if trouble is not None:
                log.warning(
                    "messages stay in the outbox: %s does not take them (%s); trying again in %.1f s",
                    self.bootstrap_servers,
                    trouble,
                    pause,
                )
                self.trouble = trouble
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self.trouble is not None:
                log.info("%s takes messages again", self.bootstrap_servers)
                self.trouble = None
            self._reason = None
            pause = FIRST_PAUSE_S
            if emptied:
                self._wake.wait(IDLE_S)

    def _deliver_batch(self, producer: Producer) -> bool:
        """Deliver some messages; True when the table is empty afterwards.

        Raises:
            KafkaException: the broker did not confirm a message; it and all later ones stay in the table.
        """
        with Session(self._engine) as session:
            rows = session.execute(
                select(Message.id, Message.topic, Message.payload).order_by(Message.id).limit(_BATCH)
            )
            batch = rows.all()
        for number, topic, payload in batch:
            if self._stop.is_set():
                return False
            # One after the other: a later message must not overtake one that has to be sent again.
            self._deliver(producer, topic, payload.encode())
            with Session(self._engine) as session, session.begin():
                session.execute(delete(Message).where(Message.id == number))
            self.delivered += 1
        return len(batch) < _BATCH

    def _deliver(self, producer: Producer, topic: str, payload: bytes) -> None:
        outcome: list[Any] = []
        producer.produce(topic, payload, on_delivery=lambda error, _message: outcome.append(error))
        deadline = time.monotonic() + CONFIRM_S + _SLACK_S
        while not outcome and time.monotonic() < deadline:
            producer.poll(0.1)
            if self._stop.is_set() and not outcome:
                # Bounded shutdown: the message is in the table and goes out at the next start.
                producer.flush(1.0)
                break
        if not outcome:
            producer.purge()
            raise KafkaException(f"{topic}: not confirmed in time")
        if outcome[0] is not None:
            raise KafkaException(outcome[0])
