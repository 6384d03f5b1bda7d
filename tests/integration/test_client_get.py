"""`lclstream get` and the training data set with a real transfer service, job service, buffer and engine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferPhase, TransferStatus
from lclstream.dataset import StreamDataset
from lclstream.jobs.client import JobClient
from lclstream.security.errors import PeerError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LCLSTREAM = str(Path(sys.executable).parent / "lclstream")


def configuration(events: int, batch_size: int = 5) -> dict[str, Any]:
    return {
        "source_identifier": "",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": events},
        "data_sources": {
            "random": {"type": "GenericRandomNumpyArray", "array_shape": "20,2", "array_dtype": "float32"}
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": batch_size},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"random": "/data/random"}},
    }


ENDLESS = configuration(10**9, batch_size=50)


@dataclass
class Site:
    url: str
    credentials: Path
    client: TransferClient


@pytest.fixture(scope="module")
def site(tmp_path_factory, sites, free_port) -> Iterator[Site]:
    """A job service and a transfer service with processes of their own, for all tests here."""
    folder = tmp_path_factory.mktemp("site")
    authority = sites["s3df"]
    jobs, api, first = free_port(), free_port(), free_port(12)
    jobs_config = {
        "listen": {"port": jobs},
        "credentials": str(authority.member("jobs").folder),
        "prefix": str(folder / "prefix"),
        "callbacks": {"allow": [f"https://127.0.0.1:{api}/v1/callback"]},
    }
    api_config = {
        "port": api,
        "credentials": str(authority.member("transfer-api").folder),
        "database": f"sqlite:///{folder}/transfers.sqlite",
        "job_service": {"url": f"https://127.0.0.1:{jobs}"},
        "ports": {"first": first, "last": first + 11},
        "buffer": {"credentials": str(authority.member("buffer").folder), "capacity": "64MiB", "grace_s": 0.5},
        "engine": {"ranks": 2},
        "poll_s": 1,
        "status_s": 0.2,
        "settle_s": 2,
    }
    alice = authority.member("alice")
    with ExitStack() as stack:
        for name, config in (("jobs", jobs_config), ("api", api_config)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
            stack.enter_context(service(name, folder))
        job_client = stack.enter_context(JobClient(f"https://127.0.0.1:{jobs}", authority.member("transfer-api")))
        client = stack.enter_context(TransferClient(f"https://127.0.0.1:{api}", alice))
        poll(lambda: answers(job_client.list), 120, f"job service: {(folder / 'jobs.log').read_text()[-2000:]}")
        poll(lambda: answers(client.list), 120, f"transfer service: {(folder / 'api.log').read_text()[-2000:]}")
        yield Site(f"https://127.0.0.1:{api}", alice.folder, client)
        for transfer in client.list():
            client.cancel(transfer.id)
        poll(lambda: all(client.info(each.id).released for each in client.list()), 120, "release of transfers")


@contextmanager
def service(name: str, folder: Path) -> Iterator[None]:
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [LCLSTREAM, name, "--config", str(folder / f"{name}.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PATH": os.pathsep.join([str(Path(LCLSTREAM).parent), os.environ["PATH"]])},
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)


def poll(condition: Callable[[], object], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout} s"
        time.sleep(0.1)


def answers(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except PeerError:
        return False
    return True


def newest(site: Site) -> TransferStatus:
    return site.client.list()[0]


def get(site: Site, config: Path, *options: str) -> list[str]:
    return ["get", str(config), "--server", site.url, "--credentials", str(site.credentials), *options]


def test_get_writes_the_whole_stream_as_tar_and_leaves_a_finished_transfer(site, tmp_path):
    config = tmp_path / "stream.yaml"
    config.write_text(yaml.safe_dump(configuration(40)))
    done = subprocess.run([LCLSTREAM, *get(site, config)], capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    events = 0
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        for name in tar.getnames():
            with h5py.File(io.BytesIO(tar.extractfile(name).read())) as file:
                events += len(file["/data/random"])
    assert events == 40
    assert site.client.info(newest(site).id).phase is TransferPhase.done


def test_a_signal_cancels_the_transfer_whose_lease_was_renewed_until_then(site, tmp_path, start, wait_until):
    config = tmp_path / "stream.yaml"
    config.write_text(yaml.safe_dump(ENDLESS))
    child = start("lclstream", *get(site, config, "--output-dir", str(tmp_path / "out"), "--lease", "9"))
    wait_until((tmp_path / "out" / "00002.h5").exists, 180, "third message")
    transfer = newest(site)
    granted = transfer.lease_expires
    wait_until(lambda: (site.client.info(transfer.id).lease_expires or 0) > granted + 0.5, 60, "renewed lease")
    child.signal(signal.SIGTERM)
    assert child.wait(120) == 143, child.output()
    assert "cancelled" in child.output()
    assert site.client.info(transfer.id).phase is TransferPhase.canceled


def test_a_transfer_that_somebody_cancels_is_told_as_such(site, tmp_path, start, wait_until):
    config = tmp_path / "stream.json"
    config.write_text(json.dumps(ENDLESS))
    child = start("lclstream", *get(site, config, "--output-dir", str(tmp_path / "out")))
    wait_until((tmp_path / "out" / "00002.h5").exists, 180, "third message")
    site.client.cancel(newest(site).id)
    assert child.wait(120) == 1, child.output()
    assert "canceled" in child.output() or "broke" in child.output()


def test_a_refused_configuration_is_a_wrong_command_line_and_names_the_field(site, tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump({**configuration(5), "event_source": {"type": "NoSuchSource"}}))
    before = len(site.client.list())
    done = subprocess.run([LCLSTREAM, *get(site, config)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "event_source" in done.stderr
    assert len(site.client.list()) == before


def test_a_training_data_set_asks_once_and_then_reads_its_cache(site, tmp_path):
    before = len(site.client.list())
    options = {"server": site.url, "credentials": site.credentials}
    dataset = StreamDataset(configuration(20), tmp_path / "cache", **options)
    first = [batch["/data/random"] for batch in dataset]
    assert sum(map(len, first)) == 20
    second = [batch["/data/random"] for batch in dataset]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
    assert len(site.client.list()) == before + 1
