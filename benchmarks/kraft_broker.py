"""A real Kafka broker (KRaft, one node) on loopback, without Docker: jars by Maven, Java, a folder of its own.

Used by the tests and benchmarks that need a broker which keeps its messages; they skip where Java or Maven is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from confluent_kafka.admin import AdminClient, NewTopic

from lclstream.demo.workspace import free_port_range

KAFKA_VERSION = "4.1.0"
START_S = 120.0
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>x</groupId><artifactId>x</artifactId><version>1</version><dependencies><dependency>
<groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
</dependency></dependencies></project>
"""


class NoBrokerError(RuntimeError):
    """A broker cannot be run here; the message says what is missing."""


def cache_folder() -> Path:
    """Where the jars are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lclstream" / f"kafka-{KAFKA_VERSION}"


def jars() -> Path:
    """The folder with Kafka's jars, fetched by Maven when they are not there yet.

    Raises:
        NoBrokerError: Java or Maven is missing, or Maven cannot get the jars.
    """
    if shutil.which("java") is None:
        raise NoBrokerError("no Java here (java)")
    folder = cache_folder()
    libs = folder / "libs"
    if (folder / "complete").exists():
        return libs
    if shutil.which("mvn") is None:
        raise NoBrokerError("no Maven here (mvn)")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pom.xml").write_text(_POM)
    command = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={libs}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoBrokerError("Maven did not get Kafka's jars in 300 s") from error
    if done.returncode:
        raise NoBrokerError(f"Maven cannot get Kafka's jars: {done.stdout[-300:]}")
    (folder / "complete").touch()
    return libs


class KraftBroker:
    """One broker; use it in a ``with``. It can be killed and started again, with its messages and at its address.

    Args:
        folder: where it keeps its data and its log.
        topics: topics that are made at the first start.
        partitions: partitions of each.

    Raises:
        NoBrokerError: it cannot be run here.
    """

    def __init__(self, folder: Path, topics: list[str], *, partitions: int = 1) -> None:
        self.folder = folder
        self._libs = jars()
        self._process: subprocess.Popen[bytes] | None = None
        # While it is down between two starts, no outgoing connection takes them.
        port, controller = free_port_range(2)
        self.bootstrap_servers = f"127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        self._properties = folder / "server.properties"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(folder / "data"),
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "auto.create.topics.enable": "false",
            # A broker that was killed is served again after 5 s instead of 12.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
        }
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        cluster = self._tool("random-uuid").strip().splitlines()[-1]
        self._tool("format", "-t", cluster, "-c", str(self._properties))
        self.start()
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        wanted = [NewTopic(name, num_partitions=partitions, replication_factor=1) for name in topics]
        # With a time limit the answer comes when the topics are there, and not only wanted.
        for made in admin.create_topics(wanted, operation_timeout=START_S, request_timeout=START_S).values():
            made.result(START_S)

    def _java(self, *words: str, memory: str = "64m") -> list[str]:
        return ["java", f"-Xmx{memory}", "-XX:+UseSerialGC", "-cp", f"{self._libs}/*", *words]

    def _tool(self, *words: str) -> str:
        command = self._java("kafka.tools.StorageTool", *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, cwd=self.folder, check=False)
        if done.returncode:
            raise NoBrokerError(f"Kafka's storage tool failed: {done.stderr[-500:]}")
        return done.stdout

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            NoBrokerError: it did not in time.
        """
        with (self.folder / "broker.log").open("ab") as output:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._properties), memory="256m"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if admin.list_topics(timeout=1).brokers:
                    return
            except Exception:  # the broker is not there yet
                time.sleep(0.1)
        self.close()
        raise NoBrokerError(f"the broker did not answer in {START_S:g} s: see {self.folder / 'broker.log'}")

    def kill(self) -> None:
        """Kill it with SIGKILL: nothing is written any more, nobody is told."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop it."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(15)
        self._process = None

    def __enter__(self) -> KraftBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
