"""The engine's encrypted sockets against the real buffer and libnng: certificates on both sides, or nothing moves."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pynng
import pytest

from lclstream.client import NoPeerError, StreamError, WrongPeerError, pull, push
from lclstreamer import models
from lclstreamer.errors import ConfigurationError, HandlerError
from lclstreamer.events import Message
from lclstreamer.handlers.base import HandlerContext
from lclstreamer.handlers.streaming import BinaryDataStreamingDataHandler

pytestmark = pytest.mark.integration

#: Sizes around a frame header, one TLS write, and several of them.
SIZES = (1, 200, 300, 65_000, 66_000, 262_144, 3_000_000, 5_000_001)
ENDS = {"in": ["tls+tcp://127.0.0.1:0"], "out": ["tls+tcp://127.0.0.1:0"]}


def files(member: dict[str, Any]) -> dict[str, str]:
    return {key: str(member[key]) for key in ("certificate", "key", "ca")}


def context(member: dict[str, Any], *, server: bool = False) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if server:
        made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(member["certificate"], member["key"])
    made.load_verify_locations(member["ca"])
    return made


@contextmanager
def engine(**options: Any) -> Iterator[BinaryDataStreamingDataHandler]:
    """The engine's handler, ended by its user or, after a failure, here."""
    settings = models.BinaryDataStreamingDataHandler(
        **{"type": "BinaryDataStreamingDataHandler", "role": "client", "connect_timeout_s": 20, **options}
    )
    handler = BinaryDataStreamingDataHandler(settings, HandlerContext(0, 1, threading.Event()))
    try:
        handler.open()
        yield handler
    finally:
        with suppress(HandlerError):
            handler.close(drain=False, timeout=1)


def send(handler: BinaryDataStreamingDataHandler, contents: list[bytes]) -> None:
    for content in contents:
        handler.handle(Message([content[:3], content[3:]], events=1))
    handler.close(drain=True, timeout=30)


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_every_message_goes_encrypted_through_the_buffer_to_our_reader(
    library: str, run_buffer: Callable[..., Any], authority: Any
) -> None:
    running = run_buffer(**ENDS, tls=files(authority.member("buffer")))
    contents = [os.urandom(size) for size in SIZES]
    received: list[bytes] = []
    url = running.out

    def read() -> None:
        with pull(url, tls=context(authority.member("reader")), timeout_s=30) as stream:
            received.extend(stream)

    reader = threading.Thread(target=read)
    reader.start()
    with engine(urls=[running.inp], library=library, tls=files(authority.member("engine"))) as handler:
        send(handler, contents)
    assert running.wait() == "done"
    reader.join(60)
    assert received == contents
    peers = {(peer["subject"], peer["protocol"]) for peer in running.status()["peers"]}
    assert peers == {("engine", library), ("reader", "nng")}


@pytest.mark.parametrize("role", ["client", "server"])
def test_libnng_takes_every_message_with_p256_certificates(
    role: str, nng: Callable[..., Any], authority: Any, collect: Callable[..., Any], free_port: Callable[[], int]
) -> None:
    member = authority.member(f"sink-{role}")
    listens = role == "client"
    tls = pynng.TLSConfig(
        pynng.TLSConfig.MODE_SERVER if listens else pynng.TLSConfig.MODE_CLIENT,
        server_name=None if listens else "localhost",
        cert_key_file=str(member["both"]),
        ca_files=[str(member["ca"])],
        auth_mode=pynng.TLSConfig.AUTH_MODE_REQUIRED,
    )
    sink = nng(pynng.Pull0, tls_config=tls, recv_timeout=200, recv_max_size=0)
    url = f"tls+tcp://localhost:{free_port()}"
    if listens:
        sink.listen(url.replace("localhost", "127.0.0.1"))
    contents = [os.urandom(size) for size in SIZES]
    collector = collect(sink.recv, count=len(contents))
    with engine(urls=[url], role=role, library="nng", tls=files(authority.member("engine"))) as handler:
        if not listens:
            sink.dial(url)
        send(handler, contents)
    assert collector.finish() == contents


def test_a_full_sink_holds_the_engine_back_and_nothing_is_lost(
    run_buffer: Callable[..., Any], authority: Any, wait_until: Callable[..., None]
) -> None:
    running = run_buffer(**ENDS, tls=files(authority.member("buffer")), capacity="8MiB")
    contents = [os.urandom(1_000_000) for _ in range(40)]
    received: list[bytes] = []
    with engine(urls=[running.inp], library="nng", tls=files(authority.member("engine"))) as handler:
        sender = threading.Thread(target=send, args=(handler, contents))
        sender.start()
        wait_until(lambda: running.status()["held"]["bytes"] > 6_000_000, 60, "a full buffer")
        assert sender.is_alive()
        with pull(running.out, tls=context(authority.member("reader")), timeout_s=30) as stream:
            received.extend(stream)
        sender.join(60)
    assert received == contents


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_a_foreign_certificate_ends_the_engine_at_once_with_the_reason(
    library: str, run_buffer: Callable[..., Any], authority: Any, other_authority: Any, wait_until: Callable[..., None]
) -> None:
    running = run_buffer(**{"in": ENDS["in"]}, tls=files(authority.member("buffer")))
    foreign = {**files(other_authority.member("foreign")), "ca": str(authority.ca)}
    with (
        engine(urls=[running.inp], library=library, tls=foreign) as handler,
        pytest.raises(HandlerError, match=r"sink refuses our certificate.*ALERT"),
    ):
        until_refused(handler)
    wait_until(lambda: running.status()["refused"] >= 1, 60, "refusal")
    assert running.status()["producers_seen"] == 0


def until_refused(handler: BinaryDataStreamingDataHandler) -> None:
    for _ in range(1000):
        handler.handle(Message([b"secret"], events=1))
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("issuer", r"certificate is not accepted: "),
        ("host", r"not accepted: IP address mismatch"),
    ],
)
def test_the_engine_sends_nothing_to_a_sink_it_cannot_verify(
    what: str, told: str, run_buffer: Callable[..., Any], authority: Any, other_authority: Any
) -> None:
    # The certificates carry 127.0.0.1, and not 127.0.0.2.
    host = "127.0.0.2" if what == "host" else "127.0.0.1"
    running = run_buffer(**{"in": [f"tls+tcp://{host}:0"]}, tls=files(authority.member("buffer")))
    tls = files(authority.member("engine"))
    if what == "issuer":
        tls["ca"] = str(other_authority.ca)
    with (
        engine(urls=[running.inp], library="nng", tls=tls) as handler,
        pytest.raises(HandlerError, match=told),
    ):
        until_refused(handler)
    assert running.status()["producers_seen"] == 0


def test_an_engine_that_listens_gives_nothing_to_strangers_and_all_to_its_own(
    authority: Any, other_authority: Any, free_port: Callable[[], int]
) -> None:
    url = f"tls+tcp://127.0.0.1:{free_port()}"
    nobody = ssl.create_default_context(cafile=str(authority.ca))
    stranger = context({**other_authority.member("stranger"), "ca": authority.ca})
    with engine(urls=[url], role="server", library="nng", tls=files(authority.member("engine"))) as handler:
        for tls, told in ((nobody, "CERTIFICATE_REQUIRED"), (stranger, "ALERT")):
            with pytest.raises(WrongPeerError, match=f"refuses our certificate.*{told}"):
                pull(url, tls=tls, connect_timeout_s=10).open()
        received: list[bytes] = []
        with pull(url, tls=context(authority.member("reader")), timeout_s=30) as stream:
            reader = threading.Thread(target=lambda: received.extend(stream))
            reader.start()
            send(handler, [b"only for us", b"and this"])
            reader.join(60)
    assert received == [b"only for us", b"and this"]


def test_a_consumer_with_a_foreign_certificate_gets_nothing_and_is_told_why(
    run_buffer: Callable[..., Any], authority: Any, other_authority: Any
) -> None:
    running = run_buffer(**ENDS, tls=files(authority.member("buffer")))
    with push(running.inp, tls=context(authority.member("producer"))) as stream:
        stream.send(b"secret")
        foreign = context({**other_authority.member("foreign"), "ca": authority.ca})
        with pytest.raises(WrongPeerError, match=r"refuses our certificate.*our issuer must be"):
            pull(running.out, tls=foreign, connect_timeout_s=10).open()
        unknown = context({**authority.member("ours"), "ca": other_authority.ca})
        with pytest.raises(WrongPeerError, match="we do not accept its certificate"):
            pull(running.out, tls=unknown, connect_timeout_s=10).open()
        assert running.status()["consumers_seen"] == 0
        with pull(running.out, tls=context(authority.member("ours"))) as mine:
            assert mine.receive() == b"secret"


def test_a_sink_that_speaks_no_tls_is_told_as_such(authority: Any, run_buffer: Callable[..., Any]) -> None:
    running = run_buffer()
    url = running.inp.replace("tcp://", "tls+tcp://")
    with (
        engine(urls=[url], library="nng", tls=files(authority.member("engine")), connect_timeout_s=2) as handler,
        pytest.raises(HandlerError, match=r"no sink is there.*(TLS|reset)"),
    ):
        until_refused(handler)
    with pytest.raises((NoPeerError, StreamError)):
        pull(url, tls=context(authority.member("reader")), connect_timeout_s=0.5).open()


def test_missing_and_open_files_are_told_before_anything_starts(authority: Any, tmp_path: Any) -> None:
    member = files(authority.member("careless"))
    url = ["tls+tcp://127.0.0.1:1"]
    loose = tmp_path / "loose.key"
    loose.write_bytes(Path(member["key"]).read_bytes())
    loose.chmod(0o644)
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    for wrong, told in (
        ({"certificate": str(tmp_path / "none.crt")}, r"tls\.certificate: .*none\.crt is no file"),
        ({"key": str(loose)}, r"tls\.key: .* has mode 0644.*chmod 600"),
        ({"certificate": str(rubbish)}, r"tls\.certificate: .*rubbish\.pem with .* is no certificate"),
        ({"ca": str(rubbish)}, r"tls\.ca: .*rubbish\.pem holds no certificate"),
    ):
        with pytest.raises(ConfigurationError, match=told), engine(urls=url, tls={**member, **wrong}):
            pass
