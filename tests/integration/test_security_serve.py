"""Promises of `serve` as a process: signals, exit codes, the access log's file, certificates renewed under it."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certified import encode

from lclstream.security import http
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import UnreachableError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SERVICE = """
import asyncio, contextlib, logging, pathlib, sys
from fastapi import Depends, FastAPI
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.server import Limits, peer_identity, serve

logging.basicConfig(level=logging.INFO)
folder, port, log = sys.argv[1:4]

@contextlib.asynccontextmanager
async def lifespan(app):
    if "broken" in sys.argv:
        raise RuntimeError("cannot start")
    yield
    print("application stopped", flush=True)

app = FastAPI(lifespan=lifespan)

@app.get("/who")
def who(peer: Identity = Depends(peer_identity)) -> Identity:
    return peer

@app.get("/slow")
async def slow(seconds: float = 2) -> str:
    print("slow request", flush=True)
    await asyncio.sleep(seconds)
    return "done"

serve(app, host="127.0.0.1", port=int(port), credentials=Credentials(folder), limits=Limits(),
      access_log_file=pathlib.Path(log) if log != "-" else None)
"""


@pytest.fixture
def home(tmp_path: Path) -> SiteAuthority:
    return SiteAuthority(tmp_path / "home", "home")


@pytest.fixture
def run(home: SiteAuthority, start: Callable[..., Any], free_port: Callable[[], int]) -> Callable[..., Any]:
    def one(*words: str, log: str = "-", port: int | None = None) -> Any:
        port = port or free_port()
        folder = str(home.member("service").folder)
        child = start(sys.executable, "-c", SERVICE, folder, str(port), log, *words, name="service")
        child.url, child.port = f"https://127.0.0.1:{port}", port
        return child

    return one


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_with_0_after_the_request_under_way(
    run: Callable[..., Any], home: SiteAuthority, number: int
) -> None:
    service = run()
    service.wait_for_output("listening at")
    with http.client(service.url, home.member("ada")) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.get, "/slow")
        service.wait_for_output("slow request")
        service.signal(number)
        assert answer.result(60).json() == "done"
    assert service.wait() == 0
    assert "application stopped" in service.output()
    assert "Traceback" not in service.output()


def test_a_port_in_use_is_said_with_exit_code_3(run: Callable[..., Any]) -> None:
    first = run()
    first.wait_for_output("listening at")
    second = run(port=first.port)
    assert second.wait() == 3
    assert f"cannot listen at 127.0.0.1:{first.port}" in second.output()


def test_an_application_that_cannot_start_ends_with_exit_code_1(run: Callable[..., Any]) -> None:
    assert run("broken").wait() == 1


def test_the_access_log_goes_to_its_file_and_nowhere_else(
    run: Callable[..., Any], home: SiteAuthority, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    log = tmp_path / "access.jsonl"
    service = run(log=str(log))
    service.wait_for_output("listening at")
    with http.client(service.url, home.member("ada")) as client:
        client.get("/who")
    wait_until(lambda: log.read_text().endswith("\n"), 60, "log line")
    entry = json.loads(log.read_text())
    assert (entry["login"], entry["path"], entry["status"]) == ("ada", "/who", 200)
    assert "GET /who" not in service.output()


def test_a_service_goes_on_through_a_hundred_rotations(
    run: Callable[..., Any], home: SiteAuthority, tmp_path: Path
) -> None:
    """Certificate and key are replaced one after the other while connections come in, as a careless script does it."""
    service = run()
    service.wait_for_output("listening at")
    member = home.member("service")
    seen = set()
    for number in range(100):
        leaf = home._authority.leaf_cert(
            encode.person_name("service", uname="service"), encode.SAN(hosts=["localhost", "127.0.0.1"])
        )
        fresh = tmp_path / f"fresh-{number}"
        leaf.save(fresh)
        os.replace(fresh.with_suffix(".crt"), member.certificate)
        if number % 10 == 0:
            with http.client(service.url, home.member("ada")) as client:
                assert client.get("/who").status_code == 200
        os.replace(fresh.with_suffix(".key"), member.key)
        if number % 10 == 5:
            with http.client(service.url, home.member("ada")) as client:
                response = client.get("/who")
                stream = response.extensions["network_stream"]
                seen.add(stream.get_extra_info("ssl_object").getpeercert()["serialNumber"])
    assert len(seen) == 10
    assert service.process.poll() is None


def test_a_service_that_is_killed_under_a_client_that_it_served_is_unreachable_and_not_a_refusal(
    run: Callable[..., Any], home: SiteAuthority
) -> None:
    service = run()
    service.wait_for_output("listening at")
    with http.client(service.url, home.member("ada")) as client:
        assert client.get("/who").status_code == 200
        service.signal(signal.SIGKILL)
        service.wait()
        for _ in range(3):
            with pytest.raises(UnreachableError) as gone, http.explained(service.url):
                client.get("/who")
            assert gone.value.retry


def test_a_service_that_is_killed_within_a_request_is_unreachable(run: Callable[..., Any], home: SiteAuthority) -> None:
    service = run()
    service.wait_for_output("listening at")
    with http.client(service.url, home.member("ada")) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert client.get("/who").status_code == 200

        def call() -> None:
            with http.explained(service.url):
                client.get("/slow?seconds=100")

        answer = pool.submit(call)
        service.wait_for_output("slow request")
        service.signal(signal.SIGKILL)
        with pytest.raises(UnreachableError) as gone:
            answer.result(60)
    assert gone.value.retry


def test_a_wrong_revocation_list_keeps_a_service_from_starting(run: Callable[..., Any], home: SiteAuthority) -> None:
    folder = Credentials(home.member("service").folder).folder
    (folder / "revoked.yaml").write_text("- {serial: 12}")
    service = run()
    assert service.wait() != 0
    assert "revoked.yaml" in service.output()
    assert "`serial` (hexadecimal, in quotes)" in service.output()
