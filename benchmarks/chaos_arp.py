"""The run processor among failures: every event makes its one DAG run, whatever is killed meanwhile.

Two run processors share a group and a broker with three partitions. While events come (twice each, in any order across
the partitions, with NaN tokens, updates after the end and unreadable messages among them) run processors and the broker
are killed with SIGKILL, and Airflow goes away, fails, or drops the connection before or after it made the DAG run.
Airflow is a small server that refuses an id it has, as the real one does.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from confluent_kafka import Consumer, Producer, TopicPartition
from fake_airflow import PASSWORD, USERNAME, FakeAirflow
from kraft_broker import KAFKA_VERSION, KraftBroker

TOPICS = ["runs", "file_catalog", "workflow_jobs", "arp-dead-letter"]
PARTITIONS = 3
PROCESSORS = 2
_DEFINITIONS = [
    {"name": "stream", "executable": "airflow:stream_run", "trigger": "START_OF_RUN", "location": "s3df"},
    {"name": "reduce", "executable": "airflow:reduce_run", "trigger": "END_OF_RUN", "location": "s3df"},
]


class Processors:
    """Run processors as processes; each is started again when it was killed."""

    def __init__(
        self, folder: Path, bootstrap_servers: str, airflow: FakeAirflow, experiment: str, session_timeout_s: float
    ) -> None:
        self._folder = folder
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o600)
        definitions = folder / "definitions.yaml"
        definitions.write_text(yaml.safe_dump({"definitions": _DEFINITIONS}))
        self._config = folder / "arp.yaml"
        self._config.write_text(
            yaml.safe_dump(
                {
                    "location": "s3df",
                    "experiments": [experiment],
                    "kafka": {
                        "bootstrap_servers": bootstrap_servers,
                        "group": f"arp-{experiment}",
                        "session_timeout_s": session_timeout_s,
                    },
                    "definitions": {"file": str(definitions)},
                    "airflow": {
                        "url": airflow.url,
                        "username": USERNAME,
                        "password_file": str(password),
                        "timeout_s": 5,
                    },
                    "start_timeout_s": 120,
                }
            )
        )
        self._running: list[subprocess.Popen[bytes]] = []
        for number in range(PROCESSORS):
            self._running.append(self._start(number))

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        with (self._folder / f"arp-{number}.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "lclstream.arp.cli", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill_one(self) -> None:
        """Kill one with SIGKILL and start another in its place."""
        number = random.randrange(PROCESSORS)
        self._running[number].kill()
        self._running[number].wait(30)
        self._running[number] = self._start(number)

    def close(self) -> None:
        """End them all."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)


def _message(experiment: str, number: int, crud: str, **fields: Any) -> bytes:
    document = {
        "_id": f"{number:024x}",
        "num": number,
        "type": "DATA",
        "begin_time": "2026-03-01T12:00:00+00:00",
        "end_time": None,
        "params": {"noise": float("nan")},
        "editable_params": {},
        **fields,
    }
    return json.dumps({"experiment_name": experiment, "CRUD": crud, "value": document}).encode()


def _events(experiment: str, count: int) -> tuple[list[bytes], set[str], int]:
    """Messages to send, ids of the DAG runs they ask for, and how many of the messages are unreadable."""
    messages: list[bytes] = []
    wanted: set[str] = set()
    unreadable = max(1, count // 50)
    end = {"end_time": datetime.now(UTC).isoformat()}
    for event in range(count):
        number = event // 2 + 1
        if event % 2 == 0:
            one = [_message(experiment, number, "Create")] * 2
            wanted.add(f"{experiment}__r{number:04d}__start_of_run__stream")
        else:
            one = [_message(experiment, number, "Update", **end, duration=60.0, file_catalog=[])]
            one.append(_message(experiment, number, "Update", **end, params={"events": 200}))
            wanted.add(f"{experiment}__r{number:04d}__end_of_run__reduce")
        messages += one
    for place in range(unreadable):
        messages.insert(random.randrange(len(messages)), b"{broken %d" % place)
    return messages, wanted, unreadable


def _dead_letters(bootstrap_servers: str, wanted: int, seconds: float) -> set[str]:
    """What is in the dead-letter topic, once that many are or the time is over; one that is there twice counts once."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "chaos-reader"})
    known = consumer.list_topics("arp-dead-letter", timeout=20).topics["arp-dead-letter"].partitions
    consumer.assign([TopicPartition("arp-dead-letter", number, 0) for number in known])
    found: set[str] = set()
    deadline = time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            found.add(json.loads(message.value())["value"])
    consumer.close()
    return found


KILL_PROCESSOR, KILL_BROKER = "kill a run processor", "kill the broker"
AWAY, FAILS = "Airflow away", "Airflow fails"


class _Chaos:
    """Does one thing after the other to the parts."""

    def __init__(
        self, processors: Processors, broker: KraftBroker | None, airflow: FakeAirflow, say: Callable[[str], None]
    ) -> None:
        self._processors = processors
        self._broker = broker
        self._airflow = airflow
        self._say = say
        self._seen = 0

    def disturb(self, kind: str) -> None:
        """Wait until something is being done, then disturb it."""
        deadline = time.monotonic() + 15
        while len(self._airflow.ids()) <= self._seen and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        self._seen = len(self._airflow.ids())
        self._say(f"{self._seen} DAG runs: {kind}")
        if kind == KILL_PROCESSOR:
            self._processors.kill_one()
        elif kind == KILL_BROKER and self._broker is not None:
            self._broker.kill()
            self._broker.start()
        elif kind == AWAY:
            self._airflow.stop()
            time.sleep(random.uniform(0.5, 2))
            self._airflow.start()
        elif kind == FAILS:
            self._airflow.faults.extend(random.choices([500, 503, 429, "drop", "made-then-drop"], k=3))


def run(
    *,
    events: int,
    kills: int,
    kafka: str | None = None,
    plan: Sequence[str] | None = None,
    folder: Path | None = None,
    limit_s: float = 600,
    verbose: bool = True,
) -> dict[str, Any]:
    """Send events among failures, and count.

    Args:
        events: how many events ask for a DAG run.
        kills: how many processes are killed (run processors, and the broker if it is ours), besides Airflow's failures.
        kafka: ``HOST:PORT`` of a broker that has the topics; None starts one, which is killed as well.
        plan: what is done, in this order; None: `kills` kills and as many failures of Airflow, at random.
        folder: for logs; a temporary one when None.
        limit_s: seconds after which what is missing is lost.
        verbose: whether the course is printed.

    Returns:
        ``{"broker", "events", "kills", "lost", "duplicated", …}``.

    Raises:
        NoBrokerError: no broker can be run here.
    """

    def say(text: str) -> None:
        if verbose:
            print(text, file=sys.stderr, flush=True)

    experiment = f"chaos{random.getrandbits(32):08x}"
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lclstream-chaos-")))
        broker = None
        if kafka is None:
            broker = stack.enter_context(KraftBroker(folder / "kafka", TOPICS, partitions=PARTITIONS))
        address = kafka or (broker.bootstrap_servers if broker else "")
        airflow = stack.enter_context(FakeAirflow())
        # A broker of somebody else's allows no less than 6 s, unless it was set otherwise.
        processors = Processors(folder, address, airflow, experiment, session_timeout_s=3 if broker else 6)
        stack.callback(processors.close)
        producer = Producer(
            {"bootstrap.servers": address, "enable.idempotence": True, "message.timeout.ms": 300_000, "log_level": 0}
        )
        partitions = len(producer.list_topics("runs", timeout=20).topics["runs"].partitions)
        messages, wanted, unreadable = _events(experiment, events)
        if plan is None:
            kinds = [KILL_PROCESSOR] * 3 + ([KILL_BROKER] if broker else [])
            plan = [*random.choices(kinds, k=kills), *random.choices([AWAY, FAILS], k=kills)]
            random.shuffle(plan)
        # The first messages go without disturbance, so that there is something to disturb.
        places = sorted(random.choices(range(len(messages) // 10, len(messages)), k=len(plan)))
        todo = list(zip(places, plan, strict=True))
        chaos = _Chaos(processors, broker, airflow, say)
        started = time.monotonic()
        for place, message in enumerate(messages):
            producer.produce("runs", message, partition=random.randrange(partitions))
            producer.poll(0)
            while todo and todo[0][0] == place:
                producer.flush(2)
                chaos.disturb(todo.pop(0)[1])
        unsent = producer.flush(limit_s)
        deadline = started + limit_s
        while time.monotonic() < deadline and not wanted <= set(airflow.ids()):
            time.sleep(0.2)
        seconds = time.monotonic() - started
        made = airflow.ids()
        letters = _dead_letters(address, unreadable, 60) if kafka is None else set()
        created = [name for _, name, status in airflow.attempts if status == 200]
        return {
            "broker": f"Apache Kafka {KAFKA_VERSION} (KRaft, one node)" if broker else f"given: {kafka}",
            "events": events,
            "messages": len(messages),
            "kills": sum(kind in (KILL_PROCESSOR, KILL_BROKER) for kind in plan),
            "disturbances": dict(Counter(plan)),
            "lost": len(wanted - set(made)) + unsent,
            "duplicated": len(created) - len(set(created)) + len(set(made) - wanted),
            "repeated_attempts": len(airflow.attempts) - len(created),
            "unreadable_messages": unreadable,
            "dead_letters": len(letters) if kafka is None else None,
            "seconds": round(seconds, 1),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--events", type=int, default=1000, help="events that ask for a DAG run (default 1000)")
    parser.add_argument("--kills", type=int, default=25, help="processes to kill (default 25)")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a broker with the topics; default: starts a real one")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which what is missing is lost")


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run it as the options say."""
    return run(events=arguments.events, kills=arguments.kills, kafka=arguments.kafka, limit_s=arguments.limit)
