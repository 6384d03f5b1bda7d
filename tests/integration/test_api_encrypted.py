"""Transfers over encrypted data sockets: real services, buffer and engine; strangers get nothing and are told why."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferPhase, TransferStatus
from lclstream.client import AddressError, NoPeerError, WrongPeerError, pull
from lclstream.client.batch import decode
from lclstream.client.encryption import context_for
from lclstream.jobs.client import JobClient
from lclstream.security.errors import PeerError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
LCLSTREAM = str(Path(sys.executable).parent / "lclstream")
EVENTS = 30
CONFIGURATION: dict[str, Any] = {
    "source_identifier": "",
    "skip_incomplete_events": False,
    "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": EVENTS},
    "data_sources": {
        "image": {"type": "GenericRandomNumpyArray", "array_shape": "32,48", "array_dtype": "uint16"},
    },
    "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 5},
    "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"image": "/data/image"}},
}


@dataclass
class Site:
    url: str
    client: TransferClient
    authority: Any
    folder: Path

    def ready(self) -> TransferStatus:
        """A new transfer that can be pulled from."""
        status = self.client.request(CONFIGURATION, ranks=2)
        poll(lambda: self.client.info(status.id).phase.pullable, "a buffer to pull from")
        return status

    def ended(self, number: int) -> TransferPhase:
        poll(lambda: self.client.info(number).released, "release of the transfer")
        return self.client.info(number).phase


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Any], free_port: Callable[..., int]
) -> Iterator[Site]:
    """A job service and a transfer service whose transfers are encrypted."""
    folder = tmp_path_factory.mktemp("site")
    authority = sites["s3df"]
    jobs, api, first = free_port(), free_port(), free_port(12)
    services = {
        "jobs": {
            "listen": {"port": jobs},
            "credentials": str(authority.member("jobs").folder),
            "prefix": str(folder / "prefix"),
            "callbacks": {"allow": [f"https://127.0.0.1:{api}/v1/callback"]},
        },
        "api": {
            "port": api,
            "credentials": str(authority.member("transfer-api").folder),
            "database": f"sqlite:///{folder}/transfers.sqlite",
            "job_service": {"url": f"https://127.0.0.1:{jobs}"},
            "ports": {"first": first, "last": first + 11, "scheme": "tls+tcp"},
            "buffer": {"credentials": str(authority.member("buffer").folder), "capacity": "64MiB", "grace_s": 0.5},
            "engine": {"credentials": str(authority.member("engine").folder)},
            "poll_s": 1,
            "status_s": 0.2,
        },
    }
    with ExitStack() as stack:
        for name, config in services.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
            stack.enter_context(service(name, folder))
        job_client = stack.enter_context(JobClient(f"https://127.0.0.1:{jobs}", authority.member("transfer-api")))
        client = stack.enter_context(TransferClient(f"https://127.0.0.1:{api}", authority.member("alice")))
        poll(lambda: answers(job_client.list), f"job service: {(folder / 'jobs.log').read_text()[-2000:]}")
        poll(lambda: answers(client.list), f"transfer service: {(folder / 'api.log').read_text()[-2000:]}")
        yield Site(f"https://127.0.0.1:{api}", client, authority, folder)
        for transfer in client.list():
            client.cancel(transfer.id)
        poll(lambda: all(client.info(each.id).released for each in client.list()), "release of transfers")


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


def poll(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    late = False
    while not condition():
        assert not late, f"no {what} within {timeout} s"
        time.sleep(0.1)
        late = time.monotonic() > deadline


def answers(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except PeerError:
        return False
    return True


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LCLSTREAM, *command], capture_output=True, text=True, timeout=120, check=False)


def test_strangers_get_nothing_and_are_told_why_and_the_analysis_gets_every_event(
    site: Site, sites: dict[str, Any], tmp_path: Path
) -> None:
    status = site.ready()
    assert status.url.startswith("tls+tcp://127.0.0.1:")
    stranger = sites["olcf"].member("mallory").folder
    summary = ["consume", "run-summary", "--url", status.url, "--output-dir", str(tmp_path)]

    with pytest.raises(AddressError, match="name the folder of your certificate"):
        context_for([status.url], None, listen=False)
    refused = run(*summary, "--credentials", str(stranger))
    assert refused.returncode == 3, refused.stderr
    assert "we do not accept its certificate" in refused.stderr
    # One who trusts the buffer, and whom the buffer does not know; and one who shows nothing at all.
    trusting = ssl.create_default_context(cadata=site.authority.certificate_pem.decode())
    with pytest.raises(WrongPeerError, match=r"refuses our certificate.*CERTIFICATE_REQUIRED"):
        pull(status.url, tls=trusting, connect_timeout_s=30).open()
    trusting.load_cert_chain(stranger / "id.crt", stranger / "id.key")
    with pytest.raises(WrongPeerError, match="refuses our certificate"):
        pull(status.url, tls=trusting, connect_timeout_s=30).open()
    with pytest.raises(AddressError, match="library nng"):
        pull(status.url, library="zmq")

    alice = site.authority.member("alice").folder
    done = run(*summary, "--credentials", str(alice))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["events"] == EVENTS
    assert site.ended(status.id) is TransferPhase.done
    info = site.client.info(status.id)
    assert (info.metrics.recvd, info.metrics.sent) == (6, 6)
    assert info.buffer is not None
    assert {peer["subject"] for peer in info.buffer["peers"]} == {"engine", "alice"}
    assert info.buffer["refused"] >= 3


def test_another_users_certificate_gets_nothing_and_the_owner_and_those_he_names_get_every_event(
    site: Site,
) -> None:
    status = site.client.request(CONFIGURATION, ranks=1, readers=["batch"])
    poll(lambda: site.client.info(status.id).phase.pullable, "a buffer to pull from")
    assert [reader.partition("@")[0] for reader in site.client.info(status.id).readers or []] == ["alice", "batch"]

    def context(login: str) -> ssl.SSLContext:
        made = context_for([status.url], site.authority.member(login).folder, listen=False)
        assert made is not None
        return made

    # Both have certificates of the very authority that signed those of alice and of the services.
    for stranger in ("dave", "engine"):
        with pytest.raises(NoPeerError, match="it has ended, or its list of logins does not name ours"):
            pull(status.url, tls=context(stranger), connect_timeout_s=5).open()
    with pull(status.url, tls=context("batch")) as batch, pull(status.url, tls=context("alice")) as alice:
        messages = [*batch, *alice]
    assert sum(decode(message).events for message in messages) == EVENTS
    assert site.ended(status.id) is TransferPhase.done
    buffer = site.client.info(status.id).buffer
    assert buffer is not None
    assert {peer["subject"] for peer in buffer["peers"]} == {"engine", "batch", "alice"}
    turned_away = {(each["side"], each["login"], each["rule"]) for each in buffer["turned_away"]}
    assert turned_away == {("out", "dave", "tls.consumers"), ("out", "engine", "tls.consumers")}
    assert buffer["denied"] >= 2
    (log,) = [
        path.read_text() for path in (site.folder / "prefix").rglob("stderr.1") if "may not pull" in path.read_text()
    ]
    assert "dave, issued by " in log


def test_a_user_of_another_site_gets_a_stream_with_the_certificate_this_site_signed_for_him(
    site: Site, sites: dict[str, Any], tmp_path: Path
) -> None:
    bob = sites["olcf"].member("bob")
    site.authority.introduce(bob, service="streams", url=site.url)
    config = tmp_path / "stream.yaml"
    config.write_text(yaml.safe_dump(CONFIGURATION))
    done = run(
        *("get", str(config), "--server", site.url, "--credentials", str(bob.folder)),
        *("--output-dir", str(tmp_path / "out"), "--ranks", "1"),
    )
    assert done.returncode == 0, done.stderr
    messages = [path.read_bytes() for path in (tmp_path / "out").glob("*.h5")]
    assert sum(decode(message).events for message in messages) == EVENTS


def test_only_paths_of_certificates_go_into_jobs(site: Site) -> None:
    jobs = [path for path in (site.folder / "prefix").rglob("*") if path.is_file()]
    texts = {path: path.read_text(errors="replace") for path in jobs}
    engine = site.authority.member("engine").folder
    assert any(str(engine / "id.key") in text for text in texts.values())
    assert not [path for path, text in texts.items() if "PRIVATE KEY" in text]
