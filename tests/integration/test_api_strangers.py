"""The transfer service as a process, and those it must not serve: nothing of theirs is started, whatever they send."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from certified import encode
from cryptography import x509

from lclstream.api.client import TransferClient
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, PeerError, ServiceError

pytestmark = pytest.mark.integration

REQUEST = {
    "source_identifier": "",
    "skip_incomplete_events": False,
    "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 1},
    "data_sources": {"random": {"type": "GenericRandomNumpyArray", "array_shape": "2", "array_dtype": "float32"}},
    "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 1},
    "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"random": "/data/random"}},
}


class Service:
    """``lclstream api``, in front of a job service that is not there."""

    def __init__(self, folder: Path, port: int, site: SiteAuthority) -> None:
        self.site = site
        self.url = f"https://127.0.0.1:{port}"
        self.port = port
        self.certificates = site.member("transfer-api").folder
        config = {
            "port": port,
            "credentials": str(self.certificates),
            "database": f"sqlite:///{folder}/transfers.sqlite",
            "job_service": {"url": "https://127.0.0.1:1"},
        }
        (folder / "api.yaml").write_text(yaml.safe_dump(config))
        self.log = folder / "api.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).parent / "lclstream"), "api", "--config", str(folder / "api.yaml")],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def transfers(self, login: str = "alice") -> int:
        with TransferClient(self.url, self.site.member(login)) as client:
            return len(client.list())

    def trusted(self) -> ssl.SSLContext:
        """A context that trusts the service, and has no certificate yet."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.site.certificate_pem.decode())
        return context


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[..., int]) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("strangers")
    service = Service(folder, free_port(), SiteAuthority(folder / "home", "home"))
    try:
        deadline = time.monotonic() + 60
        while True:
            assert service.process.poll() is None, service.log.read_text()
            try:
                service.transfers()
                break
            except PeerError:
                assert time.monotonic() < deadline, service.log.read_text()
                time.sleep(0.05)
        yield service
    finally:
        service.process.terminate()
        service.process.wait(60)


def ask(service: Service, who: Credentials) -> None:
    with TransferClient(service.url, who) as client:
        client.request(REQUEST)


def ask_with(service: Service, context: ssl.SSLContext) -> None:
    with httpx.Client(verify=context, trust_env=False, timeout=30) as client:
        client.post(f"{service.url}/v1/transfers", json=REQUEST)


def test_without_a_certificate(service: Service) -> None:
    with pytest.raises(httpx.TransportError):
        ask_with(service, service.trusted())
    assert service.transfers() == 0


def test_with_the_same_names_of_another_issuer(service: Service, tmp_path: Path) -> None:
    stranger = SiteAuthority(tmp_path / "away", "home").member("alice")
    shutil.copy(service.certificates / "known_servers/org.crt", stranger.folder / "known_servers/home.crt")
    with pytest.raises(AuthenticationError) as refused:
        ask(service, stranger)
    assert not refused.value.retry
    assert service.transfers() == 0


def test_with_an_expired_certificate(service: Service, wait_until: Callable[..., None]) -> None:
    late = service.site.member("late")
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    brief = service.site._authority.leaf_cert(
        encode.person_name("late", uname="late"), encode.SAN(hosts=["localhost"]), not_after=end
    )
    for path in (late.certificate, late.key):
        path.unlink()
    brief.save(late.folder / "id")
    # A certificate's times are whole seconds.
    wait_until(lambda: datetime.datetime.now(datetime.UTC) > end + datetime.timedelta(seconds=1), 30, "expiry")
    context = service.trusted()
    context.load_cert_chain(late.certificate, late.key)
    with pytest.raises(httpx.TransportError):
        ask_with(service, context)
    assert service.transfers() == 0


def test_with_a_revoked_certificate(service: Service) -> None:
    thief = service.site.member("thief")
    certificate = x509.load_pem_x509_certificate(thief.certificate.read_bytes())
    entry = {
        "serial": f"{certificate.serial_number:x}",
        "issuer": certificate.issuer.rfc4514_string(),
        "since": "2026-01-01T00:00:00Z",
        "reason": "stolen",
    }
    with TransferClient(service.url, thief) as client:
        assert client.list() == []
        (service.certificates / "revoked.yaml").write_text(yaml.safe_dump([entry]))
        with pytest.raises(ServiceError, match="stolen") as refused:
            client.request(REQUEST)
    assert refused.value.status == 401
    (service.certificates / "revoked.yaml").write_text("[]")
    assert service.transfers("thief") == 0


def test_with_tls_1_2(service: Service) -> None:
    alice = service.site.member("alice")
    context = service.trusted()
    context.load_cert_chain(alice.certificate, alice.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        ask_with(service, context)
    assert service.transfers() == 0


def test_our_clients_do_not_speak_to_a_service_of_another_name(service: Service) -> None:
    alice = service.site.member("alice")
    with (
        socket.create_connection(("127.0.0.1", service.port), timeout=30) as raw,
        pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"),
    ):
        alice.client_context(service.url).wrap_socket(raw, server_hostname="elsewhere.example.org")


@pytest.mark.parametrize("path", ["producer", "forwarder"])
def test_a_member_without_a_jobs_secret_cannot_tell_of_it(service: Service, path: str) -> None:
    mallory = service.site.member("mallory")
    context = service.trusted()
    context.load_cert_chain(mallory.certificate, mallory.key)
    told: dict[str, Any] = {"jobid": "1712345678.123", "jobndx": 1, "state": "completed", "info": "0"}
    with httpx.Client(verify=context, trust_env=False, timeout=30) as client:
        for headers in ({}, {"x-hub-signature-256": "sha256=" + 64 * "0"}):
            answer = client.post(f"{service.url}/v1/callback/{path}", json=told, headers=headers)
            assert answer.status_code == 403
