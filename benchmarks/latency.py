"""From the logbook's message to the first event: ``python benchmarks/latency.py --database sqlite``.

Starts every service, the run processor and Airflow (its four parts) on loopback, then starts runs on the logbook.
Measured from the time the Kafka message carries to the moments that Airflow recorded (the DAG run was made, its first
task began) and to the moment a consumer had the first event of the stream in its hands. The first two are of a DAG with
one task that does nothing, so the second is what Airflow takes for any DAG run; the third is of `stream_run`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from airflow_site import AirflowSite, airflow_site, wait_for
from confluent_kafka import Consumer, TopicPartition
from private_postgres import private_postgres
from stopping import stop_on_signals

from lclstream.elog.client import ElogClient

PROBE, STREAM = "latency_probe", "stream_run"
EXPERIMENTS = {PROBE: "latencyprobe", STREAM: "latencystream"}
WORKFLOW = "w"
WARM_UP = 2
_DAGS = Path(__file__).resolve().parents[1] / "dags"
_DAG = f"""from airflow.sdk import dag, task

@dag(dag_id="{PROBE}", schedule=None, max_active_runs=64)
def probe():
    @task
    def first():
        return 1
    first()

probe()
"""
_CONSUMER = """#!/usr/bin/env python3
import json, os, time
from lclstream.client import pull
first, events = None, 0
with pull(os.environ["LCLSTREAM_URL"], timeout_s=60, connect_timeout_s=60) as stream:
    for batch in stream.batches():
        first = first or time.time()
        events += len(batch["/data/image"])
json.dump({"first": first, "events": events}, open("result.json", "w"))
"""
_EVENTS = 50
_CONFIG = {
    "source_identifier": "exp={{ experiment }},run={{ run }}",
    "skip_incomplete_events": False,
    "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": _EVENTS},
    "data_sources": {"image": {"type": "GenericRandomNumpyArray", "array_shape": "512,1024", "array_dtype": "uint16"}},
    "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 1},
    "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"image": "/data/image"}},
    "data_handlers": [],
}
_PARAMETERS: dict[str, dict[str, Any]] = {
    PROBE: {},
    STREAM: {"stream_config": _CONFIG, "analysis_job": {"script": _CONSUMER}, "psik_conn_id": "psik_olcf"},
}


def _moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _row(name: str, values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "what": name,
        "n": len(ordered),
        "median_s": round(statistics.median(ordered), 3),
        "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
    }


class _Runs:
    """Starts runs on the logbook, and finds what became of them."""

    def __init__(self, site: AirflowSite, elog: ElogClient, kafka: str) -> None:
        self._site = site
        self._elog = elog
        self._kafka = kafka

    def define(self, dag_id: str) -> None:
        """The logbook's workflow: each run of the DAG's experiment starts the DAG."""
        definition = {
            "name": WORKFLOW,
            "executable": f"airflow:{dag_id}",
            "trigger": "START_OF_RUN",
            "location": "s3df",
            "parameters": json.dumps(_PARAMETERS[dag_id]),
        }
        self._elog.create_update_workflow_def(EXPERIMENTS[dag_id], definition)

    def start(self, dag_id: str, count: int, *, every: float | None) -> dict[int, str]:
        """Start runs, `every` seconds or (None) each when the one before is done; run number -> DAG run's id."""
        experiment = EXPERIMENTS[dag_id]
        started: dict[int, str] = {}

        def done() -> bool:
            return all(self._state(dag_id, run_id) == "success" for run_id in started.values())

        for _ in range(count):
            number = int(self._elog.start_run(experiment).num)
            started[number] = f"{experiment}__r{number:04d}__start_of_run__{WORKFLOW}"
            if every is None:
                wait_for(done, 180, f"{started[number]} ends", every=1)
            else:
                time.sleep(every)
        wait_for(done, 300, "all DAG runs end", every=2)
        return started

    def _state(self, dag_id: str, run_id: str) -> str:
        state = str((self._site.airflow.dag_run(dag_id, run_id) or {}).get("state"))
        if state == "failed":
            raise RuntimeError(f"{run_id} failed; logs: {self._site.workspace.logs}, {self._site.airflow.logs}")
        return state

    def messages(self, dag_id: str, wanted: int) -> dict[int, float]:
        """Run number -> time of the message that said it starts (Unix seconds)."""
        consumer = Consumer({"bootstrap.servers": self._kafka, "group.id": "latency"})
        partitions = consumer.list_topics("runs", timeout=20).topics["runs"].partitions
        consumer.assign([TopicPartition("runs", number, 0) for number in partitions])
        found: dict[int, float] = {}
        deadline = time.monotonic() + 30
        while len(found) < wanted and time.monotonic() < deadline:
            message = consumer.poll(0.5)
            if message is None or message.error() is not None:
                continue
            document = json.loads(message.value() or b"{}")
            if document["experiment_name"] == EXPERIMENTS[dag_id] and document["CRUD"] == "Create":
                # A broker that was given may have runs of earlier measurements: the latest counts.
                found[document["value"]["num"]] = message.timestamp()[1] / 1000
        consumer.close()
        return found

    def queued(self, dag_id: str, run_id: str) -> float:
        """When Airflow made the DAG run."""
        return _moment((self._site.airflow.dag_run(dag_id, run_id) or {})["queued_at"])

    def begun(self, dag_id: str, run_id: str) -> float:
        """When its first task began."""
        answer = self._site.airflow.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances")
        return min(_moment(task["start_date"]) for task in answer["task_instances"] if task["start_date"])

    def first_event(self, run_id: str) -> float:
        """When its consumer had the first event."""
        result = self._site.airflow.xcom(STREAM, run_id, "analyse", "result")
        if result["events"] != _EVENTS:
            raise RuntimeError(f"{run_id}: {result['events']} of {_EVENTS} events arrived")
        return float(result["first"])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start everything, start runs, and read what happened when."""
    with ExitStack() as stack:
        dags = folder / "dags"
        dags.mkdir(parents=True, exist_ok=True)
        (dags / "probe.py").write_text(_DAG)
        shutil.copy(_DAGS / f"{STREAM}.py", dags)
        environment = {"AIRFLOW__CORE__DAGS_FOLDER": str(dags)}
        if arguments.database == "postgresql":
            place = arguments.database_url or f"postgresql+psycopg2://{stack.enter_context(private_postgres())}"
            environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = place
        site = stack.enter_context(
            airflow_site(folder / "site", knows=STREAM, environment=environment, kafka=arguments.kafka)
        )
        wait_for(lambda: site.airflow.ready(PROBE), 120, "Airflow knows the probe", every=1)
        elog = stack.enter_context(ElogClient(site.services.elog_url, site.services.beamline))
        runs = _Runs(site, elog, site.services.kafka)
        for dag_id in EXPERIMENTS:
            runs.define(dag_id)
        site.services.start_run_processor(*EXPERIMENTS.values())
        log = site.workspace.logs / "arp.log"
        site.children.wait_until(lambda: "reading " in log.read_text(), timeout=60, what="the run processor reads")
        # The first tasks make Airflow's API server import half of Airflow, and it answers nobody meanwhile.
        runs.start(PROBE, WARM_UP, every=arguments.every)
        runs.start(STREAM, 1, every=None)
        probes = runs.start(PROBE, arguments.runs, every=arguments.every)
        streams = runs.start(STREAM, arguments.streams, every=None)
        sent = runs.messages(PROBE, WARM_UP + len(probes))
        made = {number: runs.queued(PROBE, run_id) for number, run_id in probes.items()}
        begun = {number: runs.begun(PROBE, run_id) for number, run_id in probes.items()}
        stream_sent = runs.messages(STREAM, 1 + len(streams))
        return {
            "machine": f"{platform.node()} {platform.machine()}, Python {platform.python_version()}",
            "airflow": version("apache-airflow"),
            "database": arguments.database,
            "kafka": "embedded" if arguments.kafka is None else arguments.kafka,
            "rows": [
                _row("Kafka message to DAG run", [made[number] - sent[number] for number in probes]),
                _row("Kafka message to first task", [begun[number] - sent[number] for number in probes]),
                _row("of that Airflow: DAG run to first task", [begun[number] - made[number] for number in probes]),
                _row(
                    "Kafka message to first event at the consumer",
                    [runs.first_event(run_id) - stream_sent[number] for number, run_id in streams.items()],
                ),
            ],
        }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="runs of the DAG that does nothing (default 30)")
    parser.add_argument("--streams", type=int, default=8, help="runs that are streamed (default 8)")
    parser.add_argument("--every", type=float, default=1.5, help="seconds between two runs (default 1.5)")
    parser.add_argument("--quick", action="store_true", help="few runs: under a minute on an idle machine")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite", help="Airflow's database")
    parser.add_argument("--database-url", metavar="URL", help="an empty PostgreSQL database; default: starts a server")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a broker with the logbook's topics; default: embedded")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there and leave the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs, arguments.streams, arguments.every = 4, 1, 1.0
    with tempfile.TemporaryDirectory(prefix="lclstream-latency-") as folder:
        place = arguments.keep or Path(folder)
        result = measure(arguments, place)
    for row in result["rows"]:
        print(f"{row['what']:<46} n={row['n']:<4} median {row['median_s']:.3f} s   p99 {row['p99_s']:.3f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
