"""What all tests share: certificates of two sites, free ports, and child processes that are always stopped."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Airflow reads its environment when it is first imported, which may be during collection.
_airflow_home = tempfile.mkdtemp(prefix="lclstream-airflow-")
atexit.register(shutil.rmtree, _airflow_home, ignore_errors=True)
os.environ.setdefault("AIRFLOW_HOME", _airflow_home)
os.environ.setdefault("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
os.environ.setdefault("AIRFLOW__CORE__DAGS_FOLDER", str(REPOSITORY / "dags"))
os.environ.setdefault("AIRFLOW__CORE__UNIT_TEST_MODE", "False")
os.environ.setdefault("AIRFLOW__API_AUTH__JWT_SECRET", "for tests only, and long enough for HS512: " + 21 * "x")


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Signing authorities of the sites `s3df` and `olcf` (`SiteAuthority`)."""
    from lclstream.security.authority import SiteAuthority

    base = tmp_path_factory.mktemp("sites")
    return {site: SiteAuthority(base / site, site) for site in ("s3df", "olcf")}


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a loopback port nobody listens at, a new one at each call."""

    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return port


class Child:
    """A process in a group of its own, with its output in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None, cwd: Path | None) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {})},
                cwd=cwd,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 30) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.process.args} still runs after {timeout} s:\n{self.output()[-4000:]}"
            ) from None

    def wait_for_output(self, text: str, timeout: float = 30) -> None:
        wait_until(lambda: text in self.output() or self.process.poll() is not None, timeout, f"{text!r} in output")
        assert text in self.output(), f"ended with {self.process.returncode} before {text!r}:\n{self.output()[-4000:]}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = 15) -> int:
        """SIGTERM, then a bounded wait, then SIGKILL for the whole group."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(timeout)


def wait_until(condition: Callable[[], object], timeout: float = 30, what: str = "condition") -> None:
    """Poll until the condition holds; fail with its name when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {timeout} s")
        time.sleep(0.02)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start a process: ``start("nngstream", "--in", …, name="buffer")``; all are stopped when the test ends.

    A first word that names one of our console commands runs the one of this environment.
    """
    children: list[Child] = []

    def run(
        *command: str, name: str | None = None, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> Child:
        words = [str(word) for word in command]
        beside = Path(sys.executable).parent / words[0]
        if beside.exists():
            words[0] = str(beside)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        child = Child(
            words, tmp_path / f"{name or Path(words[0]).name}-{len(children)}.log", {"PATH": path, **(env or {})}, cwd
        )
        children.append(child)
        return child

    yield run
    for child in reversed(children):
        child.stop()
