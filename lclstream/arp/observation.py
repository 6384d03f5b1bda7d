"""What the run processor counts and knows of itself, as a JSON document and for Prometheus.

The consumer's thread writes, the status server's threads read; a lock is between them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lclstream import __version__
from lclstream.arp.actions import Kind, Outcome

Partition = tuple[str, int]


class Observation:
    """Counts, lag and ages.

    Args:
        name: the consumer group.
        location: the data centre we start workflows at.
    """

    def __init__(self, name: str, location: str) -> None:
        self._lock = threading.Lock()
        self._name = name
        self._location = location
        self._started = time.time()
        self._state = "starting"
        self._decisions: Counter[str] = Counter({kind.value: 0 for kind in Kind})
        self._dag_runs = 0
        self._retries = 0
        self._lag: dict[Partition, int] = {}
        self._last: dict[str, Any] | None = None
        self._waiting: dict[str, Any] | None = None
        self._waiting_since: float | None = None

    def assigned(self, partitions: Iterable[Partition]) -> None:
        """The partitions we read now."""
        with self._lock:
            self._lag = {partition: self._lag.get(partition, 0) for partition in partitions}
            self._state = "running" if self._lag else "standby"

    def reads(self, topic: str, partition: int) -> bool:
        """Whether we read this partition now."""
        with self._lock:
            return (topic, partition) in self._lag

    def lagging(self, lag: Mapping[Partition, int]) -> None:
        """Messages not yet committed, by partition."""
        with self._lock:
            self._lag = {partition: lag.get(partition, behind) for partition, behind in self._lag.items()}

    def retrying(self, where: str, reason: str, created: float | None) -> None:
        """An event could not be done now; `created` is its message's time (Unix seconds)."""
        with self._lock:
            self._retries += 1
            self._waiting = {"message": where, "reason": reason}
            self._waiting_since = created

    def done(self, where: str, outcome: Outcome, seconds: float) -> None:
        """An event was decided, and Airflow has been told."""
        with self._lock:
            self._decisions[outcome.kind.value] += 1
            self._dag_runs += len(outcome.made)
            self._waiting = self._waiting_since = None
            self._last = {
                "message": where,
                "decision": outcome.kind.value,
                "detail": str(outcome),
                "time": time.time(),
                "seconds": round(seconds, 4),
            }

    def stopping(self) -> None:
        """No more events will be taken."""
        with self._lock:
            self._state = "stopping"

    def document(self) -> dict[str, Any]:
        """Everything, as JSON values; times in Unix seconds, `oldest_age_s` of the event that waits to be done."""
        with self._lock:
            waiting_age = None if self._waiting_since is None else max(0.0, time.time() - self._waiting_since)
            return {
                "name": "arp",
                "version": __version__,
                "group": self._name,
                "location": self._location,
                "state": "retrying" if self._waiting and self._state == "running" else self._state,
                "started": self._started,
                "time": time.time(),
                "partitions": [
                    {"topic": topic, "partition": number, "lag": behind}
                    for (topic, number), behind in sorted(self._lag.items())
                ],
                "lag": sum(self._lag.values()),
                "oldest_age_s": waiting_age,
                "decisions": dict(self._decisions),
                "dag_runs_made": self._dag_runs,
                "retries": self._retries,
                "waiting": self._waiting,
                "last_event": self._last,
            }

    def prometheus(self) -> bytes:
        """The same numbers in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Numbers(self.document()))
        return generate_latest(registry)


class _Numbers(Collector):
    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def collect(self) -> Iterable[Metric]:
        document = self._document
        decisions = CounterMetricFamily("lclstream_arp_events", "Events by what became of them.", labels=["decision"])
        for kind, count in document["decisions"].items():
            decisions.add_metric([kind], count)
        yield decisions
        lag = GaugeMetricFamily("lclstream_arp_lag", "Messages not yet committed.", labels=["topic", "partition"])
        for entry in document["partitions"]:
            lag.add_metric([entry["topic"], str(entry["partition"])], entry["lag"])
        yield lag
        yield CounterMetricFamily("lclstream_arp_dag_runs", "DAG runs made.", value=document["dag_runs_made"])
        yield CounterMetricFamily(
            "lclstream_arp_retries", "Attempts that have to be repeated.", value=document["retries"]
        )
        yield GaugeMetricFamily(
            "lclstream_arp_oldest_event_age_seconds",
            "Age of the event that waits to be done; 0 when none waits.",
            value=document["oldest_age_s"] or 0.0,
        )
