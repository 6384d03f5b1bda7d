"""Promises about peers that ask too much, too slowly or too often, on real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lclstream.security import http, limits
from lclstream.security.access import access_log, write_to
from lclstream.security.connections import PeerCertificateProtocol
from lclstream.security.limits import Limits, RouteLimits
from lclstream.security.rate import Rate, TokenBuckets

from .conftest import Running

#: Times that only matter where something is held up for longer than a busy machine does it.
LIMITS = Limits(
    body_bytes=1000,
    answer_s=30,
    stall_s=30,
    routes=(RouteLimits(path="/jobs/{jobid}/files", method="POST", body_bytes=10_000_000),),
)
#: For what is held up for ever, or has more time than the others.
IMPATIENT = Limits(answer_s=0.5, stall_s=0.5, routes=(RouteLimits(path="/patient", answer_s=30),))


def application() -> FastAPI:
    app = FastAPI()
    #: Somebody has asked for much.
    app.state.much = threading.Event()

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.post("/typed")
    async def typed(body: dict[str, Any]) -> int:
        return len(body)

    @app.post("/jobs/{jobid}/files")
    async def upload(jobid: str, files: list[UploadFile]) -> int:
        return sum([len(await file.read()) for file in files])

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(30)

    @app.get("/blocking")
    def blocking() -> None:
        time.sleep(4)

    @app.get("/patient")
    async def patient() -> str:
        await asyncio.sleep(3)
        return "done"

    @app.get("/tail")
    async def tail() -> StreamingResponse:
        async def lines() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b"line\n"
                await asyncio.sleep(1)

        return StreamingResponse(lines())

    @app.get("/much")
    async def much() -> StreamingResponse:
        async def data() -> AsyncIterator[bytes]:
            app.state.much.set()
            for _ in range(2000):
                yield bytes(100_000)

        return StreamingResponse(data())

    return app


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused body is read to its end however long that takes here."""
    monkeypatch.setattr(limits, "_LINGER_S", 60.0)


@pytest.fixture
def limited(serving: Callable[..., Running], lasting: None) -> Running:
    return serving(application(), limits=LIMITS)


@pytest.fixture
def impatient(serving: Callable[..., Running]) -> Running:
    return serving(application(), limits=IMPATIENT)


@pytest.fixture
def ada(limited: Running) -> Iterator[httpx.Client]:
    with http.client(limited.url, limited.site.member("ada")) as client:
        yield client


def answer_to(running: Running, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything the server says to these bytes, until it closes the connection."""
    with running.connect() as connection:
        connection.settimeout(20)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def test_a_body_within_the_limit_is_taken(ada: httpx.Client) -> None:
    assert ada.post("/echo", content=bytes(1000)).json() == 1000


@pytest.mark.parametrize("path", ["/echo", "/typed"])
def test_a_body_that_announces_too_much_is_refused_with_the_limit(ada: httpx.Client, path: str) -> None:
    answer = ada.post(path, content=bytes(1001))
    assert answer.status_code == 413
    assert "1001 bytes were announced, and at most 1000" in answer.json()["detail"]
    assert ada.post("/echo", content=b"x").json() == 1


@pytest.mark.parametrize("path", ["/echo", "/typed"])
def test_a_body_without_announced_length_is_refused_once_it_is_too_large(ada: httpx.Client, path: str) -> None:
    answer = ada.post(path, content=(bytes(600) for _ in range(5)))
    assert answer.status_code == 413
    assert "have arrived" in answer.json()["detail"]


def test_a_large_refused_upload_sees_the_answer_and_not_a_reset(ada: httpx.Client) -> None:
    answer = ada.post("/echo", content=bytes(30_000_000))
    assert answer.status_code == 413


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_peer_that_sends_everything_before_it_listens_hears_the_refusal(
    serving: Callable[..., Running], lasting: None, loop: str
) -> None:
    pytest.importorskip(loop)
    limited, size = serving(application(), limits=LIMITS, loop=loop), 20_000_000
    head = f"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode()
    with limited.connect() as connection:
        connection.sendall(head + bytes(size))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_route_can_take_more_than_the_others(ada: httpx.Client) -> None:
    files = {"files": ("a.bin", bytes(2_000_000))}
    assert ada.post("/jobs/1.2/files", files=files).json() == 2_000_000
    assert ada.post("/jobs/1.2/files", files={"files": ("a.bin", bytes(11_000_000))}).status_code == 413
    # Only that very route.
    assert ada.post("/jobs/1.2/files/more", files=files).status_code == 413


@pytest.mark.parametrize("path", ["/slow", "/blocking"])
def test_an_answer_that_does_not_begin_in_time_is_said_and_may_be_retried(impatient: Running, path: str) -> None:
    with http.client(impatient.url, impatient.site.member("ada")) as client:
        answer = client.get(path)
    assert answer.status_code == 503
    assert "no answer within 0.5 s" in answer.json()["detail"]


def test_a_route_can_take_longer_than_the_others(impatient: Running) -> None:
    with http.client(impatient.url, impatient.site.member("ada")) as client:
        assert client.get("/patient").json() == "done"


def test_an_answer_that_has_begun_may_take_its_time(serving: Callable[..., Running]) -> None:
    running = serving(application(), limits=Limits(answer_s=3))
    with http.client(running.url, running.site.member("ada")) as client:
        assert client.get("/tail").text == "line\n" * 4


def test_a_body_that_stops_in_the_middle_is_cut_off(impatient: Running) -> None:
    answer = answer_to(impatient, b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
    assert answer.startswith(b"HTTP/1.1 408") or answer.startswith(b"HTTP/1.1 503")


def test_a_stalled_body_is_a_408_when_there_is_time_for_an_answer(serving: Callable[..., Running]) -> None:
    running = serving(application(), limits=Limits(stall_s=0.3, answer_s=20))
    for path in (b"/echo", b"/typed"):
        head = (
            b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
        )
        answer = answer_to(running, head + b"{")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"nothing of the body arrived for 0.3 s" in answer


def test_a_peer_that_does_not_take_its_answer_is_hung_up_on(
    serving: Callable[..., Running], wait_until: Callable[..., None]
) -> None:
    app = application()
    running = serving(app, limits=IMPATIENT)
    with running.connect() as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_until(app.state.much.is_set, 60, "request under way")
        wait_until(lambda: not running.server.server_state.tasks, 60, "end of the request")
        wait_until(lambda: not running.server.server_state.connections, 60, "end of the connection")


def test_a_service_without_limits_takes_what_comes(serving: Callable[..., Running]) -> None:
    running = serving(application())
    with http.client(running.url, running.site.member("ada")) as client:
        assert client.post("/echo", content=bytes(20_000_000)).json() == 20_000_000
        assert client.get("/patient").json() == "done"
        for _ in range(50):
            assert client.post("/echo", content=b"x").status_code == 200


def test_one_identity_that_asks_too_often_is_told_when_to_come_back_and_others_are_served(
    serving: Callable[..., Running],
) -> None:
    running = serving(application(), limits=Limits(rate=Rate(per_s=0.01, burst=3)))
    with http.client(running.url, running.site.member("ada")) as client:
        codes = [client.post("/echo", content=b"x").status_code for _ in range(3)]
        refused = client.post("/echo", content=b"x")
    assert codes == [200, 200, 200]
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 100
    assert "rule: rate" in refused.json()["detail"]
    with http.client(running.url, running.site.member("bob")) as client:
        assert client.post("/echo", content=b"x").status_code == 200


# --- connections


@pytest.fixture
def hasty(serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setattr(PeerCertificateProtocol, "head_s", 2.0)
    return serving(application(), handshake_s=2.0)


def test_a_peer_that_does_not_shake_hands_is_cut_off(hasty: Running) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
        assert connection.recv(1) == b""


def test_bytes_that_are_no_tls_do_not_disturb_the_server(hasty: Running) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01\xff\xff" + bytes(100)):
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
            connection.sendall(noise)
            try:
                while connection.recv(1000):
                    pass
            except ConnectionResetError:
                pass
    with http.client(hasty.url, hasty.site.member("ada")) as client:
        assert client.post("/echo", content=b"x").json() == 1


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET /patient HTTP/1.1\r\nhost: x\r\nx-drip: "])
def test_a_request_head_that_does_not_arrive_is_cut_off(hasty: Running, begun: bytes) -> None:
    assert answer_to(hasty, begun) == b""


def test_a_head_that_drips_is_cut_off(hasty: Running) -> None:
    with hasty.connect() as connection, pytest.raises(OSError):  # noqa: PT012
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for number in range(300):
            connection.sendall(f"x-{number}: y\r\n".encode())
            time.sleep(0.1)


def test_the_second_head_on_a_connection_has_a_time_limit_too(hasty: Running) -> None:
    first = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx"
    # Without the limit, or with that of an idle connection, the server would not close it in time for us.
    assert answer_to(hasty, first, b"GET /sl", pause=0.2).startswith(b"HTTP/1.1 200")


def test_an_answer_slower_than_the_heads_time_limit_is_not_cut(hasty: Running) -> None:
    with http.client(hasty.url, hasty.site.member("ada")) as client:
        assert client.get("/patient").json() == "done"


def test_a_head_that_is_too_large_is_refused(hasty: Running) -> None:
    answer = answer_to(hasty, b"GET / HTTP/1.1\r\nhost: x\r\nx-large: " + b"y" * 40_000)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


def test_an_idle_connection_is_closed_in_the_end(serving: Callable[..., Running]) -> None:
    running = serving(application())
    running.server.config.timeout_keep_alive = 1
    request = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx"
    assert answer_to(running, request).startswith(b"HTTP/1.1 200")


def test_a_handshake_under_way_does_not_delay_the_stop(serving: Callable[..., Running]) -> None:
    # Longer than the stop is waited for.
    running = serving(application(), handshake_s=100.0)
    with socket.create_connection(("127.0.0.1", running.port), timeout=30):
        running.stop()


def test_two_servers_cannot_have_one_port(serving: Callable[..., Running]) -> None:
    from lclstream.security.server import server_for

    running = serving(application())
    second = server_for(application(), host="127.0.0.1", port=running.port, credentials=running.credentials)
    with pytest.raises(OSError, match="in use"):
        asyncio.run(second.serve())


# --- the access log


def test_the_access_log_has_the_fields_of_certified_and_never_a_query(
    limited: Running, ada: httpx.Client, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., None]
) -> None:
    with caplog.at_level(logging.INFO, "lclstream.access"):
        ada.get("/nothing?token=secret", headers={"user-agent": "x" * 1000})
        wait_until(lambda: any(r.name == "lclstream.access" for r in caplog.records), 60, "log line")
    text = next(r.message for r in caplog.records if r.name == "lclstream.access")
    assert "secret" not in text
    entry = json.loads(text)
    assert entry["type"] == "access"
    assert entry["message"] == "GET /nothing"
    assert entry["remote_user"] == {"commonName": "ada", "userId": "ada"}
    assert (entry["statusCode"], entry["method"], entry["path"]) == (404, "GET", "/nothing")
    assert (entry["remote_addr"], entry["httpVersion"]) == ("127.0.0.1", "1.1")
    assert entry["ssl_cipher"].startswith("TLS_")
    assert len(entry["user-agent"]) == 200
    assert {"name", "pid", "uptime", "level", "timestamp", "host", "accept", "process_time"} <= set(entry)


def test_a_refusal_is_in_the_access_log_with_its_reason(
    limited: Running, ada: httpx.Client, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., None]
) -> None:
    with caplog.at_level(logging.INFO, "lclstream.access"):
        ada.post("/echo", content=bytes(2000))
        wait_until(lambda: any(r.name == "lclstream.access" for r in caplog.records), 60, "log line")
    entry = json.loads(next(r.message for r in caplog.records if r.name == "lclstream.access"))
    assert entry["status"] == 413
    assert "rule: body_bytes" in entry["refusal"]


def test_the_access_log_can_have_a_file_of_its_own_that_may_be_rotated(
    limited: Running, ada: httpx.Client, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    file = tmp_path / "access.jsonl"
    try:
        write_to(file)
        ada.post("/echo", content=b"x")
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), 60, "log line")
        file.rename(tmp_path / "access.jsonl.1")
        ada.get("/nothing")
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), 60, "log line")
    finally:
        for handler in list(access_log.handlers):
            access_log.removeHandler(handler)
            handler.close()
        access_log.propagate = True
    assert json.loads((tmp_path / "access.jsonl.1").read_text())["path"] == "/echo"
    assert json.loads(file.read_text())["path"] == "/nothing"


def test_a_forwarded_address_is_not_believed(
    limited: Running, ada: httpx.Client, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., None]
) -> None:
    with caplog.at_level(logging.INFO, "lclstream.access"):
        ada.get("/nothing", headers={"x-forwarded-for": "6.6.6.6", "x-forwarded-proto": "http"})
        wait_until(lambda: any(r.name == "lclstream.access" for r in caplog.records), 60, "log line")
    assert "6.6.6.6" not in caplog.text


# --- token buckets


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    now = 100.0
    buckets = TokenBuckets(Rate(per_s=2, burst=3), clock=lambda: now)
    assert [buckets.take("ada") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("bob") == 0
    now += 0.5
    assert buckets.take("ada") == 0
    assert buckets.take("ada") > 0


@settings(max_examples=100, deadline=None)
@given(pauses=st.lists(st.floats(0, 3), max_size=60), per_s=st.floats(0.1, 10), burst=st.integers(1, 10))
def test_no_pattern_of_asking_gets_more_than_burst_and_rate(pauses: list[float], per_s: float, burst: int) -> None:
    now = 0.0
    buckets = TokenBuckets(Rate(per_s=per_s, burst=burst), clock=lambda: now)
    served = 0
    for pause in pauses:
        now += pause
        served += buckets.take("ada") == 0
    assert served <= burst + now * per_s + 1e-6


def test_callers_that_have_gone_are_forgotten() -> None:
    now = 0.0
    buckets = TokenBuckets(Rate(per_s=1, burst=1), clock=lambda: now)
    for number in range(30_000):
        buckets.take(number)
        now += 0.001
    assert len(buckets) <= 10_001


@pytest.mark.parametrize(
    "wrong",
    [{"body_bytes": -1}, {"answer_s": 0}, {"rate": {"per_s": 0, "burst": 1}}, {"routes": [{"path": "x"}]}, {"x": 1}],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(wrong)
