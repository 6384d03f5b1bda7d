"""How long from the logbook's message to the first task: ``python benchmarks/latency.py --runs 30``.

Starts the logbook stand-in, the run processor and Airflow (its four parts, on SQLite unless ``--database postgresql``)
on loopback, then starts runs on the logbook. Measured from the time the Kafka message carries to the moments that
Airflow recorded: the DAG run was made, its first task began. The second includes what Airflow takes for any DAG run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from confluent_kafka import Consumer, TopicPartition

from lclstream.demo.airflow import Airflow
from lclstream.demo.processes import Children
from lclstream.demo.workspace import Workspace, free_ports
from lclstream.elog.client import ElogClient
from lclstream.kafka import EmbeddedKafka
from lclstream.security.authority import SiteAuthority

DAG_ID = "latency_probe"
EXPERIMENT = "latency"
WARM_UP = 2
_DAG = f"""from airflow.sdk import dag, task

@dag(dag_id="{DAG_ID}", schedule=None, max_active_runs=64)
def probe():
    @task
    def first():
        return 1
    first()

probe()
"""


def _moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _messages(bootstrap_servers: str, wanted: int) -> dict[int, float]:
    """Run number -> time of the message that said it starts (Unix seconds)."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "latency"})
    partitions = consumer.list_topics("runs", timeout=20).topics["runs"].partitions
    consumer.assign([TopicPartition("runs", number, 0) for number in partitions])
    found: dict[int, float] = {}
    deadline = time.monotonic() + 30
    while len(found) < wanted and time.monotonic() < deadline:
        message = consumer.poll(0.5)
        if message is None or message.error() is not None:
            continue
        document = json.loads(message.value() or b"{}")
        if document["experiment_name"] == EXPERIMENT and document["CRUD"] == "Create":
            found[document["value"]["num"]] = message.timestamp()[1] / 1000
    consumer.close()
    return found


def _row(name: str, values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "what": name,
        "n": len(ordered),
        "median_s": round(statistics.median(ordered), 3),
        "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start everything, start runs, and read what happened when."""
    with ExitStack() as stack:
        workspace = Workspace(folder / "work")
        stack.callback(workspace.release)
        dags = folder / "dags"
        dags.mkdir(exist_ok=True)
        (dags / "probe.py").write_text(_DAG)
        environment = {"AIRFLOW__CORE__DAGS_FOLDER": str(dags)}
        if arguments.database == "postgresql":
            environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = arguments.database_url
        children = Children(workspace.logs, environment)
        stack.callback(children.stop)
        kafka = arguments.kafka or stack.enter_context(EmbeddedKafka()).bootstrap_servers
        airflow_port, elog_port = free_ports(2)
        airflow = Airflow(workspace, airflow_port, {})
        stack.callback(airflow.close)
        airflow.start(children)
        site = SiteAuthority(workspace / "certificates", "s3df")
        elog_url = f"https://127.0.0.1:{elog_port}"
        elog_config = {
            "port": elog_port,
            "credentials": str(site.member("elog").folder),
            "database": f"sqlite:///{workspace / 'elog.sqlite'}",
            "kafka": {"bootstrap_servers": kafka},
        }
        arp_config = {
            "location": "s3df",
            "experiments": [EXPERIMENT],
            "credentials": str(site.member("arp").folder),
            "kafka": {"bootstrap_servers": kafka, "group": f"latency-{time.time():.0f}"},
            "definitions": {"elog": elog_url},
            "airflow": {
                "url": airflow.url,
                "username": airflow.login,
                "password_file": str(airflow.password_file),
            },
        }
        for name, config in (("elog", elog_config), ("arp", arp_config)):
            path = workspace.write_config(f"{name}.yaml", config, name)
            children.start(name, [sys.executable, "-m", f"lclstream.{name}.cli", "--config", str(path)])
        children.wait_until(lambda: airflow.ready(DAG_ID), timeout=300, what="Airflow is ready", every=1)
        elog = stack.enter_context(ElogClient(elog_url, site.member("alice")))
        definition = {
            "name": "probe",
            "executable": f"airflow:{DAG_ID}",
            "trigger": "START_OF_RUN",
            "location": "s3df",
            "parameters": "{}",
        }
        elog.create_update_workflow_def(EXPERIMENT, definition)
        arp_log = workspace.logs / "arp.log"
        children.wait_until(lambda: "reading " in arp_log.read_text(), timeout=60, what="the run processor reads")
        ids: dict[int, str] = {}

        def start_runs(count: int) -> list[int]:
            """Start runs and wait until their DAG runs have ended."""
            started = []
            for _ in range(count):
                started.append(int(elog.start_run(EXPERIMENT).num))
                ids[started[-1]] = f"{EXPERIMENT}__r{started[-1]:04d}__start_of_run__probe"
                time.sleep(arguments.every)
            children.wait_until(
                lambda: all((airflow.dag_run(DAG_ID, ids[one]) or {}).get("state") == "success" for one in started),
                timeout=300,
                what="all DAG runs end",
                every=2,
            )
            return started

        # The first tasks make Airflow's API server import half of Airflow, and it answers nobody meanwhile.
        warm = start_runs(WARM_UP)
        numbers = start_runs(arguments.runs)
        children.wait_until(
            lambda: sum(job.status == "DONE" for job in elog.workflow_jobs(EXPERIMENT)) == len(warm + numbers),
            timeout=60,
            what="the logbook shows all jobs as done",
            every=1,
        )
        sent = _messages(kafka, len(warm + numbers))
        made: list[float] = []
        begun: list[float] = []
        own: list[float] = []
        for number in numbers:
            dag_run = airflow.dag_run(DAG_ID, ids[number]) or {}
            queued = _moment(dag_run["queued_at"])
            first = _first_task(airflow, ids[number])
            made.append(queued - sent[number])
            begun.append(first - sent[number])
            own.append(first - queued)
        return {
            "machine": f"{platform.node()} {platform.machine()}, Python {platform.python_version()}",
            "airflow": version("apache-airflow"),
            "database": arguments.database,
            "kafka": "embedded" if arguments.kafka is None else arguments.kafka,
            "rows": [
                _row("Kafka message to DAG run", made),
                _row("Kafka message to first task", begun),
                _row("of that Airflow: DAG run to first task", own),
            ],
        }


def _first_task(airflow: Airflow, dag_run_id: str) -> float:
    with httpx.Client(base_url=airflow.url, trust_env=False, timeout=30) as http:
        body = {"username": airflow.login, "password": airflow.password_file.read_text()}
        token = http.post("/auth/token", json=body).raise_for_status().json()["access_token"]
        answer = http.get(
            f"/api/v2/dags/{DAG_ID}/dagRuns/{dag_run_id}/taskInstances", headers={"authorization": f"Bearer {token}"}
        )
        return min(_moment(task["start_date"]) for task in answer.raise_for_status().json()["task_instances"])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="runs to start (default 30)")
    parser.add_argument("--every", type=float, default=1.5, help="seconds between two runs (default 1.5)")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite", help="Airflow's database")
    parser.add_argument("--database-url", metavar="URL", help="SQLAlchemy URL of an empty PostgreSQL database")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a broker with the logbook's topics; default: embedded")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there and leave the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    arguments = parser.parse_args()
    if arguments.database == "postgresql" and not arguments.database_url:
        parser.error("--database postgresql needs --database-url postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE")
    with tempfile.TemporaryDirectory(prefix="lclstream-latency-") as folder:
        place = arguments.keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        result = measure(arguments, place)
    for row in result["rows"]:
        print(f"{row['what']:<42} n={row['n']:<4} median {row['median_s']:.3f} s   p99 {row['p99_s']:.3f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
