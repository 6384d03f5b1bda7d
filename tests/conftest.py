"""What all tests share: certificates of two sites, free ports, and child processes that are always stopped."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
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
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent

# Airflow reads its environment when it is first imported, which may be during collection.
if "AIRFLOW_HOME" not in os.environ:
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="lclstream-airflow-")
    atexit.register(shutil.rmtree, os.environ["AIRFLOW_HOME"], ignore_errors=True)
# Pytest's workers inherit it: each has an Airflow of its own below it, because two that make one database at once fail,
# and the pools and DAG runs of one are no business of the other's.
os.environ["AIRFLOW_HOME"] = str(Path(os.environ["AIRFLOW_HOME"]) / os.environ.get("PYTEST_XDIST_WORKER", ""))
Path(os.environ["AIRFLOW_HOME"]).mkdir(parents=True, exist_ok=True)
os.environ.setdefault("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
os.environ.setdefault("AIRFLOW__CORE__DAGS_FOLDER", str(REPOSITORY / "dags"))
os.environ.setdefault("AIRFLOW__CORE__UNIT_TEST_MODE", "False")
os.environ.setdefault("AIRFLOW__API_AUTH__JWT_SECRET", "for tests only, and long enough for HS512: " + 21 * "x")


# Whether the tests pass must depend neither on chance nor on how busy the machine is. To look for more than the same
# examples each time: --hypothesis-profile=default
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Signing authorities of the sites `s3df` and `olcf` (`SiteAuthority`)."""
    from lclstream.security.authority import SiteAuthority

    base = tmp_path_factory.mktemp("sites")
    return {site: SiteAuthority(base / site, site) for site in ("s3df", "olcf")}


class _Ports:
    """Loopback ports that stay free until somebody binds them.

    They lie below those that Linux gives to outgoing connections and to whoever asks for any port, which could be given
    away before our process listens; each of pytest's workers has a share of its own, and gives no port twice.
    """

    FIRST, COUNT = 10000, 6000

    def __init__(self) -> None:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        self._size = self.COUNT // workers
        self._first = self.FIRST + worker * self._size
        # Somewhere: another run of the tests on this machine most likely begins elsewhere.
        self._next = random.randrange(self._size)

    def first_of(self, count: int = 1) -> int:
        """The first of that many ports side by side which nobody has bound."""
        for _ in range(self._size):
            begin = self._next if self._next + count <= self._size else 0
            self._next = begin + count
            found = range(self._first + begin, self._first + begin + count)
            if all(map(self._is_free, found)):
                return found[0]
        raise AssertionError(f"no {count} neighbouring free ports from {self._first} on")

    @staticmethod
    def _is_free(port: int) -> bool:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True


_ports = _Ports()


@pytest.fixture(scope="session")
def free_port() -> Callable[..., int]:
    """``free_port()`` gives a loopback port nobody listens at, a new one at each call; ``free_port(3)`` the first of
    three side by side."""
    return _ports.first_of


class Child:
    """A process in a group of its own, with its output in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None, cwd: Path | None) -> None:
        self.log = log
        self._stopped = False
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

    def wait(self, timeout: float = 60) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.process.args} still runs after {timeout} s:\n{self.output()[-4000:]}"
            ) from None

    def wait_for_output(self, text: str, timeout: float = 60) -> None:
        wait_until(lambda: text in self.output() or self.process.poll() is not None, timeout, f"{text!r} in output")
        assert text in self.output(), f"ended with {self.process.returncode} before {text!r}:\n{self.output()[-4000:]}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = 30) -> int:
        """SIGTERM, then a bounded wait, then SIGKILL for the whole group; without effect when called again."""
        if not self._stopped:
            self._stopped = True
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(timeout)


def wait_until(condition: Callable[[], object], timeout: float = 60, what: str = "condition") -> None:
    """Poll until the condition holds; fail with its name when it does not in time."""
    deadline = time.monotonic() + timeout
    late = False
    while not condition():
        # Looked at once more after the deadline: we may have been held up, and not what we wait for.
        if late:
            raise AssertionError(f"no {what} within {timeout} s")
        time.sleep(0.02)
        late = time.monotonic() > deadline


@pytest.fixture(name="wait_until", scope="session")
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


class Superfacility:
    """A Superfacility stand-in as a process, with one client and its user's folder."""

    def __init__(
        self, folder: Path, port: int, machine: dict[str, object], env: dict[str, str], **more: object
    ) -> None:
        import yaml

        from lclstream.superfacility.keys import make_client

        self.url = f"http://127.0.0.1:{port}"
        self.api_url = f"{self.url}/api/v1.2"
        self.token_url = f"{self.url}/c2id/token"
        self.client_id, self.key, public = make_client(folder / "keys", "airflow")
        self.status = folder / "status.yaml"
        self.home = folder / "files" / "ada"
        config = {
            "listen": {"port": port},
            "state": str(folder / "state"),
            "files": str(folder / "files"),
            "machines": {"perlmutter": machine},
            "clients": [{"id": self.client_id, "user": "ada", "public_key": str(public)}],
            "projects": [{"name": "m1234", "description": "streams", "users": ["ada"]}],
            "status": str(self.status),
            "cancel_jobs_on_exit": True,
            **more,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self._command = [
            sys.executable, "-m", "lclstream.cli", "superfacility", "serve", "--config", str(folder / "config.yaml"),
        ]  # fmt: skip
        self._env, self._log = env, folder / "log"
        self.child: Child | None = None
        self.start()

    def start(self) -> None:
        self.child = Child(self._command, self._log, self._env, None)
        port = int(self.url.rpartition(":")[2])

        def answers() -> bool:
            assert self.child is not None
            assert self.child.process.poll() is None, self.child.output()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(answers, 90, "answer of the Superfacility stand-in")

    def say(self, status: str, **more: object) -> None:
        """How the machine stands from now on."""
        import yaml

        partial = self.status.with_suffix(".part")
        partial.write_text(yaml.safe_dump({"perlmutter": {"status": status, **more}}))
        partial.replace(self.status)

    def stop(self) -> int:
        assert self.child is not None
        # It ends the jobs that its tests left, and waits for their end for up to a minute.
        return self.child.stop(90)


@pytest.fixture(scope="session")
def make_superfacility(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[..., int]
) -> Iterator[Callable[..., Superfacility]]:
    """``make_superfacility({"type": "local"}, env)`` starts a stand-in whose machine `perlmutter` is that backend."""
    made: list[Superfacility] = []

    def make(machine: dict[str, object], env: dict[str, str] | None = None, **more: object) -> Superfacility:
        made.append(Superfacility(tmp_path_factory.mktemp("superfacility"), free_port(), machine, env or {}, **more))
        return made[-1]

    yield make
    for one in made:
        assert one.stop() == 0, one.child and one.child.output()[-4000:]


@pytest.fixture(scope="session")
def shared_superfacility(make_superfacility: Callable[..., Superfacility]) -> Superfacility:
    """One stand-in without a scheduler, for all tests that leave it as it is."""
    return make_superfacility({"type": "local", "kill_grace_s": 0.5})


@pytest.fixture
def superfacility(shared_superfacility: Superfacility) -> Superfacility:
    """The same, with its machine active."""
    shared_superfacility.say("active")
    return shared_superfacility
