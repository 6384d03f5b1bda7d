"""The Kafka consumer: message, decision, DAG run, commit, in this order and one at a time.

An offset is committed after Airflow's answer, or after the dead-letter topic has the message: a crash at any moment
means that the message comes again, which the DAG run's id makes harmless. While an event has to be tried again the
partitions are paused and the consumer goes on polling, so the group keeps its assignment however long that takes.

One thread, the one that calls :meth:`Processor.run`, owns consumer, producer, logbook client and Airflow client.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from lclstream.arp.actions import Actions, Outcome, RetryError
from lclstream.arp.config import ArpConfig, KafkaConfig
from lclstream.arp.observation import Observation

log = logging.getLogger("lclstream.arp")

#: Seconds between attempts for one event: the first pause, and the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
_POLL_S = 0.25
_OBSERVE_S = 1.0
_CONFIRM_S = 5.0
_TELL_AGAIN_S = 60.0
#: Bytes of a message in a dead letter that is too large with all of it.
_SHORT = 50_000


class KafkaUnreachableError(ConnectionError):
    """No broker answered in the time that was given."""


class _LostError(Exception):
    """The message's partition went to another run processor, or we are stopping: somebody else will have it."""


@dataclass(frozen=True)
class Delivery:
    """A message as the broker delivered it; `created` is its time in Unix seconds."""

    topic: str
    partition: int
    offset: int
    payload: bytes | None
    created: float | None

    @classmethod
    def of(cls, message: Message) -> Delivery:
        """The delivery in a message that is no error."""
        kind, milliseconds = message.timestamp()
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        assert topic is not None
        assert partition is not None
        assert offset is not None
        return cls(topic, partition, offset, message.value(), milliseconds / 1000 if kind else None)

    @property
    def key(self) -> tuple[str, int]:
        """Its partition."""
        return self.topic, self.partition

    def position(self, step: int = 0) -> TopicPartition:
        """Its place in the partition, or the one `step` further."""
        return TopicPartition(self.topic, self.partition, self.offset + step)

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"


class DeadLetters:
    """The topic for what could not be used.

    Args:
        config: broker and topic.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self.topic = config.dead_letter_topic
        self._producer = Producer(
            {
                "bootstrap.servers": config.bootstrap_servers,
                "acks": "all",
                "enable.idempotence": True,
                "message.timeout.ms": int(_CONFIRM_S * 1000),
                "log_level": 2,
            }
        )

    def send(self, delivery: Delivery, reason: str) -> None:
        """Put a message and the reason there.

        Raises:
            RetryError: the broker did not confirm it.
        """
        letter = {
            "reason": reason,
            "time": time.time(),
            "topic": delivery.topic,
            "partition": delivery.partition,
            "offset": delivery.offset,
        }
        error = self._sent(letter | _readable(delivery.payload))
        if isinstance(error, KafkaError) and error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            # A letter has more bytes than its message, which may be as large as can be; the topic still has all of it.
            payload = delivery.payload or b""
            short = {"reason": reason[:_SHORT], "size": len(payload)} | _readable(payload[:_SHORT])
            error = self._sent(letter | short)
        if error is not None:
            raise RetryError(f"dead-letter topic {self.topic} does not take the message: {error}")

    def _sent(self, letter: dict[str, Any]) -> KafkaError | str | None:
        """Why the broker did not confirm it; None: it did."""
        outcome: list[KafkaError | None] = []
        try:
            self._producer.produce(
                self.topic, json.dumps(letter).encode(), on_delivery=lambda error, _: outcome.append(error)
            )
        except KafkaException as error:
            # What can be known without the broker is told here, its size for one.
            reason: KafkaError = error.args[0]
            return reason
        deadline = time.monotonic() + _CONFIRM_S + 3
        while not outcome and time.monotonic() < deadline:
            self._producer.poll(0.1)
        if not outcome:
            self._producer.purge()
            return "no answer"
        return outcome[0]


def _readable(payload: bytes | None) -> dict[str, Any]:
    try:
        return {"value": None if payload is None else payload.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(payload or b"").decode()}


class Processor:
    """Reads the logbook's messages until it is told to stop.

    Args:
        config: the configuration.
        actions: what is done with a message.
        observation: where counts go.
        stop: set by anybody to end :meth:`run`.
    """

    def __init__(self, config: ArpConfig, actions: Actions, observation: Observation, stop: threading.Event) -> None:
        self._config = config
        self._actions = actions
        self._observation = observation
        self._stop = stop
        self._holding = False
        self._assigned: set[tuple[str, int]] = set()
        self._told: dict[int, float] = {}
        #: Partitions with messages from before us: `start: latest` skips those.
        self._old: set[tuple[str, int]] = set()
        self._next: dict[tuple[str, int], int] = {}
        self._observed = 0.0
        kafka = config.kafka
        self._dead_letters = DeadLetters(kafka)
        self._consumer = Consumer(
            {
                "bootstrap.servers": kafka.bootstrap_servers,
                "group.id": kafka.group,
                "client.id": "lclstream-arp",
                "enable.auto.commit": False,
                # A place that the broker no longer has must not make us skip what it still has: `start: latest` is
                # for a group's very first assignment, and `_begin` pins it.
                "auto.offset.reset": "earliest",
                "session.timeout.ms": int(kafka.session_timeout_s * 1000),
                "heartbeat.interval.ms": int(kafka.session_timeout_s * 1000 / 4),
                # Partitions that stay with us are not interrupted when another run processor comes or goes.
                "partition.assignment.strategy": "cooperative-sticky",
                "allow.auto.create.topics": False,
                # A broker answers a waiting fetch when a message comes; the embedded one only when its time is over.
                "fetch.wait.max.ms": 100,
                # A topic that is made later is found soon.
                "topic.metadata.refresh.interval.ms": 10_000,
                "reconnect.backoff.max.ms": 2_000,
                "log_level": 2,
                "error_cb": self._heard,
            }
        )

    def _heard(self, error: KafkaError) -> None:
        # librdkafka says it at each attempt to connect, several times a second.
        now = time.monotonic()
        if now - self._told.get(error.code(), -_TELL_AGAIN_S) >= _TELL_AGAIN_S:
            self._told[error.code()] = now
            log.warning("Kafka at %s: %s", self._config.kafka.bootstrap_servers, error.str())

    def connect(self) -> None:
        """Wait until a broker answers, and say which topics are missing.

        Raises:
            KafkaUnreachableError: none did in `start_timeout_s`.
        """
        deadline = time.monotonic() + self._config.start_timeout_s
        while True:
            try:
                topics = self._consumer.list_topics(timeout=min(5.0, self._config.start_timeout_s)).topics
                if self._config.kafka.start == "latest":
                    self._old = self._never_read(topics)
                break
            except KafkaException as error:
                if self._stop.is_set() or time.monotonic() > deadline:
                    raise KafkaUnreachableError(
                        f"no Kafka broker answers at {self._config.kafka.bootstrap_servers} "
                        f"({error.args[0].str()}, waited {self._config.start_timeout_s:g} s): is it running, and is "
                        "kafka.bootstrap_servers right?"
                    ) from error
        missing = [name for name in self._config.kafka.topics if name not in topics]
        if missing:
            log.warning("Kafka has no topic %s yet: it is read once it is there", ", ".join(missing))
        if self._dead_letters.topic not in topics:
            log.warning(
                "Kafka has no topic %s: make it, or a message that cannot be used holds up all others",
                self._dead_letters.topic,
            )

    def _never_read(self, topics: Mapping[str, Any]) -> set[tuple[str, int]]:
        """Partitions of the topics in which the group has no place yet; one added to a topic it reads is new."""
        there = [
            TopicPartition(name, number)
            for name in self._config.kafka.topics
            if name in topics
            for number in topics[name].partitions
        ]
        if not there:
            return set()
        read = {entry.topic for entry in self._consumer.committed(there, timeout=5) if entry.offset >= 0}
        return {(entry.topic, entry.partition) for entry in there if entry.topic not in read}

    def run(self) -> None:
        """Process messages until `stop` is set, then leave the group."""
        self._consumer.subscribe(list(self._config.kafka.topics), on_assign=self._on_assign, on_revoke=self._on_revoke)
        try:
            while not self._stop.is_set():
                message = self._consumer.poll(_POLL_S)
                self._observe()
                if message is None:
                    continue
                error = message.error()
                if error is not None:
                    self._complain(error)
                    continue
                delivery = Delivery.of(message)
                try:
                    self._process(delivery)
                except _LostError:
                    log.info("%s: left to whoever reads its partition next", delivery)
        finally:
            self._observation.stopping()
            self.close()

    def close(self) -> None:
        """Leave the group, so that others take over at once."""
        self._consumer.close()

    def _complain(self, error: KafkaError) -> None:
        if error.fatal():
            raise KafkaException(error)
        # A topic that is missing, or that we may not read yet: the consumer goes on by itself.
        log.warning("Kafka: %s", error.str())

    # Assignment

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._config.kafka.start == "latest":
            self._begin(consumer, partitions)
        consumer.incremental_assign(partitions)
        if self._holding:
            consumer.pause(partitions)
        self._assigned |= {(entry.topic, entry.partition) for entry in partitions}
        self._observation.assigned(self._assigned)
        if partitions:
            log.info("reading %s", ", ".join(f"{entry.topic}[{entry.partition}]" for entry in partitions))

    def _begin(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Without a committed offset a group that starts at the end would, after a crash, start at the new end.
        begin = []
        for entry in consumer.committed(partitions, timeout=10):
            if entry.offset >= 0:
                continue
            # One that was made after us holds what happened since: its first message, often the one that made it, may
            # be there before we hear of it.
            old = (entry.topic, entry.partition) in self._old
            _, end = consumer.get_watermark_offsets(entry, timeout=10) if old else (0, 0)
            begin.append(TopicPartition(entry.topic, entry.partition, end))
        if begin:
            # All at once: half of it would look like a topic that the group has read before.
            consumer.commit(offsets=begin, asynchronous=False)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_unassign(partitions)
        for entry in partitions:
            self._assigned.discard((entry.topic, entry.partition))
            self._next.pop((entry.topic, entry.partition), None)
        self._observation.assigned(self._assigned)
        if partitions:
            log.info("no longer reading %s", ", ".join(f"{entry.topic}[{entry.partition}]" for entry in partitions))

    # One message

    def _process(self, delivery: Delivery) -> None:
        started = time.monotonic()
        self._next[delivery.key] = delivery.offset
        outcome = self._insist(delivery)
        self._commit(delivery)
        seconds = time.monotonic() - started
        self._observation.done(str(delivery), outcome, seconds)
        log.info("%s %s (%.3f s)", delivery, outcome, seconds)

    def _insist(self, delivery: Delivery) -> Outcome:
        """Repeat until the message is done; the pauses between attempts grow to a bound.

        Raises:
            _LostError: the partition is no longer ours, or we are stopping.
        """
        pause = FIRST_PAUSE_S
        suspected_since: float | None = None
        outcome: Outcome | None = None
        while True:
            try:
                if outcome is None:
                    outcome = self._handled(delivery)
                for reason in outcome.rejected:
                    self._dead_letters.send(delivery, reason)
                return outcome
            except RetryError as error:
                now = time.monotonic()
                suspected_since = (suspected_since or now) if error.suspicious else None
                limit = self._config.airflow.server_errors_at_most_s
                if suspected_since is not None and now - suspected_since >= limit:
                    # Airflow works and fails on this one event: it must not hold up all others for ever.
                    outcome = Outcome(subject=str(delivery), rejected=[f"given up after {limit:g} s: {error}"])
                    continue
                self._observation.retrying(str(delivery), str(error), delivery.created)
                log.warning("%s: %s; trying again in %.2f s", delivery, error, pause)
                self._hold(delivery, pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _handled(self, delivery: Delivery) -> Outcome:
        try:
            sent = None if delivery.created is None else datetime.fromtimestamp(delivery.created, UTC)
            return self._actions.handle(delivery.topic, delivery.payload, sent)
        except RetryError:
            raise
        except Exception as error:
            # A message nobody thought of must not stop all others, again at each start. It is kept, with the reason.
            log.exception("%s: an error in the run processor itself", delivery)
            return Outcome(subject=str(delivery), rejected=[f"unexpected {type(error).__name__}: {error}"])

    def _hold(self, delivery: Delivery, seconds: float) -> None:
        """Wait without leaving the group.

        Raises:
            _LostError: the partition is no longer ours, or we are stopping.
        """
        self._holding = True
        self._consumer.pause(self._consumer.assignment())
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                stray = self._consumer.poll(min(_POLL_S, max(0.0, deadline - time.monotonic())))
                if stray is not None and stray.error() is None:
                    # It was on its way when its partition was paused: it has to come again.
                    self._consumer.seek(Delivery.of(stray).position())
                self._observe()
                if self._stop.is_set() or delivery.key not in self._assigned:
                    raise _LostError
        finally:
            self._holding = False
            self._consumer.resume(self._consumer.assignment())

    def _commit(self, delivery: Delivery) -> None:
        try:
            self._consumer.commit(offsets=[delivery.position(1)], asynchronous=False)
            self._next[delivery.key] = delivery.offset + 1
        except KafkaException as error:
            # The group moved on without us, or the broker is away: the message comes again, and finds its DAG run.
            log.warning("%s: done, but not committed (%s): it will come again", delivery, error.args[0].str())

    def _observe(self) -> None:
        now = time.monotonic()
        if now - self._observed < _OBSERVE_S:
            return
        self._observed = now
        partitions = [TopicPartition(topic, number) for topic, number in self._assigned]
        if not partitions:
            return
        lag: dict[tuple[str, int], int] = {}
        for entry in self._consumer.position(partitions):
            low, high = self._consumer.get_watermark_offsets(entry, cached=True)
            key = (entry.topic, entry.partition)
            # Neither is known before the first answer of the broker; a message that is being done is not committed.
            at = self._next.get(key, entry.offset if entry.offset >= 0 else low)
            if high >= 0:
                lag[key] = max(0, high - max(0, at))
        self._observation.lagging(lag)
