"""The engine is the event loop's: no route uses it from another thread, while the loop changes what it holds."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from lclstream.jobs.engine import Engine

pytest.importorskip("lclstream.superfacility.service", reason="needs pip install 'lclstream[superfacility]'")

from lclstream.superfacility import service
from lclstream.superfacility.compute import make_engine
from lclstream.superfacility.config import SuperfacilityConfig
from lclstream.superfacility.files import UserFiles
from lclstream.superfacility.keys import make_client


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[threading.Thread]]:
    """Which threads used the engine, by what they did."""
    seen: dict[str, set[threading.Thread]] = {"jobs": set(), "job": set(), "cancel": set()}

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(*args: Any, **more: Any) -> Any:
            seen[name].add(threading.current_thread())
            return method(*args, **more)

        return wrapper

    for name in seen:
        monkeypatch.setattr(Engine, name, noted(name, getattr(Engine, name)))
    return seen


def test_every_route_uses_the_engine_in_the_event_loop_only(
    tmp_path: Path, threads: dict[str, set[threading.Thread]]
) -> None:
    client_id, _, public = make_client(tmp_path / "keys", "airflow")
    config = SuperfacilityConfig.model_validate(
        {
            "state": tmp_path / "state",
            "files": tmp_path / "files",
            "machines": {"perlmutter": {"type": "local"}},
            "clients": [{"id": client_id, "user": "ada", "public_key": public}],
            "cancel_jobs_on_exit": True,
        }
    )
    engine = make_engine(config)
    app = service.create_app(config, engine)
    app.dependency_overrides[service._user] = lambda: UserFiles(engine.config.directories[0], "ada")

    async def work() -> None:
        transport = httpx.ASGITransport(app)
        async with asyncio.timeout(60), httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            form = {"job": "#!/bin/sh\nsleep 300\n", "isPath": "false"}
            task = (await client.post("/api/v1.2/compute/jobs/perlmutter", data=form)).json()["task_id"]
            one = (await client.get(f"/api/v1.2/tasks/{task}")).json()
            assert one in (await client.get("/api/v1.2/tasks")).json()["tasks"]
            number = task.replace(".", "")
            for query in ("", "?sacct=true"):
                found = (await client.get(f"/api/v1.2/compute/jobs/perlmutter/{number}{query}")).json()["output"]
                assert [line["jobid"] for line in found] == [number]
            answer = await client.delete(f"/api/v1.2/compute/jobs/perlmutter/{number}")
            assert answer.json()["status"] == "OK"

    async def served() -> None:
        await engine.start()
        try:
            await work()
        finally:
            await engine.stop()

    asyncio.run(served())
    assert threads == {name: {threading.current_thread()} for name in threads}
