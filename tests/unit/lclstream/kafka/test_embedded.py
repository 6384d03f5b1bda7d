from __future__ import annotations

import json
import uuid

import pytest
from confluent_kafka import Consumer, Producer

from lclstream.kafka import EmbeddedKafka
from lclstream.kafka.embedded import EmbeddedKafkaError


def produce(bootstrap: str, topic: str, *values: object) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "message.timeout.ms": 60000})
    for value in values:
        producer.produce(topic, json.dumps(value).encode())
    assert producer.flush(60) == 0


def consumer(bootstrap: str, *topics: str) -> Consumer:
    client = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    client.subscribe(list(topics))
    return client


def read(client: Consumer, count: int, timeout: float = 60) -> list[object]:
    values: list[object] = []
    while len(values) < count:
        message = client.poll(timeout)
        assert message is not None, f"{len(values)} of {count} messages in {timeout} s"
        if message.error() is None:
            values.append(json.loads(message.value()))
    return values


def test_messages_arrive_in_order() -> None:
    with EmbeddedKafka(["runs"]) as broker:
        produce(broker.bootstrap_servers, "runs", 1, 2, 3)
        client = consumer(broker.bootstrap_servers, "runs")
        assert read(client, 3) == [1, 2, 3]
        client.close()


def test_topics_have_the_partitions_asked_for() -> None:
    with EmbeddedKafka(["runs", "elog"], partitions=3) as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        topics = producer.list_topics(timeout=60).topics
        assert {name: len(topics[name].partitions) for name in ("runs", "elog")} == {"runs": 3, "elog": 3}


def test_a_broker_that_was_down_still_has_its_messages() -> None:
    with EmbeddedKafka(["runs"]) as broker:
        produce(broker.bootstrap_servers, "runs", "before")
        broker.set_down()
        broker.set_up()
        produce(broker.bootstrap_servers, "runs", "after")
        client = consumer(broker.bootstrap_servers, "runs")
        assert read(client, 2) == ["before", "after"]
        client.close()


def test_closing_twice_is_harmless_and_frees_the_port() -> None:
    broker = EmbeddedKafka(["runs"])
    address = broker.bootstrap_servers
    broker.close()
    broker.close()
    import socket

    host, port = address.split(":")
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect((host, int(port)))


def test_a_topic_without_partitions_is_refused() -> None:
    with pytest.raises(EmbeddedKafkaError, match="at least one"):
        EmbeddedKafka(["runs"], partitions=0)
