"""Promises of a running server about a certificate folder that changes."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from certified import encode
from certified.blob import PublicBlob
from certified.ca import CA
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID
from fastapi import FastAPI

from lclstream.security import http
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, CredentialsError, ServiceError
from lclstream.security.revocation import Revocation, dump, load, same_serial

from .conftest import Running


@pytest.fixture(params=["asyncio", "uvloop"])
def service(serving: Callable[..., Running], request: pytest.FixtureRequest) -> Running:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    app = FastAPI()

    @app.get("/")
    def root() -> str:
        return "served"

    return serving(app, loop=request.param)


def call(service: Running, member: Credentials) -> str:
    with http.explained(service.url), http.client(service.url, member) as client:
        return str(client.get("/").raise_for_status().json())


def shown(service: Running) -> x509.Certificate:
    """The certificate the server shows to a new connection."""
    with service.connect() as connection:
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def replace(target: Path, content: bytes, mode: int | None = None) -> None:
    beside = target.with_name(target.name + ".new")
    beside.write_bytes(content)
    beside.chmod(mode if mode is not None else target.stat().st_mode)
    os.replace(beside, target)


def renew(service: Running) -> x509.Certificate:
    leaf = service.site._authority.leaf_cert(
        encode.person_name("service", uname="service"), encode.SAN(hosts=["localhost", "127.0.0.1"])
    )
    fresh = service.folder / "fresh"
    leaf.save(fresh)
    replace(service.credentials.key, fresh.with_suffix(".key").read_bytes(), 0o600)
    replace(service.credentials.certificate, fresh.with_suffix(".crt").read_bytes())
    return leaf.certificate


def revoke(service: Running, member: Credentials, **changes: object) -> None:
    certificate = x509.load_pem_x509_certificate(member.certificate.read_bytes())
    entry = Revocation.model_validate(
        {
            "serial": f"{certificate.serial_number:X}",
            "issuer": certificate.issuer.rfc4514_string(),
            "since": datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1),
            "reason": "laptop lost",
            **changes,
        }
    )
    (service.folder / "revoked.yaml").write_text(dump([entry]))


def test_a_renewed_certificate_is_shown_to_the_next_connection_while_open_ones_go_on(service: Running) -> None:
    before = shown(service)
    with http.client(service.url, service.site.member("ada")) as client:
        assert client.get("/").status_code == 200
        renewed = renew(service)
        assert client.get("/").status_code == 200
    assert shown(service) == renewed != before


def test_a_half_written_pair_leaves_the_old_one_in_use_and_is_taken_when_it_is_complete(
    service: Running, caplog: pytest.LogCaptureFixture
) -> None:
    before = shown(service)
    key = service.credentials.key.read_bytes()
    with caplog.at_level(logging.ERROR):
        renewed = renew(service)
        # The new certificate beside the old key, then half a certificate, then none at all.
        replace(service.credentials.key, key, 0o600)
        assert shown(service) == before
        whole = service.credentials.certificate.read_bytes()
        service.credentials.certificate.write_bytes(whole[: len(whole) // 2])
        assert shown(service) == before
        service.credentials.certificate.unlink()
        assert shown(service) == before
    assert "the ones read before stay in use" in caplog.text
    service.credentials.certificate.write_bytes(whole)
    replace(service.credentials.key, (service.folder / "fresh.key").read_bytes(), 0o600)
    assert shown(service) == renewed


def test_a_renewed_key_that_others_can_read_is_not_used(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    before = shown(service)
    renewed = renew(service)
    service.credentials.key.chmod(0o644)
    with caplog.at_level(logging.ERROR):
        assert shown(service) == before
    assert "chmod 600" in caplog.text
    service.credentials.key.chmod(0o600)
    assert shown(service) == renewed


def test_a_new_issuer_is_trusted_by_the_next_connection(service: Running, away: SiteAuthority) -> None:
    guest = away.member("guest")
    shutil.copy(service.folder / "known_servers/org.crt", guest.folder / "known_servers/home.crt")
    with pytest.raises(AuthenticationError):
        call(service, guest)
    (service.folder / "known_clients/away.crt").write_bytes(away.certificate_pem)
    assert call(service, guest) == "served"


def test_a_removed_issuer_is_refused_on_open_connections_too(service: Running, away: SiteAuthority) -> None:
    guest = away.member("guest")
    shutil.copy(service.folder / "known_servers/org.crt", guest.folder / "known_servers/home.crt")
    entry = service.folder / "known_clients/away.crt"
    entry.write_bytes(away.certificate_pem)
    with http.client(service.url, guest) as client:
        assert client.get("/").status_code == 200
        entry.unlink()
        refused = client.get("/")
    assert refused.status_code == 401
    assert "guest" in refused.json()["detail"]
    assert "O=away" in refused.json()["detail"]
    assert "rule: known issuers" in refused.json()["detail"]
    with pytest.raises(AuthenticationError):
        call(service, guest)
    assert call(service, service.site.member("ada")) == "served"


def test_an_issuer_file_that_is_half_written_keeps_what_it_said(service: Running) -> None:
    entry = service.folder / "known_clients/org.crt"
    entry.write_bytes(entry.read_bytes()[:100])
    assert call(service, service.site.member("ada")) == "served"


def test_removing_the_last_issuer_locks_everybody_out(service: Running) -> None:
    assert call(service, service.site.member("ada")) == "served"
    (service.folder / "known_clients/org.crt").unlink()
    with pytest.raises(AuthenticationError):
        call(service, service.site.member("ada"))


def test_a_revoked_certificate_is_refused_at_the_next_request_with_words(service: Running) -> None:
    ada = service.site.member("ada")
    with http.client(service.url, ada) as client:
        assert client.get("/").status_code == 200
        revoke(service, ada)
        refused = client.get("/")
    serial = f"{x509.load_pem_x509_certificate(ada.certificate.read_bytes()).serial_number:x}"
    assert refused.status_code == 401
    for word in (serial, "ada", "O=home", "laptop lost", "revoked.yaml"):
        assert word in refused.json()["detail"]
    with pytest.raises(ServiceError, match="laptop lost") as told:
        call(service, ada)
    assert not told.value.retry
    assert call(service, service.site.member("bob")) == "served"


def test_a_revocation_counts_from_its_time_on(service: Running) -> None:
    revoke(service, service.site.member("ada"), since=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1))
    assert call(service, service.site.member("ada")) == "served"


@pytest.mark.parametrize("damage", ["- serial: [", "- {serial: 1234}", "nonsense", None])
def test_a_list_that_is_damaged_or_lost_revokes_what_it_did(
    service: Running, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ada = service.site.member("ada")
    revoke(service, ada)
    with pytest.raises(ServiceError):
        call(service, ada)
    with caplog.at_level(logging.ERROR):
        if damage is None:
            (service.folder / "revoked.yaml").unlink()
        else:
            (service.folder / "revoked.yaml").write_text(damage)
        with pytest.raises(ServiceError):
            call(service, ada)
    assert "in force" in caplog.text
    (service.folder / "revoked.yaml").write_text("[]")
    assert call(service, ada) == "served"


def test_a_certificate_that_expires_is_refused_on_the_open_connection(
    service: Running, wait_until: Callable[..., None], tmp_path: Path
) -> None:
    late = Credentials(shutil.copytree(service.site.member("late").folder, tmp_path / "late"))
    # Long enough for the key, the handshake and the first answer on a machine that is held up.
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=8)
    brief = service.site._authority.leaf_cert(
        encode.person_name("late", uname="late"), encode.SAN(hosts=["localhost"]), not_after=end
    )
    brief.save(tmp_path / "brief")
    replace(late.key, (tmp_path / "brief.key").read_bytes(), 0o600)
    replace(late.certificate, (tmp_path / "brief.crt").read_bytes())
    request = b"GET / HTTP/1.1\r\nhost: x\r\n"
    # By hand: our clients keep no connection for that long.
    with service.connect(late) as connection:
        connection.sendall(request + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        wait_until(lambda: datetime.datetime.now(datetime.UTC) > end, 60, "expiry")
        connection.sendall(request + b"connection: close\r\n\r\n")
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert b"HTTP/1.1 401" in answer
    assert b"expired" in answer
    assert b"late" in answer


def test_a_session_cannot_be_resumed_past_a_removed_issuer(service: Running) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        session = connection.session
        assert session is None or not session.has_ticket


def test_a_certificate_for_servers_only_is_not_accepted_from_a_client(service: Running, tmp_path: Path) -> None:
    authority = service.site._authority
    key = Ed25519PrivateKey.generate()
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(encode.person_name("eve", uname="eve"))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.pubkey), critical=False)
        .sign(authority._private_key, None)
    )
    eve = Credentials(shutil.copytree(service.site.member("ada").folder, tmp_path / "eve"))
    from certified.blob import PrivateBlob

    replace(eve.key, PrivateBlob(key).bytes(), 0o600)
    replace(eve.certificate, PublicBlob(certificate).bytes())
    with pytest.raises(AuthenticationError):
        call(service, eve)


def test_an_issuer_cannot_vouch_in_the_name_of_another_one(service: Running, tmp_path: Path) -> None:
    """A trusted site that may sign issuers signs one that calls itself like ours: its members are not ours."""
    root = CA.new(encode.org_name("roots", "lclstream"), path_length=1)
    (service.folder / "known_clients/roots.crt").write_bytes(PublicBlob(root.certificate).bytes())
    impostor = CA.new(service.site._authority.certificate.subject, parent_cert=root)
    eve = Credentials(shutil.copytree(service.site.member("ada").folder, tmp_path / "eve"))
    leaf = impostor.leaf_cert(encode.person_name("ada", uname="ada"), encode.SAN(hosts=["localhost"]))
    leaf.save(tmp_path / "leaf")
    replace(eve.key, (tmp_path / "leaf.key").read_bytes(), 0o600)
    chain = (tmp_path / "leaf.crt").read_bytes() + PublicBlob(impostor.certificate).bytes()
    replace(eve.certificate, chain)
    with pytest.raises((ServiceError, AuthenticationError)) as refused:
        call(service, eve)
    if isinstance(refused.value, ServiceError):
        assert "rule: known issuers" in refused.value.detail


def test_a_certificate_that_names_nobody_is_refused_with_words(service: Running, tmp_path: Path) -> None:
    nobody = Credentials(shutil.copytree(service.site.member("ada").folder, tmp_path / "nobody"))
    leaf = service.site._authority.leaf_cert(encode.org_name("home", "group"), encode.SAN(hosts=["localhost"]))
    leaf.save(tmp_path / "leaf")
    replace(nobody.key, (tmp_path / "leaf.key").read_bytes(), 0o600)
    replace(nobody.certificate, (tmp_path / "leaf.crt").read_bytes())
    with pytest.raises(ServiceError, match="neither UID nor CN") as refused:
        call(service, nobody)
    assert refused.value.status == 401


def test_a_refused_handshake_is_logged_with_address_and_reason(
    service: Running, away: SiteAuthority, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., None]
) -> None:
    stranger = away.member("mallory")
    shutil.copy(service.folder / "known_servers/org.crt", stranger.folder / "known_servers/home.crt")
    with caplog.at_level(logging.WARNING), pytest.raises(AuthenticationError):
        call(service, stranger)
    wait_until(lambda: "its certificate is refused" in caplog.text, 60, "log line")
    assert "127.0.0.1" in caplog.text
    assert "unable to get local issuer certificate" in caplog.text or "self-signed" in caplog.text


def test_a_server_does_not_start_on_a_wrong_list(service: Running, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(service.folder, tmp_path / "wrong"))
    (folder / "revoked.yaml").write_text("- {serial: 1234, issuer: O=x, since: 2026-01-01T00:00:00Z}")
    from lclstream.security.reloading import LiveCredentials

    with pytest.raises(CredentialsError, match=r"revoked\.yaml, line 1: 0\.serial.*in quotes"):
        LiveCredentials(Credentials(folder))


@pytest.mark.parametrize(
    ("text", "serial"), [("3F:9C", "3f9c"), ("serial=03F9C", "3f9c"), ("0x0", "0"), (" 00ab ", "ab")]
)
def test_serials_are_compared_in_every_way_people_write_them(text: str, serial: str) -> None:
    assert same_serial(text) == serial


@pytest.mark.parametrize("text", ["", "xyz", "-1", "f" * 41])
def test_what_is_no_serial_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        same_serial(text)


def test_a_list_reads_back_what_was_written(tmp_path: Path) -> None:
    entries = [
        Revocation(serial="1234", issuer="CN=ü,O=x", since=datetime.datetime.now(datetime.UTC), reason="a: b # c"),
        Revocation(serial="12e4", issuer="O=x", since=datetime.datetime.now(datetime.UTC)),
    ]
    (tmp_path / "revoked.yaml").write_text(dump(entries))
    assert load(tmp_path / "revoked.yaml") == entries


def test_tls_contexts_give_no_session_tickets(home: SiteAuthority) -> None:
    assert home.member("service").server_context().num_tickets == 0
    assert home.member("service").server_context().minimum_version is ssl.TLSVersion.TLSv1_3
