"""The folder a demonstration works in."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import yaml

from lclstream.demo.processes import DemoError


class Workspace:
    """``.lclstream/demo``: ``certificates/ config/ data/ jobs/ logs/ results/ airflow/ summary.json``.

    What an earlier demonstration left there is deleted. A lock keeps a second one out while one runs.

    Raises:
        DemoError: another demonstration is running in the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise DemoError(f"cannot write in {self.folder}: {error.strerror}; choose another with --folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DemoError(
                f"another demonstration is running in {self.folder}: stop it, or choose another folder with --folder"
            ) from None
        for left in self.folder.iterdir():
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        for name in ("certificates", "config", "data", "jobs", "logs", "results", "airflow"):
            (self.folder / name).mkdir(mode=0o700)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def logs(self) -> Path:
        """One log file a program."""
        return self.folder / "logs"

    @property
    def summary(self) -> Path:
        """What was measured, as JSON."""
        return self.folder / "summary.json"

    def write_config(self, name: str, content: dict[str, Any], heading: str) -> Path:
        """Write a YAML file into ``config/``, with a comment that says what it is for."""
        path = self.folder / "config" / name
        path.write_text(f"# {heading}\n" + yaml.safe_dump(content, sort_keys=False))
        return path

    def write_secret(self, name: str, secret: str) -> Path:
        """Write a file only we can read."""
        path = self.folder / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret)
        return path

    def release(self) -> None:
        """Let another demonstration use the folder."""
        self._lock.close()


def free_port_range(count: int) -> tuple[int, int]:
    """First and last of neighbouring loopback ports nobody listens at now.

    They lie below those that outgoing connections use, one of which could take a port before its program listens there.

    Raises:
        DemoError: there is no such range.
    """
    for _ in range(200):
        first = random.randrange(20000, 32000 - count)  # noqa: S311
        probes: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                probes.append(socket.socket())
                probes[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first, first + count - 1
    raise DemoError(f"no {count} neighbouring free ports between 20000 and 32000")
