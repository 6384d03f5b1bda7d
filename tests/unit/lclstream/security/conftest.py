"""Servers of the site `home` for the tests of this folder, and the ways to talk to them by hand."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lclstream.security.authority import SiteAuthority
from lclstream.security.connections import MutualTlsServer
from lclstream.security.credentials import Credentials
from lclstream.security.server import server_for


class Running:
    """A server in a thread of its own; `folder` is its certificate folder, a copy that a test may change."""

    def __init__(self, server: MutualTlsServer, site: SiteAuthority, credentials: Credentials) -> None:
        self.server = server
        self.site = site
        self.credentials = credentials
        self.folder = credentials.folder
        self._thread = threading.Thread(target=server.run)

    @property
    def port(self) -> int:
        return int(self.server.servers[0].sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start(self, wait_until: Callable[..., None]) -> None:
        self._thread.start()
        wait_until(lambda: self.server.started, 60, "server started")

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def connect(self, member: Credentials | None = None) -> ssl.SSLSocket:
        """A TLS connection made by hand, as `ada` unless said otherwise."""
        context = (member or self.site.member("ada")).client_context(self.url)
        return context.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port), timeout=30), server_hostname="127.0.0.1"
        )


def copy_of(credentials: Credentials, folder: Path) -> Credentials:
    shutil.copytree(credentials.folder, folder)
    return Credentials(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> SiteAuthority:
    return SiteAuthority(tmp_path_factory.mktemp("sites") / "home", "home")


@pytest.fixture(scope="session")
def away(tmp_path_factory: pytest.TempPathFactory) -> SiteAuthority:
    return SiteAuthority(tmp_path_factory.mktemp("sites") / "away", "away")


@pytest.fixture
def serving(home: SiteAuthority, tmp_path: Path, wait_until: Callable[..., None]) -> Iterator[Callable[..., Running]]:
    """Serve an application: ``serving(app, limits=…)``; stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(app: Any, *, loop: str = "auto", **options: Any) -> Running:
            credentials = copy_of(home.member("service"), tmp_path / f"service-{id(app)}")
            server = server_for(app, host="127.0.0.1", port=0, credentials=credentials, **options)
            server.config.loop = loop
            running = Running(server, home, credentials)
            running.start(wait_until)
            stack.callback(running.stop)
            return running

        yield start
