"""A facility of real services: logbook with an embedded Kafka, transfer API, job services of two sites."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lclstream.api.client import TransferClient
from lclstream.elog.client import ElogClient
from lclstream.jobs.client import JobClient
from lclstream.security.credentials import Credentials

#: One transfer takes three ports.
_PORTS = 24


@pytest.fixture(scope="session", autouse=True)
def airflow_database() -> None:
    """Airflow's own tables, once, in the temporary AIRFLOW_HOME."""
    from airflow.utils.db import initdb

    initdb()


@dataclass
class Facility:
    """Where the services are, and who Airflow is there."""

    airflow: Credentials
    api_url: str
    elog_url: str
    s3df_url: str
    olcf_url: str
    ports: range

    def transfers(self) -> TransferClient:
        return TransferClient(self.api_url, self.airflow)

    def logbook(self) -> ElogClient:
        return ElogClient(self.elog_url, self.airflow)

    def jobs(self) -> JobClient:
        return JobClient(self.olcf_url, self.airflow)

    def connections(self) -> dict[str, str]:
        """Environment variables that define Airflow's connections."""
        return {
            f"AIRFLOW_CONN_{name.upper()}": json.dumps(
                {
                    "conn_type": kind,
                    "host": "127.0.0.1",
                    "port": int(url.rpartition(":")[2]),
                    "extra": {"credentials": str(self.airflow.folder)},
                }
            )
            for name, kind, url in (
                ("lclstream_default", "lclstream", self.api_url),
                ("psik_olcf", "psik", self.olcf_url),
                ("elog_default", "elog", self.elog_url),
            )
        }

    def running(self) -> list[str]:
        """What the job services still run: buffers, engines, analyses."""
        found = []
        for process in psutil.process_iter():
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if str(self._jobs_folder) in command or str(self._jobs_folder) in _folder_of(process):
                found.append(f"{process.pid} {command[:120]}")
        return found

    _jobs_folder: Path = Path("/nonexistent")


def _folder_of(process: psutil.Process) -> str:
    try:
        return str(process.cwd())
    except psutil.Error:
        return ""


class Services:
    """Our services as processes, each with its log file; all end together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(
        self,
        command: str,
        name: str,
        *options: str,
        config: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        words = [sys.executable, "-m", "lclstream.cli", command, *options]
        if config is not None:
            path = self.folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(config))
            words += ["--config", str(path)]
        # Job scripts find the programs of this environment.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "PATH": path, **(env or {})}
            )
        self.processes.append((name, process))

    def stop(self) -> None:
        for _, process in reversed(self.processes):
            process.terminate()
        for name, process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
                raise AssertionError(f"{name} did not end: {(self.folder / name).with_suffix('.log')}") from None


@pytest.fixture(scope="session")
def services(
    sites: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, free_port: Callable[..., int]
) -> Iterator[Facility]:
    """All services, ready; they end with the last test."""
    folder = tmp_path_factory.mktemp("facility")
    s3df, olcf = sites["s3df"], sites["olcf"]
    elog, s3df_jobs, olcf_jobs, api, first = (free_port(count) for count in (1, 1, 1, 1, _PORTS))
    airflow = s3df.member("airflow-dag-test")
    olcf.introduce(airflow, service="olcf-jobs", url=f"https://127.0.0.1:{olcf_jobs}")
    ports = range(first, first + _PORTS)
    started = Services(folder)
    try:
        kafka_address = folder / "kafka.address"
        started.start("kafka", "kafka", "--port-file", str(kafka_address))
        for site, port in (("s3df", s3df_jobs), ("olcf", olcf_jobs)):
            started.start(
                "jobs",
                f"jobs-{site}",
                config={
                    "listen": {"host": "127.0.0.1", "port": port},
                    "credentials": str(sites[site].member(f"jobs-{site}").folder),
                    "prefix": str(folder / "batch" / site),
                    "callbacks": {"allow": [f"https://127.0.0.1:{api}/v1/callback"]},
                    "cancel_jobs_on_exit": True,
                },
                # What the analysis jobs pull the encrypted streams with.
                env={"LCLSTREAM_CREDENTIALS": str(s3df.member("analysis").folder)},
            )
        started.start(
            "api",
            "api",
            config={
                "port": api,
                "credentials": str(s3df.member("transfer-api").folder),
                "database": f"sqlite:///{folder}/transfers.sqlite",
                "job_service": {"url": f"https://127.0.0.1:{s3df_jobs}"},
                "ports": {"first": ports.start, "last": ports.stop - 1, "scheme": "tls+tcp", "readers": ["analysis"]},
                "buffer": {"credentials": str(s3df.member("buffer").folder), "capacity": "64MiB", "grace_s": 0.5},
                "poll_s": 1.0,
                "status_s": 0.2,
            },
        )
        until(kafka_address.exists, 120, "Kafka")
        started.start(
            "elog",
            "elog",
            config={
                "port": elog,
                "credentials": str(s3df.member("elog").folder),
                "database": f"sqlite:///{folder}/elog.sqlite",
                "kafka": {"bootstrap_servers": kafka_address.read_text().strip()},
            },
        )
        for port in (elog, s3df_jobs, olcf_jobs, api):
            until(lambda port=port: _answers(port), 120, f"service at port {port}; the logs are in {folder}")
        yield Facility(
            airflow=airflow,
            api_url=f"https://127.0.0.1:{api}",
            elog_url=f"https://127.0.0.1:{elog}",
            s3df_url=f"https://127.0.0.1:{s3df_jobs}",
            olcf_url=f"https://127.0.0.1:{olcf_jobs}",
            ports=ports,
            _jobs_folder=folder / "batch",
        )
    finally:
        started.stop()


@pytest.fixture
def facility(services: Facility, monkeypatch: pytest.MonkeyPatch) -> Facility:
    """The services, with their connections defined in the environment of this process."""
    for name, value in services.connections().items():
        monkeypatch.setenv(name, value)
    return services


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def stream_config() -> Callable[..., dict[str, Any]]:
    """``stream_config(events)``: a configuration of the engine that makes its events itself."""

    def config(events: int) -> dict[str, Any]:
        return {
            "source_identifier": "exp={{ experiment }},run={{ run }}",
            "skip_incomplete_events": False,
            "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": events},
            "data_sources": {
                "image": {"type": "GenericRandomNumpyArray", "array_shape": "64,64", "array_dtype": "float32"},
                "energy": {"type": "GenericRandomNumpyArray", "array_shape": "1", "array_dtype": "float32"},
            },
            "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 5},
            "data_serializer": {
                "type": "HDF5BinarySerializer",
                "fields": {"image": "/data/image", "energy": "/data/energy"},
            },
            "data_handlers": [],
        }

    return config


def until(condition: Callable[[], object], timeout: float, what: str) -> float:
    """Wait for a condition; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, f"no {what} within {timeout} s"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[..., float]:
    return until
