"""Promises of our HTTP clients: what a broken call means, and certificates that are renewed under a living client."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from certified import encode
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse

from lclstream.security import http
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, UnreachableError
from lclstream.security.identity import Identity
from lclstream.security.server import peer_identity
from lclstream.security.stamp import Stamp

from .conftest import Running, copy_of


@pytest.fixture
def service(serving: Callable[..., Running]) -> Running:
    app = FastAPI()

    @app.get("/who")
    def who(peer: Identity = Depends(peer_identity)) -> Identity:  # noqa: B008
        return peer

    @app.get("/vanish")
    async def vanish(request: Request) -> None:
        request.state.hang_up()

    @app.get("/break-off")
    async def break_off(request: Request) -> StreamingResponse:
        async def lines() -> AsyncIterator[bytes]:
            yield b"begun"
            await asyncio.sleep(0.1)
            request.state.hang_up()
            yield b"never seen"

        return StreamingResponse(lines())

    return serving(app)


@pytest.fixture
def ada(service: Running, tmp_path: Path) -> Credentials:
    return copy_of(service.site.member("ada"), tmp_path / "ada")


def renew(service: Running, member: Credentials, **validity: datetime.datetime) -> None:
    leaf = service.site._authority.leaf_cert(
        encode.person_name("ada", uname="ada"), encode.SAN(hosts=["localhost"]), **validity
    )
    fresh = member.folder / "fresh"
    for old in member.folder.glob("fresh.*"):
        old.unlink()
    leaf.save(fresh)
    os.replace(fresh.with_suffix(".key"), member.key)
    os.replace(fresh.with_suffix(".crt"), member.certificate)


def test_a_service_that_answered_before_and_drops_the_connection_went_away(service: Running, ada: Credentials) -> None:
    with http.client(service.url, ada) as client:
        assert client.get("/who").status_code == 200
        with pytest.raises(UnreachableError, match="it answered before") as gone, http.explained(service.url):
            client.get("/vanish")
    assert gone.value.retry


def test_a_service_that_never_answered_and_drops_the_connection_may_refuse_our_certificate(
    service: Running, ada: Credentials
) -> None:
    with (
        http.client(service.url, ada) as client,
        pytest.raises(AuthenticationError, match="most likely our certificate"),
        http.explained(service.url),
    ):
        client.get("/vanish")


def test_each_client_object_remembers_for_itself(service: Running, ada: Credentials) -> None:
    with http.client(service.url, ada) as client:
        client.get("/who")
    test_a_service_that_never_answered_and_drops_the_connection_may_refuse_our_certificate(service, ada)


def test_an_answer_that_breaks_off_is_no_refusal(service: Running, ada: Credentials) -> None:
    with (
        http.client(service.url, ada) as client,
        pytest.raises(UnreachableError) as gone,
        http.explained(service.url),
    ):
        client.get("/break-off")
    assert gone.value.retry


@pytest.mark.asyncio
async def test_the_same_holds_in_an_event_loop(service: Running, ada: Credentials) -> None:
    async with http.async_client(service.url, ada) as client:
        with pytest.raises(AuthenticationError):
            async with http.aexplained(service.url):
                await client.get("/vanish")
        assert (await client.get("/who")).status_code == 200
        with pytest.raises(UnreachableError, match="it answered before"):
            async with http.aexplained(service.url):
                await client.get("/vanish")


def test_a_service_that_was_stopped_is_unreachable(service: Running, ada: Credentials) -> None:
    with http.client(service.url, ada) as client:
        client.get("/who")
        url = service.url
        service.stop()
        with pytest.raises(UnreachableError) as gone, http.explained(url):
            client.get("/who")
    assert gone.value.retry


def test_an_error_without_a_request_is_explained_too() -> None:
    assert isinstance(http.explain(httpx.ReadError("x"), "https://x"), AuthenticationError)


def test_a_living_client_shows_the_renewed_certificate(service: Running, ada: Credentials) -> None:
    close = {"connection": "close"}
    with http.client(service.url, ada) as client:
        before = client.get("/who", headers=close).json()["serial"]
        renew(service, ada)
        after = client.get("/who", headers=close).json()["serial"]
        assert after != before
        assert client.get("/who", headers=close).json()["serial"] == after


def test_a_half_written_renewal_leaves_a_living_client_its_old_certificate(
    service: Running, ada: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    close = {"connection": "close"}
    with http.client(service.url, ada) as client:
        before = client.get("/who", headers=close).json()["serial"]
        whole = ada.certificate.read_bytes()
        with caplog.at_level(logging.WARNING):
            ada.certificate.write_bytes(whole[:200])
            assert client.get("/who", headers=close).json()["serial"] == before
            # A whole certificate beside the key of another one.
            key = ada.key.read_bytes()
            renew(service, ada)
            ada.key.write_bytes(key)
            assert client.get("/who", headers=close).json()["serial"] == before
        assert "the one read before stays in use" in caplog.text
        renew(service, ada)
        assert client.get("/who", headers=close).json()["serial"] != before


def test_our_own_expired_certificate_is_named_even_where_we_were_accepted_before(
    service: Running, ada: Credentials, wait_until: Callable[..., None]
) -> None:
    with http.client(service.url, ada) as client:
        assert client.get("/who", headers={"connection": "close"}).status_code == 200
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
        renew(service, ada, not_after=end)
        wait_until(lambda: datetime.datetime.now(datetime.UTC) > end, 60, "expiry")
        with (
            pytest.raises(AuthenticationError, match=r"id\.crt expired at .*renew it") as told,
            http.explained(service.url),
        ):
            client.get("/who")
    assert not told.value.retry


class SlowFolder:
    """The certificate folder lies on a file system that answers when the test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self._asked, self._answers = threading.Event(), threading.Event()
        self._stamps = http._Live._stamps
        monkeypatch.setattr(http._Live, "_stamps", lambda live: self._slow(live))

    def _slow(self, live: http._Live) -> dict[Path, Stamp | None]:
        self._asked.set()
        assert self._answers.wait(60), "nothing went on meanwhile"
        self.order.append("the folder has answered")
        return self._stamps(live)

    async def meanwhile(self) -> None:
        """Something else that the event loop does."""
        assert await asyncio.to_thread(self._asked.wait, 60)
        self.order.append("something else went on")
        self._answers.set()


def test_an_event_loop_goes_on_while_a_certificate_folder_does_not_answer(
    service: Running, ada: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> list[str]:
        async with http.async_client(service.url, ada) as client:
            slow = SlowFolder(monkeypatch)
            answer, _ = await asyncio.gather(client.get("/who"), slow.meanwhile())
            assert answer.status_code == 200
            return slow.order

    assert asyncio.run(work()) == ["something else went on", "the folder has answered"]
