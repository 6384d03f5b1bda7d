"""Lists of who may push and pull: a certificate of a trusted issuer is not enough when the side has a list."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl

import pynng
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lclstream.security.identity import Identity
from nngstream import access
from nngstream.errors import WireError
from nngstream.peers import DENIED
from nngstream.status import metrics

pytestmark = pytest.mark.integration

ENDS = {"in": ["tls+tcp://127.0.0.1:0"], "out": ["tls+tcp://127.0.0.1:0"]}
AUTHORITY = "CN=authority"


def options(member, **lists):
    return {"tls": {**{key: str(member[key]) for key in ("certificate", "key", "ca")}, **lists}}


def what_it_gets(url: str, member, greeting: bytes) -> bytes:
    """Everything the buffer sends to a peer that does all it can to be served, until the buffer closes."""
    context = ssl.create_default_context(cafile=str(member["ca"]))
    context.load_cert_chain(member["certificate"], member["key"])
    received = b""
    with (
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        try:
            sock.sendall(greeting)
            while piece := sock.recv(4096):
                received += piece
        except ConnectionError:
            pass
    return received


def dialled(nng, kind, url: str, member):
    files = pynng.TLSConfig(
        pynng.TLSConfig.MODE_CLIENT,
        server_name="localhost",
        cert_key_file=str(member["both"]),
        ca_files=[str(member["ca"])],
    )
    peer = nng(kind, tls_config=files, recv_timeout=200)
    peer.dial(url.replace("127.0.0.1", "localhost"))
    return peer


def test_a_foreign_login_is_turned_away_from_both_sides_and_those_named_get_and_give_everything(
    run_buffer, nng, collect, authority, drained, push_greeting, pull_greeting, sp, caplog
):
    caplog.set_level(logging.WARNING, logger="nngstream")
    lists = {"producers": [f"engine@{AUTHORITY}"], "consumers": ["alice", {"login": "bob", "issuer": AUTHORITY}]}
    running = run_buffer(**ENDS, **options(authority.member("buffer"), **lists))
    producer = dialled(nng, pynng.Push0, running.inp, authority.member("engine"))
    messages = [os.urandom(1 + number * 3001) for number in range(50)]
    for message in messages[:2]:
        producer.send(message)
    # Messages are there to be had, and nobody to take them but those who may not.
    assert what_it_gets(running.out, authority.member("mallory"), pull_greeting) == b""
    assert what_it_gets(running.out, authority.member("engine"), pull_greeting) == b""
    assert what_it_gets(running.inp, authority.member("mallory"), push_greeting + sp(b"forged")) == b""
    assert what_it_gets(running.inp, authority.member("alice"), push_greeting + sp(b"forged")) == b""

    collector = collect(dialled(nng, pynng.Pull0, running.out, authority.member("alice")).recv)
    for message in messages[2:]:
        producer.send(message)
    drained(running, len(messages))
    producer.close()
    assert running.wait() == "done"
    assert collector.finish(len(messages)) == messages

    status = running.status()
    assert (status["denied"], status["refused"], status["producers_seen"], status["consumers_seen"]) == (4, 4, 1, 1)
    assert [(each["side"], each["login"], each["issuer"], each["rule"]) for each in status["turned_away"]] == [
        ("out", "mallory", AUTHORITY, "tls.consumers"),
        ("out", "engine", AUTHORITY, "tls.consumers"),
        ("in", "mallory", AUTHORITY, "tls.producers"),
        ("in", "alice", AUTHORITY, "tls.producers"),
    ]
    assert f"mallory, issued by {AUTHORITY}, may not pull here (rule: tls.consumers)" in caplog.text
    assert f"alice, issued by {AUTHORITY}, may not push here (rule: tls.producers)" in caplog.text
    assert 'nngstream_denied_connections_total{buffer="nngstream"} 4' in metrics(status)


def test_the_same_login_of_another_issuer_is_somebody_else(run_buffer, authority, pull_greeting):
    running = run_buffer(**ENDS, **options(authority.member("buffer"), consumers=["alice@CN=another authority"]))
    assert what_it_gets(running.out, authority.member("alice"), pull_greeting) == b""
    assert [(each["login"], each["issuer"]) for each in running.status()["turned_away"]] == [("alice", AUTHORITY)]


def test_a_side_without_a_list_is_open_to_whoever_the_issuers_vouch_for(
    run_buffer, nng, authority, wait_until, pull_greeting
):
    running = run_buffer(**ENDS, **options(authority.member("buffer"), producers=["engine"]))
    consumer = dialled(nng, pynng.Pull0, running.out, authority.member("anybody"))
    wait_until(lambda: running.status()["consumers"] == 1, 60, "the consumer")
    consumer.close()
    assert running.status()["denied"] == 0


def test_a_buffer_that_dials_gives_nothing_to_a_server_that_is_not_in_its_list(run_buffer, authority, wait_until):
    stranger = run_buffer(**{"in": ENDS["in"]}, **options(authority.member("mallory")))
    ours = run_buffer(
        **{"in": ENDS["in"], "out": ["dial+" + stranger.inp]},
        **options(authority.member("buffer"), consumers=["next-buffer"]),
    )
    wait_until(lambda: ours.status()["denied"] > 0, 60, "the refusal")
    assert ours.status()["turned_away"][0]["login"] == "mallory"
    assert stranger.status()["producers_seen"] == 0


def test_one_who_comes_again_and_again_does_not_fill_log_and_status(
    run_buffer, authority, pull_greeting, caplog, monkeypatch
):
    caplog.set_level(logging.WARNING, logger="nngstream")
    monkeypatch.setattr("nngstream.peers.DENIED", 1)
    running = run_buffer(**ENDS, **options(authority.member("buffer"), consumers=["alice"]))
    assert what_it_gets(running.out, authority.member("trent"), pull_greeting) == b""
    mallory = authority.member("mallory")
    for _ in range(7):
        what_it_gets(running.out, mallory, pull_greeting)
    assert running.status()["denied"] == 8
    assert [(each["login"], each["times"]) for each in running.status()["turned_away"]] == [("mallory", 7)]
    assert caplog.text.count("mallory, issued by") == 3  # the first, the second and the fourth time
    assert DENIED >= 100


@pytest.mark.parametrize(
    "subject",
    [
        [(NameOID.COMMON_NAME, "Ada Lovelace"), (NameOID.USER_ID, "ada")],
        [(NameOID.COMMON_NAME, "first"), (NameOID.COMMON_NAME, "second")],
        [(NameOID.USER_ID, "one"), (NameOID.USER_ID, "two"), (NameOID.ORGANIZATION_NAME, "o, \\ = \u00e9")],
        [(NameOID.ORGANIZATION_NAME, "nobody")],
    ],
)
def test_the_buffer_reads_the_same_login_and_issuer_from_a_certificate_as_the_services(subject):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    issuer = x509.Name(
        [x509.NameAttribute(NameOID.PSEUDONYM, "Signing"), x509.NameAttribute(NameOID.COMMON_NAME, "a,b")]
    )
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.DER)
    try:
        expected = Identity.of_certificate(certificate)
    except ValueError:
        with pytest.raises(WireError, match="names nobody"):
            access.identity(certificate)
    else:
        assert access.identity(certificate) == (expected.login, expected.issuer)
