"""A signer without a socket: its key, its table in memory, and a clock that tests turn."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certified import encode
from certified.ca import CA

from lclstream.signer.config import SignerConfig
from lclstream.signer.issuing import Authority
from lclstream.signer.peer import Peer
from lclstream.signer.service import Signer
from lclstream.signer.store import Store


class Clock:
    def __init__(self) -> None:
        self.now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)

    def __call__(self) -> datetime.datetime:
        return self.now

    def advance(self, **time: float) -> None:
        self.now += datetime.timedelta(**time)


class NamedPeer(Peer):
    """A peer whose login is not looked up in this machine's table of users."""

    LOGINS = {0: "root", 1001: "ada", 1002: "bob", 1003: "oscar", 1004: "mallory"}  # noqa: RUF012

    def login(self) -> str:
        return self.LOGINS[self.uid]


def peer(login: str) -> Peer:
    uids = {name: uid for uid, name in NamedPeer.LOGINS.items()}
    return NamedPeer(pid=4711, uid=uids[login], gid=100)


@pytest.fixture
def authority_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "authority"
    folder.mkdir()
    CA.new(encode.append_pseudonym(encode.org_name("s3df", "users"), "Signing Certificate")).save(folder / "CA")
    return folder


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'signer.sqlite'}")
    yield store
    store.close()


@pytest.fixture
def signer(authority_folder: Path, store: Store, clock: Clock) -> Callable[..., Signer]:
    def make(**settings: Any) -> Signer:
        config = SignerConfig(authority=authority_folder, **settings)
        return Signer(config, Authority(config.authority), store, clock)

    return make
