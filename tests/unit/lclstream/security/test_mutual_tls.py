"""Promises of mutual TLS between a server of ours and its clients, on real sockets."""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from certified import encode
from certified.ca import CA
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import Depends, FastAPI

from lclstream.security import http
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, CredentialsError, ServiceError, UnreachableError
from lclstream.security.identity import Identity
from lclstream.security.server import peer_identity, server_for


@pytest.fixture
def service(
    tmp_path: Path, free_port: Callable[[], int], wait_until: Callable[..., None]
) -> Iterator[tuple[str, SiteAuthority]]:
    """A service of the site `home` that says who called; its address and its site."""
    app = FastAPI()

    @app.get("/who")
    def who(peer: Identity = Depends(peer_identity)) -> Identity:  # noqa: B008
        return peer

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("boom")

    home = SiteAuthority(tmp_path / "home", "home")
    port = free_port()
    server = server_for(app, host="127.0.0.1", port=port, credentials=home.member("service"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 60, "server started")
    yield f"https://127.0.0.1:{port}", home
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def call(url: str, credentials: Credentials, path: str = "/who") -> Any:
    with http.explained(url), http.client(url, credentials) as client:
        return client.get(path).raise_for_status().json()


def test_the_server_knows_the_caller_by_his_certificate(service: tuple[str, SiteAuthority]) -> None:
    url, home = service
    answer = call(url, home.member("ada"))
    assert answer["login"] == "ada"
    assert "O=home" in answer["issuer"]


def test_a_stranger_is_refused_and_told_that_it_is_his_certificate(
    service: tuple[str, SiteAuthority], tmp_path: Path
) -> None:
    url, home = service
    stranger = SiteAuthority(tmp_path / "away", "away").member("mallory")
    # He trusts the service; the service does not know his issuer.
    shutil.copy(home.member("service").folder / "known_servers/org.crt", stranger.folder / "known_servers/home.crt")
    with pytest.raises(AuthenticationError, match="certificate") as refused:
        call(url, stranger)
    assert not refused.value.retry


def test_a_server_of_unknown_issuer_is_not_talked_to(service: tuple[str, SiteAuthority], tmp_path: Path) -> None:
    url, _ = service
    stranger = SiteAuthority(tmp_path / "away", "away").member("bob")
    with pytest.raises(AuthenticationError, match="we do not trust its certificate"):
        call(url, stranger)


def test_an_introduced_member_of_another_site_is_served(service: tuple[str, SiteAuthority], tmp_path: Path) -> None:
    url, home = service
    guest = SiteAuthority(tmp_path / "away", "away").member("guest")
    home.introduce(guest, service="home", url=url)
    answer = call(url, guest)
    assert answer["login"] == "guest@away"
    assert "O=home" in answer["issuer"]


def test_an_introduced_certificate_can_pose_as_no_local_user_and_no_service(tmp_path: Path) -> None:
    home = SiteAuthority(tmp_path / "home", "home")
    # All of this the stranger chooses himself.
    folder = tmp_path / "mallory"
    (folder / "known_servers").mkdir(parents=True)
    name = x509.Name([*encode.person_name("ada", uname="ada"), *encode.person_name("root", uname="root")])
    CA.new(name, encode.SAN(hosts=["localhost"])).save(folder / "id")
    home.introduce(Credentials(folder), service="home", url="https://127.0.0.1:1")
    (path,) = (folder / "id").glob("*.crt")
    signed = x509.load_pem_x509_certificate(path.read_bytes())
    identity = Identity.of_certificate(signed.public_bytes(Encoding.DER))
    assert identity.login == "ada@ada"
    with pytest.raises(x509.ExtensionNotFound):
        signed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert not signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_client_without_a_certificate_is_refused(service: tuple[str, SiteAuthority]) -> None:
    url, home = service
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=home.certificate_pem.decode())
    with httpx.Client(verify=context, trust_env=False) as client, pytest.raises(httpx.TransportError):
        client.get(f"{url}/who")


def test_an_expired_certificate_is_refused(service: tuple[str, SiteAuthority], wait_until: Callable[..., None]) -> None:
    url, home = service
    late = home.member("late")
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    brief = home._authority.leaf_cert(
        encode.person_name("late", uname="late"), encode.SAN(hosts=["localhost"]), not_after=end
    )
    for path in (late.certificate, late.key):
        path.unlink()
    brief.save(late.folder / "id")
    wait_until(lambda: datetime.datetime.now(datetime.UTC) > end + datetime.timedelta(seconds=1), 60, "expiry")
    with pytest.raises(AuthenticationError):
        call(url, late)


def test_tls_1_2_is_refused(service: tuple[str, SiteAuthority]) -> None:
    url, home = service
    credentials = home.member("ada")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(credentials.certificate, credentials.key)
    context.load_verify_locations(cadata=home.certificate_pem.decode())
    with httpx.Client(verify=context, trust_env=False) as client, pytest.raises(httpx.ConnectError):
        client.get(f"{url}/who")


def test_a_server_of_another_name_is_not_talked_to(
    tmp_path: Path, free_port: Callable[[], int], wait_until: Callable[..., None]
) -> None:
    home = SiteAuthority(tmp_path / "home", "home")
    port = free_port()
    elsewhere = home.member("elsewhere", hosts=("elsewhere.example",))
    server = server_for(FastAPI(), host="127.0.0.1", port=port, credentials=elsewhere)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 60, "server started")
        with pytest.raises(AuthenticationError, match="IP address mismatch"):
            call(f"https://127.0.0.1:{port}", home.member("ada"))
    finally:
        server.should_exit = True
        thread.join(60)


def test_nobody_there_is_said_and_may_be_retried(sites: dict[str, Any], free_port: Callable[[], int]) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached") as unreachable:
        call(f"https://127.0.0.1:{free_port()}", sites["s3df"].member("ada"))
    assert unreachable.value.retry


def test_an_error_of_the_service_carries_its_words_and_whether_to_retry(service: tuple[str, SiteAuthority]) -> None:
    url, home = service
    with pytest.raises(ServiceError) as missing:
        call(url, home.member("ada"), "/nothing")
    assert (missing.value.status, missing.value.detail, missing.value.retry) == (404, "Not Found", False)
    with pytest.raises(ServiceError) as broken:
        call(url, home.member("ada"), "/broken")
    assert (broken.value.status, broken.value.retry) == (500, True)


def test_every_request_is_logged_with_who_and_what(
    service: tuple[str, SiteAuthority], caplog: pytest.LogCaptureFixture, wait_until: Callable[..., None]
) -> None:
    url, home = service
    with caplog.at_level(logging.INFO, "lclstream.access"):
        call(url, home.member("ada"))
        wait_until(lambda: any(r.name == "lclstream.access" for r in caplog.records), 60, "log line")
    entry = json.loads(next(r.message for r in caplog.records if r.name == "lclstream.access"))
    assert (entry["login"], entry["method"], entry["path"], entry["status"]) == ("ada", "GET", "/who", 200)


def test_a_key_others_can_read_is_refused(sites: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "open"
    shutil.copytree(sites["s3df"].member("ada").folder, folder)
    (folder / "id.key").chmod(0o644)
    with pytest.raises(CredentialsError, match=r"mode 0644.*chmod 600"):
        Credentials(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="certified init"):
        Credentials(tmp_path / "nothing")


def test_a_folder_that_trusts_nobody_is_refused(sites: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "lonely"
    shutil.copytree(sites["s3df"].member("ada").folder, folder)
    (folder / "known_clients/org.crt").unlink()
    with pytest.raises(CredentialsError, match="names no issuer"):
        Credentials(folder).server_context()


def test_a_service_that_wants_another_signature_says_whose(sites: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "guest"
    shutil.copytree(sites["s3df"].member("ada").folder, folder)
    guest = Credentials(folder)
    sites["olcf"].introduce(guest, service="olcf", url="https://127.0.0.1:1")
    for certificate in (folder / "id").glob("*.crt"):
        certificate.unlink()
    with pytest.raises(CredentialsError, match=r"signed by .*O=olcf.*add-intro"):
        guest.client_context("https://127.0.0.1:1")


@pytest.mark.parametrize("entry", ["url: [1]", "{", "url: https://x\ncert: '!!'", "url: https://x\ncert: AAAA"])
def test_a_service_entry_that_cannot_be_read_is_named(sites: dict[str, Any], tmp_path: Path, entry: str) -> None:
    folder = tmp_path / "ada"
    shutil.copytree(sites["s3df"].member("ada").folder, folder)
    (folder / "known_servers/olcf.yaml").write_text(entry)
    with pytest.raises(CredentialsError, match=r"olcf\.yaml: not a service entry"):
        Credentials(folder).client_context("https://127.0.0.1:1")


def test_a_stream_is_verified_by_what_the_folder_says_about_its_host_whatever_its_port(tmp_path: Path) -> None:
    home = SiteAuthority(tmp_path / "home", "home")
    stranger = SiteAuthority(tmp_path / "away", "away").member("ada")
    home.introduce(stranger, service="api", url="https://127.0.0.1:8446")
    issuers = {
        url: {tuple(entry["subject"]) for entry in stranger.client_context(url).get_ca_certs()}
        for url in (
            "https://127.0.0.1:8446",
            "tls+tcp://127.0.0.1:30001",
            "tls+tcp://localhost:30001",
            "https://127.0.0.1:1",
        )
    }
    assert issuers["tls+tcp://127.0.0.1:30001"] == issuers["https://127.0.0.1:8446"]
    assert issuers["tls+tcp://localhost:30001"] == issuers["https://127.0.0.1:1"] != issuers["https://127.0.0.1:8446"]
