"""The pages inside Airflow's own API application, with its users and roles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from lclstream.api.models import TransferInfo, TransferPhase
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec
from lclstream_airflow.overview import waits_for


@pytest.fixture(scope="module")
def airflow_app() -> Iterator[Any]:
    from airflow.api_fastapi.app import create_app, purge_cached_app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")
        yield create_app(apps="core")
        purge_cached_app()


@pytest.fixture
def get(airflow_app: Any) -> Callable[..., httpx.Response]:
    """``get(path, role)`` as a user with that role of Airflow's simple auth manager; None: nobody."""
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

    def ask(path: str, role: str | None = "viewer", *, known: bool = True) -> httpx.Response:
        headers = {}
        if known:
            token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username="somebody", role=role))
            headers["Authorization"] = f"Bearer {token}"

        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=airflow_app)
            async with httpx.AsyncClient(transport=transport, base_url="http://airflow") as client:
                return await client.get(path, headers=headers)

        return asyncio.run(once())

    return ask


@pytest.mark.parametrize("path", ["/lclstream/", "/lclstream/runs/stream_run/mfx__r0007"])
def test_nobody_sees_the_pages_without_the_right_to(get: Callable[..., httpx.Response], path: str) -> None:
    assert get(path, known=False).status_code == 401
    assert get(path, role=None).status_code == 403


def test_who_may_read_one_dag_only_does_not_see_the_list(
    get: Callable[..., httpx.Response], transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.api_fastapi.app import get_auth_manager

    transfers.add()
    monkeypatch.setattr(
        type(get_auth_manager()), "is_authorized_dag", lambda self, *, details=None, **_: details and details.id == "a"
    )
    assert get("/lclstream/").status_code == 403
    assert get("/lclstream/?dag_id=a").status_code == 403
    assert get("/lclstream/runs/a/mfx__r0007").status_code == 200
    assert get("/lclstream/runs/b/mfx__r0007?dag_id=a").status_code == 403


def test_the_list_shows_the_latest_streams(get: Callable[..., httpx.Response], transfers: Any) -> None:
    assert "No transfer has been made yet" in get("/lclstream/").text
    transfer = transfers.add()
    transfer.phase, transfer.received, transfer.held = TransferPhase.failed, 12, 12
    transfer.info = "<script>alert(1)</script>"
    text = get("/lclstream/").text
    assert "transfer 1" in text
    assert "12 in (120 B), 12 held, 0 out, 0 lost" in text
    assert "100 B/s in" in text
    assert "<script>" not in text


def test_a_service_that_is_away_is_said_so(
    get: Callable[..., httpx.Response], connection: Callable[..., None], airflow_identity: Any
) -> None:
    connection("lclstream_default", "lclstream", "https://127.0.0.1:9", airflow_identity.folder)
    answer = get("/lclstream/")
    assert answer.status_code == 200
    assert "cannot be asked" in answer.text
    assert "nowhere" in get("/lclstream/?connection=nowhere").text


def test_open_sessions_come_first_and_everything_says_whose_it_is(
    get: Callable[..., httpx.Response], transfers: Any, jobs: JobClient
) -> None:
    whose = {"dag_id": "stream_session", "run_id": "shift <7>"}
    job = jobs.submit(JobSpec(script="#!/bin/sh\nexec sleep 600"), tags={"session": "mfx", **whose})
    other = jobs.submit(JobSpec(script="#!/bin/sh\nexec sleep 600"))
    transfers.add().tags = whose
    try:
        text = get("/lclstream/").text
    finally:
        for one in (job, other):
            jobs.cancel(one)
    assert f"session mfx (job {job}) of stream_session / shift &lt;7&gt;" in text
    assert other not in text
    assert text.index("session mfx") < text.index("transfer 1 of stream_session / shift &lt;7&gt;")


def test_a_run_without_a_stream_says_so(get: Callable[..., httpx.Response]) -> None:
    assert "has asked for no stream" in get("/lclstream/runs/stream_run/another").text


@pytest.mark.parametrize(
    ("phase", "received", "buffer", "words"),
    [
        ("buffer_starting", 0, None, "the buffer's job to start"),
        ("ready", 0, {}, "the engine's job to start"),
        ("producing", 0, {"consumers": 0}, "the first event"),
        ("producing", 5, {"consumers": 0, "capacity_bytes": 100, "held": {"bytes": 50}}, "a consumer: nobody pulls"),
        (
            "producing", 5, {"consumers": 0, "capacity_bytes": 100, "held": {"bytes": 99}},
            "a consumer: nobody pulls, and the buffer is full",
        ),
        (
            "producing", 5, {"consumers": 2, "capacity_bytes": 100, "held": {"bytes": 99}},
            "faster consumers: the buffer is full",
        ),
        ("producing", 5, {"consumers": 2, "capacity_bytes": 100, "held": {"bytes": 1}}, "the end of the run"),
        (
            "draining", 5, {"consumers": 0, "held": {"messages": 2}},
            "a consumer to take the last 2 messages: nobody pulls",
        ),
        ("draining", 5, {"consumers": 1, "held": {"messages": 2}}, "the last 2 messages"),
        ("draining", 5, {"consumers": 0, "held": {"messages": 0}}, "its jobs to end"),
        ("done", 5, {}, ""),
    ],
)  # fmt: skip
def test_what_a_transfer_waits_for(phase: str, received: int, buffer: dict[str, Any] | None, words: str) -> None:
    info = TransferInfo.model_validate(
        {
            "user": "u", "log": [], "id": 1, "url": "tcp://h:1", "info": "", "buffer": buffer,
            "state": TransferPhase(phase).job_state, "phase": phase,
            "metrics": {"time": 0, "producers": 0, "recvd": received, "sent": 0, "buffered": 0},
        }
    )  # fmt: skip
    assert waits_for(info) == words
