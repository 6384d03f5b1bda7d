"""The job service's routes, without a connection."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from lclstream.jobs.app import create_app
from lclstream.jobs.config import JobsConfig
from lclstream.jobs.engine import Engine
from lclstream.security.authority import SiteAuthority
from lclstream.security.identity import Identity
from lclstream.security.server import peer_identity


def test_a_job_is_looked_for_in_the_event_loop_only(
    tmp_path: Path, sites: dict[str, SiteAuthority], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    find = Engine.job

    def noted(*args: Any) -> Any:
        threads.add(threading.current_thread())
        return find(*args)

    monkeypatch.setattr(Engine, "job", noted)
    credentials = sites["s3df"].member("psik")
    engine = Engine(JobsConfig(credentials=credentials.folder, prefix=tmp_path / "jobs"), credentials)
    app = create_app(engine)
    app.dependency_overrides[peer_identity] = lambda: Identity(login="ada", issuer="i", subject="ada", serial="1")

    async def work() -> None:
        await engine.start()
        transport = httpx.ASGITransport(app)
        async with asyncio.timeout(60), httpx.AsyncClient(transport=transport, base_url="http://here/v2") as client:
            stamp = (await client.post("/jobs", params={"submit": "false"}, json={"script": "true"})).json()
            for path in ("", "/state", "/logs", "/scripts", "/files"):
                assert (await client.get(f"/jobs/{stamp}{path}")).status_code == 200
            assert (await client.get("/jobs/nonsense")).status_code == 400
        await engine.stop()

    asyncio.run(work())
    assert threads == {threading.current_thread()}
