"""The mock cluster inside librdkafka, which confluent-kafka carries, as a broker other processes can use.

librdkafka tests itself against this cluster. It keeps about 5 MB a partition in memory and nothing on disk, answers no
administration calls, and listens on loopback only: good for a demonstration and for tests, no evidence of durability.
One thread of librdkafka's serves it; it ends with :meth:`EmbeddedKafka.close`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import confluent_kafka

#: Topics of the logbook, and the run processor's own for what it could not use.
TOPICS = ("runs", "file_catalog", "workflow_jobs", "experiments", "elog", "arp-dead-letter")

_PRODUCER = 0
_ERROR_LINE = 512


class EmbeddedKafkaError(RuntimeError):
    """The cluster inside librdkafka cannot be used."""


@cache
def _librdkafka() -> Any:
    """The library that confluent-kafka itself uses, with the types of the functions we call."""
    package = Path(confluent_kafka.__file__).parent
    bundled = [
        *sorted((package.parent / "confluent_kafka.libs").glob("librdkafka*.so*")),
        *sorted((package / ".dylibs").glob("librdkafka*.dylib")),
    ]
    path = str(bundled[0]) if bundled else ctypes.util.find_library("rdkafka")
    if path is None:
        raise EmbeddedKafkaError(
            "librdkafka was not found, neither in the confluent-kafka package nor in the system: "
            "install the package's wheel (`pip install --only-binary :all: confluent-kafka`)"
        )
    library = ctypes.CDLL(path)
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_destroy": (None, [pointer]),
        "rd_kafka_conf_set": (number, [pointer, text, text, text, ctypes.c_size_t]),
        "rd_kafka_new": (pointer, [number, pointer, text, ctypes.c_size_t]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_err2str": (text, [number]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, number]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_topic_create": (number, [pointer, text, number, number]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_down": (number, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_up": (number, [pointer, ctypes.c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise EmbeddedKafkaError(f"{path} has no {name}: confluent-kafka 2.8 or newer is needed") from error
        function.restype, function.argtypes = result, arguments
    return library


class EmbeddedKafka:
    """One broker with the given topics; use it in a ``with``.

    Args:
        topics: topics that exist from the start. Others are made when a client first asks for them.
        partitions: partitions of each of these topics.

    Raises:
        EmbeddedKafkaError: librdkafka is missing, or refuses.

    Attributes:
        bootstrap_servers: ``HOST:PORT`` for clients; a free loopback port, known once the cluster runs.
    """

    def __init__(self, topics: Iterable[str] = TOPICS, *, partitions: int = 1) -> None:
        if partitions < 1:
            raise EmbeddedKafkaError(f"partitions: {partitions} is not possible: a topic has at least one")
        self._library = _librdkafka()
        self._client: int | None = None
        self._cluster: int | None = None
        self._start()
        try:
            for topic in topics:
                self._check(
                    self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1),
                    f"topic {topic!r}",
                )
        except EmbeddedKafkaError:
            self.close()
            raise
        self.bootstrap_servers: str = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def _start(self) -> None:
        library = self._library
        why = ctypes.create_string_buffer(_ERROR_LINE)
        configuration = library.rd_kafka_conf_new()
        # The client is only the cluster's owner. Without this it complains that it was given no broker.
        library.rd_kafka_conf_set(configuration, b"log_level", b"3", why, _ERROR_LINE)
        self._client = library.rd_kafka_new(_PRODUCER, configuration, why, _ERROR_LINE)
        if not self._client:
            library.rd_kafka_conf_destroy(configuration)
            raise EmbeddedKafkaError(f"librdkafka refuses a client: {why.value.decode()}")
        self._cluster = library.rd_kafka_mock_cluster_new(self._client, 1)
        if not self._cluster:
            self.close()
            raise EmbeddedKafkaError("librdkafka refuses a mock cluster: is a loopback port free?")
        # A group waits 3 s for more members before its first assignment, which is most of a demonstration's latency.
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    def _check(self, error: int, what: str) -> None:
        if error:
            raise EmbeddedKafkaError(f"{what}: {self._library.rd_kafka_err2str(error).decode()}")

    def set_down(self) -> None:
        """Drop all connections and take no new ones, as a broker that has gone; its messages stay."""
        self._check(self._library.rd_kafka_mock_broker_set_down(self._cluster, 1), "broker down")

    def set_up(self) -> None:
        """Take connections again, at the same address."""
        self._check(self._library.rd_kafka_mock_broker_set_up(self._cluster, 1), "broker up")

    def close(self) -> None:
        """Stop the cluster; its messages are gone. Calling it again does nothing."""
        if self._cluster:
            self._library.rd_kafka_mock_cluster_destroy(self._cluster)
            self._cluster = None
        if self._client:
            self._library.rd_kafka_destroy(self._client)
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
