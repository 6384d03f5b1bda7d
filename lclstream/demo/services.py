"""Our services, each with a configuration file and an identity of its own, and the workflow the logbook knows."""

from __future__ import annotations

import sys
from typing import Any

from lclstream.demo.airflow import Airflow
from lclstream.demo.processes import START_S, Children, DemoError
from lclstream.demo.workspace import Workspace, free_port_range
from lclstream.elog.client import ElogClient
from lclstream.elog.models import Trigger, WorkflowDefinition
from lclstream.security import http
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, UnreachableError

DAG_ID = "stream_run"
#: Name of the workflow definition on the logbook; part of the DAG run's id.
WORKFLOW = "stream"
_LOCATION = "s3df"
#: How this environment's `lclstream` command is started.
_LCLSTREAM = [sys.executable, "-m", "lclstream.cli"]
_ANALYSIS_JOB = {
    "name": "run-summary",
    "script": '#!/bin/sh\nexec lclstream consume run-summary --url "$LCLSTREAM_URL" --output-dir .\n',
    "resources": {"duration": 10, "node_count": 1, "process_count": 1},
}
#: What of the analysis' results is put onto the run in the logbook.
_REPORT = [
    "complete",
    "events",
    "events_unique",
    "bytes",
    "rate_events_s",
    "hits",
    "hit_rate",
    "peaks_mean",
    "energy_mean",
    "energy_units",
]
#: Ports of a transfer's buffer.
_PORTS_PER_TRANSFER = 3


class Services:
    """The logbook, the job services of two sites, the transfer API, the run processor, and Airflow.

    Identities: the site *s3df* signs the logbook, its job service, the transfer API, the buffer, the run processor,
    Airflow and the beamline's staff; the site *olcf* signs its job service, and introduces Airflow to it.

    Args:
        workspace: where they keep their files.
        children: what starts and ends them.
        ranks: MPI ranks of the engine.
        transfers: how many transfers there can be at a time.
        capacity: how much each buffer holds, with its unit.
    """

    def __init__(
        self,
        workspace: Workspace,
        children: Children,
        *,
        ranks: int,
        transfers: int = 4,
        capacity: str = "512MiB",
    ) -> None:
        self._workspace = workspace
        self._children = children
        self._ranks = ranks
        self._capacity = capacity
        s3df = SiteAuthority(workspace / "certificates/s3df", "s3df")
        olcf = SiteAuthority(workspace / "certificates/olcf", "olcf")
        first, last = free_port_range(6 + _PORTS_PER_TRANSFER * transfers)
        elog, s3df_jobs, olcf_jobs, api, arp, airflow = range(first, first + 6)
        self._buffer_ports = {"first": first + 6, "last": last}
        self.elog_url = f"https://127.0.0.1:{elog}"
        self.api_url = f"https://127.0.0.1:{api}"
        self.s3df_jobs_url = f"https://127.0.0.1:{s3df_jobs}"
        self.olcf_jobs_url = f"https://127.0.0.1:{olcf_jobs}"
        self.beamline = s3df.member("beamline")
        self.airflow_credentials = s3df.member("airflow")
        olcf.introduce(self.airflow_credentials, service="olcf-jobs", url=self.olcf_jobs_url)
        self._identities: dict[str, Credentials] = {
            name: s3df.member(name) for name in ("elog", "jobs-s3df", "transfer-api", "arp", "buffer")
        } | {"jobs-olcf": olcf.member("jobs-olcf")}
        self._ports = {
            "elog": elog,
            "jobs-s3df": s3df_jobs,
            "jobs-olcf": olcf_jobs,
            "transfer-api": api,
            "arp": arp,
        }
        self._kafka = ""
        self.airflow = Airflow(
            workspace,
            airflow,
            {
                name: {
                    "conn_type": kind,
                    "schema": "https",
                    "host": "127.0.0.1",
                    "port": port,
                    "extra": {"credentials": str(self.airflow_credentials.folder)},
                }
                for name, kind, port in (
                    ("lclstream_default", "lclstream", api),
                    ("psik_olcf", "psik", olcf_jobs),
                    ("elog_default", "elog", elog),
                )
            },
        )

    @property
    def urls(self) -> dict[str, str]:
        """Service name → address."""
        return {name: f"https://127.0.0.1:{port}" for name, port in self._ports.items()}

    def start(self, kafka: str | None) -> None:
        """Start Kafka (unless its address is given), the logbook, the job services and the transfer API."""
        self._kafka = kafka or self._embedded_kafka()
        self._start_service(
            "elog",
            {
                "port": self._ports["elog"],
                "credentials": self._folder("elog"),
                "database": f"sqlite:///{self._workspace / 'elog.sqlite'}",
                "kafka": {"bootstrap_servers": self._kafka},
                # Jobs that somebody kills in the logbook are killed by the run processor.
                "locations": {_LOCATION: {"jid_prefix": self.urls["arp"]}},
            },
            "The logbook: `lclstream elog`.",
        )
        for site in ("s3df", "olcf"):
            self._start_service(
                f"jobs-{site}",
                {
                    "listen": {"host": "127.0.0.1", "port": self._ports[f"jobs-{site}"]},
                    "credentials": self._folder(f"jobs-{site}"),
                    "prefix": str(self._workspace / f"jobs/{site}"),
                    "callbacks": {"allow": [f"{self.api_url}/v1/callback"]},
                    # Batch jobs outlive their service at a site; nothing outlives a demonstration.
                    "cancel_jobs_on_exit": True,
                },
                f"The job service of {site}: `lclstream jobs`.",
            )
        self._start_service(
            "transfer-api",
            {
                "port": self._ports["transfer-api"],
                "credentials": self._folder("transfer-api"),
                "database": f"sqlite:///{self._workspace / 'transfers.sqlite'}",
                "job_service": {"url": self.s3df_jobs_url},
                "ports": self._buffer_ports,
                "buffer": {"credentials": self._folder("buffer"), "capacity": self._capacity},
                "engine": {"ranks": self._ranks},
                "poll_s": 1.0,
                "status_s": 0.5,
            },
            "The transfer API: `lclstream api`.",
        )

    def ready(self) -> bool:
        """Whether the logbook, the job services and the transfer API answer."""
        for name in ("elog", "jobs-s3df", "jobs-olcf", "transfer-api"):
            credentials = self.airflow_credentials if name == "jobs-olcf" else self.beamline
            try:
                with http.explained(self.urls[name]), http.client(self.urls[name], credentials, timeout=5) as client:
                    client.get("/")
            except UnreachableError:
                return False
            except AuthenticationError as error:
                raise DemoError(f"{name} does not serve us: {error}") from error
        return True

    def define_workflow(self, experiment: str, stream: dict[str, Any]) -> None:
        """Tell the logbook what to do when a run of the experiment starts: what a beamline's staff do once."""
        config = self._workspace.write_config("stream.yaml", stream, "What is streamed: `lclstreamer --config`.")
        job = self._workspace.write_config(
            "analysis-job.yaml", _ANALYSIS_JOB, "The job that analyses the stream at olcf."
        )
        with ElogClient(self.elog_url, self.beamline) as elog:
            elog.create_update_workflow_def(
                experiment,
                WorkflowDefinition(
                    name=WORKFLOW,
                    executable=f"airflow:{DAG_ID}",
                    trigger=Trigger.START_OF_RUN,
                    location=_LOCATION,
                    parameters={
                        "stream_config": str(config),
                        "analysis_job": str(job),
                        "psik_conn_id": "psik_olcf",
                        "ranks": self._ranks,
                        "report": _REPORT,
                    },
                ),
            )

    @property
    def kafka(self) -> str:
        """Address of the broker, ``HOST:PORT``, once the services are started."""
        return self._kafka

    def start_run_processor(self, *experiments: str) -> None:
        """Start the run processor for these experiments; it reads the topic from its beginning."""
        self._start_service(
            "arp",
            {
                "credentials": self._folder("arp"),
                "location": _LOCATION,
                "experiments": list(experiments),
                "status": {"port": self._ports["arp"], "kill_logins": ["elog"]},
                "kafka": {"bootstrap_servers": self._kafka, "group": "arp-s3df"},
                "definitions": {"elog": self.elog_url},
                "airflow": {
                    "url": self.airflow.url,
                    "username": self.airflow.login,
                    "password_file": str(self.airflow.password_file),
                },
            },
            "The run processor: `lclstream arp`.",
        )

    def reading_runs(self) -> bool:
        """Whether the run processor reads Kafka: a run that starts is noticed from now on."""
        url = self.urls["arp"]
        try:
            with http.explained(url), http.client(url, self.beamline, timeout=5) as client:
                return bool(client.get("/status").json()["state"] == "running")
        except UnreachableError:
            return False

    def close(self) -> None:
        """Close our own connections."""
        self.airflow.close()

    def _embedded_kafka(self) -> str:
        address = self._workspace / "kafka.address"
        self._children.start("kafka", [*_LCLSTREAM, "kafka", "--port-file", str(address)])
        self._children.wait_until(address.exists, timeout=START_S, what="Kafka answers")
        return address.read_text().strip()

    def _start_service(self, name: str, config: dict[str, Any], heading: str) -> None:
        command = {"transfer-api": "api", "jobs-s3df": "jobs", "jobs-olcf": "jobs"}.get(name, name)
        path = self._workspace.write_config(f"{name}.yaml", config, heading)
        self._children.start(name, [*_LCLSTREAM, command, "--config", str(path)])

    def _folder(self, identity: str) -> str:
        return str(self._identities[identity].folder)
