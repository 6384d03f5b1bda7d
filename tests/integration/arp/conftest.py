"""Airflow's REST interface in a thread, messages as the logbook sends them, and run processors in processes."""

from __future__ import annotations

import importlib.util
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition

from lclstream.kafka import EmbeddedKafka
from lclstream.security.http import client

_BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def load(name: str) -> Any:
    """A module of the benchmarks' folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def airflow() -> Iterator[Any]:
    with load("fake_airflow").FakeAirflow() as server:
        yield server


@pytest.fixture
def broker() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka() as broker:
        yield broker


class Topics:
    """Writes to topics as the logbook does, and reads them."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers
        self.producer = Producer({"bootstrap.servers": bootstrap_servers, "message.timeout.ms": 60000})

    def send(self, topic: str, *payloads: Any, partition: int | None = None) -> None:
        place = {} if partition is None else {"partition": partition}
        for payload in payloads:
            self.producer.produce(
                topic, payload if isinstance(payload, bytes) else json.dumps(payload).encode(), **place
            )
        assert self.producer.flush(60) == 0

    def read(self, topic: str, count: int, timeout: float = 60) -> list[Any]:
        consumer = Consumer(
            {"bootstrap.servers": self.bootstrap_servers, "group.id": uuid.uuid4().hex, "auto.offset.reset": "earliest"}
        )
        consumer.assign([TopicPartition(topic, 0, 0)])
        values: list[Any] = []
        while len(values) < count:
            message = consumer.poll(timeout)
            assert message is not None, f"{len(values)} of {count} messages in {topic}"
            if message.error() is None:
                values.append(json.loads(message.value()))
        consumer.close()
        return values

    def committed(self, group: str, topic: str = "runs", partition: int = 0) -> int:
        consumer = Consumer({"bootstrap.servers": self.bootstrap_servers, "group.id": group})
        offset = consumer.committed([TopicPartition(topic, partition)], timeout=60)[0].offset
        consumer.close()
        return int(offset)

    def held(self, topic: str, partition: int = 0) -> tuple[int, int]:
        """The first offset the broker still has, and the next one it will give."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap_servers, "group.id": uuid.uuid4().hex})
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=60)
        consumer.close()
        return low, high


@pytest.fixture
def topics(broker: EmbeddedKafka) -> Topics:
    return Topics(broker.bootstrap_servers)


@pytest.fixture
def make_topics() -> Callable[[EmbeddedKafka], Topics]:
    """``make_topics(broker)`` for a broker that is not everybody's."""
    return lambda broker: Topics(broker.bootstrap_servers)


def run_message(number: int | str, crud: str = "Create", experiment: str = "mfx1", **fields: Any) -> dict[str, Any]:
    document = {
        "_id": uuid.uuid4().hex[:24],
        "num": number,
        "type": "DATA",
        "begin_time": "2026-03-01T12:00:00.123000+00:00",
        "end_time": None,
        "params": {},
        "editable_params": {},
        **fields,
    }
    return {"experiment_name": experiment, "CRUD": crud, "value": document}


@pytest.fixture(name="run_message")
def run_message_fixture() -> Callable[..., dict[str, Any]]:
    return run_message


DEFINITIONS = [
    {"name": "stream", "executable": "airflow:stream_run", "trigger": "START_OF_RUN", "location": "s3df"},
    {"name": "reduce", "executable": "airflow:reduce_run", "trigger": "END_OF_RUN", "location": "s3df"},
]


@pytest.fixture
def write_config(tmp_path: Path, airflow: Any, broker: EmbeddedKafka, sites: Any) -> Callable[..., Path]:
    """``write_config(**changes)`` writes a configuration file with definitions from a file, and gives its path."""

    def write(**changes: Any) -> Path:
        password = tmp_path / "password"
        password.write_text(load("fake_airflow").PASSWORD + "\n")
        password.chmod(0o600)
        definitions = tmp_path / "definitions.yaml"
        if not definitions.exists():
            definitions.write_text(yaml.safe_dump({"definitions": DEFINITIONS}))
        document = {
            "kafka": {"bootstrap_servers": broker.bootstrap_servers, "group": "arp", "session_timeout_s": 4},
            "definitions": {"file": str(definitions)},
            "airflow": {"url": airflow.url, "username": "arp", "password_file": str(password)},
            "location": "s3df",
            "credentials": str(sites["s3df"].member("arp").folder),
            "start_timeout_s": 60,
        }
        for key, value in changes.items():
            document[key] = document[key] | value if isinstance(document.get(key), dict) else value
        path = tmp_path / f"arp-{uuid.uuid4().hex[:6]}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


@pytest.fixture
def start_arp(start: Any, write_config: Callable[..., Path]) -> Callable[..., Any]:
    """``start_arp(**changes)`` starts a run processor and waits until it reads its topics."""

    def run(*, wait: bool = True, **changes: Any) -> Any:
        child = start(sys.executable, "-m", "lclstream.arp.cli", "--config", str(write_config(**changes)), name="arp")
        if wait:
            child.wait_for_output("reading ", 90)
        return child

    return run


@pytest.fixture
def status_of(sites: Any) -> Callable[[Any], Any]:
    """``status_of(child)`` asks a run processor how it is."""

    def ask(child: Any, path: str = "/status") -> Any:
        url = next(word for word in child.output().split() if word.startswith("https://")).removesuffix("/status")
        with client(url, sites["s3df"].member("alice")) as http:
            answer: httpx.Response = http.get(path)
            answer.raise_for_status()
            return answer.json() if path == "/status" else answer.text

    return ask
