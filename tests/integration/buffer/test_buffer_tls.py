"""Encrypted data sockets: mutual TLS, and nobody without a certificate of ours."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time

import pynng
import pytest

pytestmark = pytest.mark.integration

TLS_ENDS = {"in": ["tls+tcp://127.0.0.1:0"], "out": ["tls+tcp://127.0.0.1:0"]}


def _options(member, **more):
    return {"tls": {key: str(member[key]) for key in ("certificate", "key", "ca")}, **more}


def _context(member) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(member["ca"]))
    context.load_cert_chain(member["certificate"], member["key"])
    return context


def _pynng_tls(member) -> pynng.TLSConfig:
    return pynng.TLSConfig(
        pynng.TLSConfig.MODE_CLIENT,
        server_name="localhost",
        cert_key_file=str(member["both"]),
        ca_files=[str(member["ca"])],
    )


def _connect(url: str, context: ssl.SSLContext, greeting: bytes) -> ssl.SSLSocket:
    port = int(url.rpartition(":")[2])
    plain = socket.create_connection(("127.0.0.1", port), timeout=30)
    try:
        sock = context.wrap_socket(plain, server_hostname="127.0.0.1")
    except OSError:
        plain.close()
        raise
    try:
        sock.sendall(greeting)
        assert len(sock.recv(8)) == 8
    except BaseException:
        sock.close()
        raise
    return sock


def test_libnng_with_mbed_tls_on_both_sides(run_buffer, nng, collect, authority, drained):
    running = run_buffer(**TLS_ENDS, **_options(authority.member("buffer")))
    client = _pynng_tls(authority.member("peer"))
    pull = nng(pynng.Pull0, tls_config=client, recv_timeout=200)
    pull.dial(running.out.replace("127.0.0.1", "localhost"))
    push = nng(pynng.Push0, tls_config=client)
    push.dial(running.inp.replace("127.0.0.1", "localhost"))
    collector = collect(pull.recv)
    messages = [os.urandom(1 + number * 3001) for number in range(200)]
    for message in messages:
        push.send(message)
    drained(running, len(messages))
    push.close()
    assert running.wait() == "done"
    assert collector.finish(len(messages)) == messages
    assert {peer["subject"] for peer in running.status()["peers"]} == {"peer"}


def test_a_certificate_that_libnng_cannot_use_is_explained(run_buffer, nng, authority, wait_until):
    running = run_buffer(**TLS_ENDS, **_options(authority.member("ed", ed25519_key=True)))
    push = nng(pynng.Push0, tls_config=_pynng_tls(authority.member("peer")))
    with pytest.raises(pynng.exceptions.NNGException):
        push.dial(running.inp.replace("127.0.0.1", "localhost"), block=True)
    wait_until(lambda: running.status()["refused"] > 0, 60, "the refusal")
    assert "a certificate with a P-256 key" in running.status()["last_refusal"]


def test_stacked_buffers_speak_tls_to_each_other(run_buffer, authority, zmq_push, zmq_pull, collect):
    options = _options(authority.member("buffer"))
    last = run_buffer(**{"in": TLS_ENDS["in"]}, **options, sentinel=1)
    middle = run_buffer(**{"in": TLS_ENDS["in"], "out": ["dial+" + last.inp]}, **options)
    first = run_buffer(**{"out": ["dial+" + middle.inp]}, **options)
    collector = collect(zmq_pull(last.out).recv, sentinel=True)
    push = zmq_push(first.inp)
    messages = [os.urandom(number * 5000) or b"x" for number in range(150)]
    for message in messages:
        push.send(message)
    push.close()
    assert [each.wait() for each in (first, middle, last)] == ["done"] * 3
    assert collector.finish() == messages


def test_nobody_comes_in_without_a_certificate_of_ours(
    run_buffer, authority, other_authority, wait_until, push_greeting, sp
):
    running = run_buffer(**{"in": TLS_ENDS["in"]}, **_options(authority.member("buffer")))
    nobody = ssl.create_default_context(cafile=str(authority.ca))
    stranger = ssl.create_default_context(cafile=str(authority.ca))
    theirs = other_authority.member("stranger")
    stranger.load_cert_chain(theirs["certificate"], theirs["key"])
    for number, context in enumerate((nobody, stranger), 1):
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            _connect(running.inp, context, push_greeting)
        wait_until(lambda number=number: running.status()["refused"] == number, 60, "refusal")
    with socket.create_connection(("127.0.0.1", int(running.inp.rpartition(":")[2])), timeout=30) as plain:
        plain.sendall(push_greeting + sp(b"secret"))
        wait_until(lambda: running.status()["refused"] == 3, 60, "refusal")
    assert running.status()["producers_seen"] == 0
    with _connect(running.inp, _context(authority.member("friend")), push_greeting) as friend:
        friend.sendall(sp(b"hello"))
        wait_until(lambda: running.amounts()[0] == 1, 60, "message")


def test_a_dialling_buffer_refuses_a_server_of_another_authority(run_buffer, authority, other_authority, wait_until):
    theirs = run_buffer(**{"out": TLS_ENDS["out"]}, **_options(other_authority.member("theirs")))
    ours = run_buffer(**{"in": ["dial+" + theirs.out]}, **_options(authority.member("ours")))
    wait_until(lambda: "certificate verify failed" in (ours.status()["last_refusal"] or ""), 60, "refusal")
    assert ours.status()["producers_seen"] == 0


def test_a_tls_handshake_that_stops_holds_nobody_up(run_buffer, authority, monkeypatch, push_greeting, sp, wait_until):
    monkeypatch.setattr("nngstream.connections.HANDSHAKE_S", 2.0)
    running = run_buffer(**{"in": TLS_ENDS["in"]}, **_options(authority.member("buffer")))
    slow = [socket.create_connection(("127.0.0.1", int(running.inp.rpartition(":")[2]))) for _ in range(5)]
    with _connect(running.inp, _context(authority.member("friend")), push_greeting) as friend:
        friend.sendall(sp(b"hello"))
        wait_until(lambda: running.amounts()[0] == 1, 60, "message")
        wait_until(lambda: running.status()["refused"] == 5, 60, "refusals")
    for sock in slow:
        sock.close()


@pytest.mark.parametrize("size", [1000, 300_000])
def test_an_encrypted_consumer_that_dies_costs_little_and_nothing_comes_twice(
    run_buffer, authority, raw, push_greeting, pull_greeting, sp, collect, zmq_pull, size, wait_until, tmp_path
):
    running = run_buffer(
        **{"out": ["tls+tcp://127.0.0.1:0", f"ipc://{tmp_path}/out"]},
        **_options(authority.member("buffer"), sentinel=1, send_buffer="64KiB"),
    )
    consumer = _connect(running.out, _context(authority.member("consumer")), pull_greeting)
    producer = raw(running.inp, push_greeting)
    count = 60_000_000 // size // (1 if size > 100_000 else 10)
    thread = threading.Thread(
        target=lambda: [producer.sendall(sp(struct.pack(">Q", number) + bytes(size))) for number in range(count)]
    )
    thread.start()
    first = []
    with consumer.makefile("rb") as stream:
        for _ in range(10):
            (length,) = struct.unpack(">Q", stream.read(8))
            first.append(int.from_bytes(stream.read(length)[:8], "big"))
        time.sleep(0.3)  # the pipe to the consumer fills
        consumer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    consumer.close()
    collector = collect(zmq_pull(running.buffer.outputs[1]).recv, sentinel=True)
    thread.join(60)
    producer.close()
    assert running.wait() == "done"
    second = [int.from_bytes(message[:8], "big") for message in collector.finish()]
    assert not set(first) & set(second)
    assert len(set(second)) == len(second)
    received, sent, _, lost = running.amounts()
    assert received == count == sent + lost
    assert sent >= len(first) + len(second)


def test_a_key_that_others_can_read_is_refused(run_buffer, authority):
    member = authority.member("careless")
    member["key"].chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        run_buffer(**TLS_ENDS, **_options(member))
