"""Promises of a server of ours towards whatever bytes arrive, over real TLS connections."""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import Depends, FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from lclstream.security import http
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.limits import Limits, RouteLimits
from lclstream.security.rate import Rate
from lclstream.security.roles import Action, Person, Roles
from lclstream.security.server import peer_identity, server_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


class Thing(BaseModel):
    name: str = Field(max_length=50)
    size: int = Field(ge=0, le=1 << 62)


def application() -> FastAPI:
    """A service as ours are: typed bodies, identity from the certificate, rulings by roles."""
    app = FastAPI(responses={code: {"description": "refused"} for code in (401, 403, 408, 413, 429, 503)})
    things: dict[str, Person] = {}
    roles = Roles()

    @app.get("/who")
    def who(peer: Identity = Depends(peer_identity)) -> Identity:  # noqa: B008
        return peer

    @app.post("/things")
    def make(thing: Thing, peer: Identity = Depends(peer_identity)) -> Thing:  # noqa: B008
        things[thing.name] = Person.of(peer)
        return thing

    @app.get("/things")
    def see(peer: Identity = Depends(peer_identity)) -> list[str]:  # noqa: B008
        return [name for name, owner in things.items() if roles.may(peer, Action.see, owner=owner)]

    return app


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteAuthority:
    return SiteAuthority(tmp_path_factory.mktemp("hostile") / "home", "home")


@pytest.fixture(scope="module")
def port(site: SiteAuthority, wait_until: Callable[..., None]) -> Iterator[int]:
    limits = Limits(
        body_bytes=2000,
        stall_s=10.0,
        answer_s=60.0,
        rate=Rate(per_s=1000, burst=1000),
        routes=(RouteLimits(path="/things", method="POST", body_bytes=4000),),
    )
    server = server_for(
        application(), host="127.0.0.1", port=0, credentials=site.member("service"), limits=limits, handshake_s=6.0
    )
    failures = _Failures()
    logging.getLogger().addHandler(failures)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, what="start of the server")
    yield int(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(60)
    logging.getLogger().removeHandler(failures)
    assert not thread.is_alive()
    assert failures.texts == []


class _Failures(logging.Handler):
    """Everything a server logs when something of its own went wrong."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


def served(port: int, member: Credentials) -> bool:
    with http.client(f"https://127.0.0.1:{port}", member) as client:
        return client.get("/who").status_code == 200


def said(port: int, member: Credentials, data: bytes) -> bytes:
    """What the server answers to these bytes until it closes, or has been quiet for a moment."""
    context = member.client_context(f"https://127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:  # noqa: SIM117
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            answer = b""
            try:
                connection.sendall(data)
                connection.settimeout(0.05)
                while piece := connection.recv(65536):
                    answer += piece
            except (TimeoutError, ssl.SSLError, ConnectionError):
                pass
            return answer


_HEADS = st.builds(
    lambda method, path, version, headers, body: (
        f"{method} {path} HTTP/{version}\r\n".encode()
        + b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        + b"\r\n"
        + body
    ),
    st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "CONNECT", "TRACE", "X", "get"]),
    st.sampled_from(["/who", "/things", "*", "//", "/..%2f..", "/%00", "/\x7f", "http://x/who", "/" + "a" * 3000]),
    st.sampled_from(["1.1", "1.0", "2.0", "9"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"host", b"content-length", b"transfer-encoding", b"expect", b"connection", b"upgrade",
                    b"x-forwarded-for", b"content-type", b"authorization", b"\x00", b"",
                ]
            ),
            st.sampled_from(
                [
                    b"x", b"0", b"5", b"-1", b"99999999999999999999", b"5, 6", b"chunked", b"gzip, chunked",
                    b"100-continue", b"close", b"upgrade", b"websocket", b"h2c", b"application/json", b"\xff\xfe",
                ]
            ),
        ),
        max_size=5,
    ),
    st.sampled_from([b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"{}", b"[" * 3000])
    | st.binary(max_size=60),
)  # fmt: skip


@settings(
    max_examples=120,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.binary(max_size=200) | _HEADS)
def test_no_bytes_make_the_server_fail(port: int, site: SiteAuthority, data: bytes) -> None:
    answer = said(port, site.member("ada"), data)
    for line in answer.split(b"\r\n"):
        assert not line.startswith(b"HTTP/1.1 500")


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.binary(max_size=100) | st.binary(max_size=50).map(lambda tail: b"\x16\x03\x01\x00\x30\x01\x00" + tail))
def test_no_bytes_before_tls_make_the_server_fail(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        raw.sendall(data)


def test_it_still_serves_after_noise(port: int, site: SiteAuthority) -> None:
    for noise in (b"\x00" * 100, b"GET / HTTP/1.1\r\n" * 100, b"POST /things HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"):
        said(port, site.member("ada"), noise)
    assert served(port, site.member("ada"))


def test_many_peers_that_stall_do_not_keep_others_from_being_served(port: int, site: SiteAuthority) -> None:
    stalled = []
    try:
        for _ in range(100):
            stalled.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: served(port, site.member("ada")), range(8)))
        # All of them are cut off by the handshake's time limit.
        for peer in stalled:
            peer.settimeout(60)
            assert peer.recv(1) == b""
    finally:
        for peer in stalled:
            peer.close()


def test_no_request_of_the_description_makes_the_service_fail(port: int, site: SiteAuthority) -> None:
    url, member = f"https://127.0.0.1:{port}", site.member("ada")
    with http.client(url, member) as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    tls = {"cert": (str(member.certificate), str(member.key)), "verify": str(member.folder / "known_servers/org.crt")}
    for offered in schema.get_all_operations():
        strategy = offered.ok().as_strategy()

        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def send(case: Any) -> None:
            response = case.call(base_url=url, **tls)
            assert response.status_code < 500, f"{case.as_curl_command()} answered {response.status_code}"

        send()


def test_clients_without_or_with_a_strange_certificate_never_reach_the_service(
    port: int, site: SiteAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = SiteAuthority(tmp_path / "away", "home").member("ada")  # the same names, another key
    shutil.copy(site.member("service").folder / "known_servers/org.crt", stranger.folder / "known_servers/home.crt")
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.load_verify_locations(cadata=site.certificate_pem.decode())
    with caplog.at_level("INFO", "lclstream.access"):
        for context in (naked, stranger.client_context(f"https://127.0.0.1:{port}")):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
                try:
                    with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
                        connection.sendall(b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n")
                        assert connection.recv(100) == b""
                except (ssl.SSLError, ConnectionError):
                    pass
    assert "GET /who" not in caplog.text
