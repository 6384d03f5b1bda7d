"""A logbook service in a thread, with real certificates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from lclstream.elog.config import ElogConfig, KafkaConfig, LocationConfig
from lclstream.elog.service import LIMITS, create_app
from lclstream.security.credentials import Credentials
from lclstream.security.server import server_for


@contextmanager
def _served(app: Any, member: Credentials, port: int) -> Iterator[str]:
    server = server_for(app, host="127.0.0.1", port=port, credentials=member, limits=LIMITS)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve_app(free_port: Callable[..., int]) -> Iterator[Callable[..., str]]:
    """``serve_app(app, credentials)`` serves an application until the tests end, and gives its URL."""
    with ExitStack() as stack:
        yield lambda app, member: stack.enter_context(_served(app, member, free_port()))


@pytest.fixture(scope="session")
def serve_logbook(
    sites: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, serve_app: Callable[..., str]
) -> Callable[..., str]:
    """``serve_logbook(locations={})`` starts a logbook of its own, whose broker never answers, and gives its URL."""

    def serve(locations: dict[str, LocationConfig] | None = None) -> str:
        member = sites["s3df"].member("elog")
        config = ElogConfig(
            credentials=member.folder,
            database=f"sqlite:///{tmp_path_factory.mktemp('elog')}/elog.sqlite",
            kafka=KafkaConfig(bootstrap_servers="127.0.0.1:9"),
            locations=locations or {},
        )
        return serve_app(create_app(config), member)

    return serve


@pytest.fixture(scope="session")
def logbook_url(serve_logbook: Callable[..., str]) -> str:
    """One logbook for all tests that do not care; nobody listens at its broker's address."""
    return serve_logbook()
