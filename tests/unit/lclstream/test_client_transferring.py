"""Asking for a transfer when answers get lost."""

from __future__ import annotations

import ssl
import threading
from typing import Any, cast

import httpx
import pytest

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferStatus
from lclstream.client import transferring
from lclstream.client.transferring import Transfer
from lclstream.security import http
from lclstream.security.errors import AuthenticationError, PeerError, ServiceError, UnreachableError

URL = "https://dtn.example.org:8446"


class Service:
    """A client whose calls fail with these errors, one after the other, before they succeed."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.keys: list[str] = []
        self.cancelled: list[int] = []

    def request(self, config: dict[str, Any], *, idempotency_key: str, **_: Any) -> TransferStatus:
        self.keys.append(idempotency_key)
        if self._errors:
            with http.explained(URL):
                raise self._errors.pop(0)
        return TransferStatus.model_construct(id=7, url="tcp://127.0.0.1:1")

    def cancel(self, transfer: int) -> None:
        self.cancelled.append(transfer)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()
    monkeypatch.setattr(transferring.time, "sleep", lambda _: waiting.wait(0))


def ask(service: Service) -> None:
    with Transfer(cast(TransferClient, service), {}):
        pass


def dropped() -> httpx.ReadError:
    return httpx.ReadError("connection reset", request=httpx.Request("POST", URL))


def refused() -> httpx.ConnectError:
    return httpx.ConnectError("connection refused")


@pytest.mark.parametrize(
    "errors",
    [
        [httpx.ReadTimeout("")],
        [httpx.WriteTimeout("")],
        [dropped()],
        [httpx.RemoteProtocolError("server disconnected")],
        [httpx.ReadTimeout(""), refused(), refused()],
        [ServiceError("busy", status=503, detail="busy"), refused()],
    ],
    ids=["read timeout", "write timeout", "dropped", "disconnected", "restarting", "restarting after 503"],
)
def test_a_lost_answer_is_asked_for_again_with_the_same_key(errors: list[Exception]) -> None:
    service = Service(*errors)
    ask(service)
    assert len(service.keys) == len(errors) + 1
    assert len(set(service.keys)) == 1
    assert service.cancelled == [7]


def alert() -> httpx.ReadError:
    error = dropped()
    cause = ssl.SSLError(1, "tlsv13 alert certificate required")
    cause.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("errors", "kind", "tries"),
    [
        ([refused()], UnreachableError, 1),
        ([httpx.ConnectTimeout("")], UnreachableError, 1),
        ([alert()], AuthenticationError, 1),
        ([dropped(), dropped()], AuthenticationError, 2),
        ([ServiceError("no", status=422, detail="no")], ServiceError, 1),
    ],
    ids=["refused", "no connection", "certificate refused", "dropped twice", "wrong configuration"],
)
def test_what_asking_again_cannot_change_is_told_at_once(
    errors: list[Exception], kind: type[PeerError], tries: int
) -> None:
    service = Service(*errors)
    with pytest.raises(kind):
        ask(service)
    assert len(service.keys) == tries
