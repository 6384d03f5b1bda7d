"""A PostgreSQL server of our own on loopback, in a folder, for one measurement."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_S = 60.0


class NoPostgresError(RuntimeError):
    """PostgreSQL cannot be run here; the message says what is missing."""


def _programs() -> Path:
    found = shutil.which("initdb")
    # A link in a folder of links: the other programs are where it leads.
    folders = (
        [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise NoPostgresError("no PostgreSQL server here: install it (Debian: apt-get install postgresql)")


def _account() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: then it gets the account that its package made."""
    if os.geteuid() != 0:
        return {}
    try:
        account = pwd.getpwnam("postgres")
    except KeyError:
        raise NoPostgresError("PostgreSQL does not run as root, and there is no account postgres") from None
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def private_postgres() -> Iterator[str]:
    """``HOST:PORT/DATABASE`` with the user in front, such as ``test@127.0.0.1:40123/postgres``; gone afterwards.

    Raises:
        NoPostgresError: it cannot be run here.
    """
    programs, user = _programs(), _account()
    # In /tmp itself: the account must be able to reach it, and a socket's path may not be long.
    folder = Path(tempfile.mkdtemp(prefix="lclstream-postgres-", dir="/tmp"))
    if user:
        os.chown(folder, user["user"], user["group"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server: subprocess.Popen[bytes] | None = None
    try:
        made = subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "test", "--auth=trust", "-E", "UTF8", "--no-sync"],
            check=False, capture_output=True, text=True, cwd="/", **user,
        )  # fmt: skip
        if made.returncode:
            raise NoPostgresError(f"initdb failed: {made.stderr[-500:]}")
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **user,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not _answers(programs, port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise NoPostgresError(f"PostgreSQL did not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.1)
        yield f"test@127.0.0.1:{port}/postgres"
    finally:
        if server is not None:
            server.terminate()
            try:
                # SIGTERM waits for clients to leave; what is thrown away needs no such care.
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(programs: Path, port: int) -> bool:
    words = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(words, check=False, cwd="/").returncode == 0
