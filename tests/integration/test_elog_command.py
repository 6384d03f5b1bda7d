from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Consumer, TopicPartition

from lclstream.elog.client import ElogClient
from lclstream.kafka import EmbeddedKafka
from lclstream.security.http import client

pytestmark = pytest.mark.integration


@pytest.fixture
def broker() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(["runs", "experiments"]) as broker:
        yield broker


@pytest.fixture
def folder(sites: Any) -> Path:
    return Path(sites["s3df"].member("elog").folder)


def runs_in(broker: EmbeddedKafka, count: int) -> list[tuple[str, int]]:
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "test"})
    consumer.assign([TopicPartition("runs", 0, 0)])
    told: list[tuple[str, int]] = []
    while len(told) < count:
        message = consumer.poll(60)
        assert message is not None, f"{told} of {count}"
        if message.error() is None:
            document = json.loads(message.value())
            told.append((document["CRUD"], document["value"]["num"]))
    consumer.close()
    return told


def elog_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "lclstream.elog.cli", *options]


def run_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lclstream.elog.run_cli", *words]


def test_runs_started_and_ended_from_the_terminal_are_told_on_kafka(
    start: Any, broker: EmbeddedKafka, folder: Path, tmp_path: Path, free_port: Callable[[], int], sites: Any
) -> None:
    port = free_port()
    config = tmp_path / "elog.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "credentials": str(folder),
                "database": f"sqlite:///{tmp_path}/elog.sqlite",
                "kafka": {"bootstrap_servers": broker.bootstrap_servers},
            }
        )
    )
    service = start(*elog_command("--config", str(config), "--port", str(port)), name="elog")
    service.wait_for_output("listening at")
    alice = str(sites["s3df"].member("alice").folder)
    where = ["--elog", f"https://127.0.0.1:{port}", "--credentials", alice]
    begun = start(*run_command("start", "mfx1", "--param", "energy=9.5", "--param", "note=dark", *where), name="run")
    assert begun.wait() == 0
    document = json.loads(begun.output())
    assert (document["num"], document["params"]) == (1, {"energy": 9.5, "note": "dark"})
    ended = start(*run_command("end", "mfx1", *where), name="run")
    assert ended.wait() == 0
    assert json.loads(ended.output())["duration"] > 0
    assert runs_in(broker, 2) == [("Create", 1), ("Update", 1)]
    refused = start(*run_command("end", "tmox1", *where), name="run")
    assert refused.wait() == 1
    assert "has no run yet" in refused.output()
    service.signal(signal.SIGTERM)
    assert service.wait() == 0


def test_without_kafka_it_serves_and_keeps_messages_over_kill_9_until_the_broker_is_there(
    start: Any,
    broker: EmbeddedKafka,
    folder: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
    sites: Any,
    wait_until: Any,
) -> None:
    port = free_port()
    options = ["--credentials", str(folder), "--database", f"sqlite:///{tmp_path}/elog.sqlite", "--port", str(port)]
    first = start(*elog_command(*options, "--kafka", f"127.0.0.1:{free_port()}"), name="elog")
    first.wait_for_output("listening at")
    url, alice = f"https://127.0.0.1:{port}", sites["s3df"].member("alice")
    with ElogClient(url, alice) as elog:
        elog.start_run("mfx1")
        elog.end_run("mfx1")
    first.wait_for_output("messages stay in the outbox")
    with client(url, alice) as http:
        assert http.get("/status").json()["outbox_waiting"] == 3
    first.signal(signal.SIGKILL)
    first.wait()
    second = start(*elog_command(*options, "--kafka", broker.bootstrap_servers), name="elog")
    second.wait_for_output("listening at")
    assert runs_in(broker, 2) == [("Create", 1), ("Update", 1)]
    with ElogClient(url, alice) as elog:
        assert elog.start_run("mfx1").num == 2
    assert runs_in(broker, 3)[-1] == ("Create", 2)


def test_a_port_in_use_is_said(start: Any, broker: EmbeddedKafka, folder: Path, tmp_path: Path) -> None:
    address = broker.bootstrap_servers
    options = ["--credentials", str(folder), "--kafka", address, "--port", address.split(":")[1]]
    child = start(*elog_command(*options), cwd=tmp_path)
    assert child.wait() == 3
    assert f"cannot listen at {address}" in child.output()


def test_run_says_when_nobody_answers(start: Any, sites: Any, free_port: Callable[[], int]) -> None:
    where = ["--elog", f"https://127.0.0.1:{free_port()}", "--credentials", str(sites["s3df"].member("alice").folder)]
    unreachable = start(*run_command("start", "mfx1", *where))
    assert unreachable.wait() == 3
    assert "cannot be reached" in unreachable.output()


def test_one_who_asks_too_often_is_told_when_to_come_back(start: Any, folder: Path, tmp_path: Path, sites: Any) -> None:
    config = tmp_path / "elog.yaml"
    document = {
        "credentials": str(folder),
        "database": f"sqlite:///{tmp_path}/elog.sqlite",
        "kafka": {"bootstrap_servers": "127.0.0.1:9"},
        "port": 0,
        "rate": {"per_s": 0.01, "burst": 2},
    }
    config.write_text(yaml.safe_dump(document))
    service = start(*elog_command("--config", str(config)), name="elog")
    service.wait_for_output("listening at")
    url = service.output().partition("listening at ")[2].split()[0]
    with client(url, sites["s3df"].member("alice")) as alice, client(url, sites["s3df"].member("bob")) as bob:
        assert [alice.get("/openapi.json").status_code for _ in range(3)] == [200, 200, 429]
        assert int(alice.get("/openapi.json").headers["retry-after"]) > 10
        assert bob.get("/openapi.json").status_code == 200, "others are served"
        assert bob.post("/lgbk/naming/ws/x", content=b" " * (17 << 20)).status_code == 413
