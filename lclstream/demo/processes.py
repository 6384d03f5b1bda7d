"""The programs the demonstration starts, and how every one of them ends.

:class:`Children` owns all processes; only the main thread uses it. Each child is the leader of a session of its own, so
that a Ctrl-C at the terminal reaches the demonstration only, which then stops its children in the reverse order of
their start. What children have started in turn (batch jobs have sessions of their own, too) carries the same mark in
its environment: whatever still lives with that mark when all children have gone is ended and reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARK = "LCLSTREAM_DEMO"
#: Most seconds a program may take to start on a busy machine with two cores.
START_S = 240.0
#: Seconds a program has to end after SIGTERM before it is killed; parts of Airflow take long on a busy machine.
STOP_S = 45.0
#: Seconds within which a killed program is gone.
_KILLED_S = 30.0
#: Seconds in which what is just ending by itself is no stray.
_ENDING_S = 5.0


class DemoError(RuntimeError):
    """A step of the demonstration failed; the message says which, why, and where to look."""


@dataclass
class Child:
    """One program: its name, its process, its log file, and whether it ends by itself when it has done its work."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ends: bool = False

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(text[-lines:])


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


class Children:
    """All programs of one demonstration.

    Args:
        logs: folder for one log file a program.
        environment: variables every program gets beside ours.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs = logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self._mark = uuid.uuid4().hex
        # Programs of this environment come first, whether or not it was activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._environment = {**os.environ, **environment, "PATH": path, _MARK: self._mark, "PYTHONUNBUFFERED": "1"}
        self._running: list[Child] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        ends: bool = False,
    ) -> Child:
        """Start a program; its output goes to ``<logs>/<name>.log``.

        Args:
            name: what it is called in messages.
            command: program and arguments.
            environment: further variables.
            ends: whether it ends by itself, so that an exit code of 0 is no surprise.

        Raises:
            DemoError: the program is not there.
        """
        log = self.logs / f"{name}.log"
        with log.open("ab") as output:
            try:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**self._environment, **(environment or {})},
                )
            except FileNotFoundError as error:
                raise DemoError(
                    f"cannot start {name}: {command[0]} is not there; run `make demo` to install it"
                ) from error
        child = Child(name, process, log, ends)
        self._running.append(child)
        self._record()
        return child

    def run(
        self, name: str, command: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None
    ) -> bytes:
        """Run a program to its end and give its standard output.

        Raises:
            DemoError: it failed or took too long; the message has the end of what it said.
        """
        log = self.logs / f"{name}.log"
        try:
            with log.open("ab") as errors:
                done = subprocess.run(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    env={**self._environment, **(environment or {})},
                    timeout=timeout,
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"{name} did not end within {timeout:.0f} s; see {log}") from error
        if done.returncode != 0:
            said = log.read_text(errors="replace").strip().splitlines()
            raise DemoError(f"{name} failed (exit code {done.returncode}): " + "\n".join(said[-15:]))
        return done.stdout

    def finish(self, child: Child, *, timeout: float) -> None:
        """Wait for a program that ends by itself.

        Raises:
            DemoError: it failed or took too long.
        """
        try:
            code = child.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"{child.name} did not end within {timeout:.0f} s; see {child.log}") from error
        self._running.remove(child)
        if code != 0:
            raise DemoError(f"{child.name} failed (exit code {code}):\n{child.tail()}")

    def kill(self, name: str) -> None:
        """End a program and what it forked with SIGKILL, as a crash does; its end is no surprise afterwards.

        Raises:
            DemoError: none of that name is running.
        """
        child = self.find(name)
        members = [child.process.pid, *_descendants(child.process.pid)]
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.process.wait(_KILLED_S)
        self._running.remove(child)
        self._record()

    def find(self, name: str) -> Child:
        """The running program of that name.

        Raises:
            DemoError: there is none.
        """
        for child in self._running:
            if child.name == name:
                return child
        raise DemoError(f"{name} is not running: there are {', '.join(child.name for child in self._running)}")

    def check(self) -> None:
        """Raise when a program that should run has ended.

        Raises:
            DemoError: with the program's name, exit code and the end of its log.
        """
        for child in self._running:
            code = child.process.poll()
            if code is not None and not (child.ends and code == 0):
                raise DemoError(
                    f"{child.name} ended unexpectedly (exit code {code}); {child.log} ends with:\n{child.tail()}"
                )

    def wait_until(self, condition: Callable[[], bool], *, timeout: float, what: str, every: float = 0.2) -> None:
        """Poll a condition while all programs run.

        Raises:
            DemoError: a program ended, or the condition did not hold in time.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{what}: not within {timeout:.0f} s; the logs are in {self.logs}")
            time.sleep(every)

    def stop(self) -> list[str]:
        """End everything, last started first.

        Returns:
            What had to be ended by force: descriptions of processes; empty when all went well.
        """
        stubborn: list[str] = []
        for child in reversed(self._running):
            if child.process.poll() is None:
                child.process.terminate()
                try:
                    child.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    stubborn.append(f"{child.name} (pid {child.process.pid})")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait(_KILLED_S)
        self._running.clear()
        self._record()
        return stubborn + self._end_marked()

    def _end_marked(self) -> list[str]:
        """End what children of ours started and left behind, and say what it was."""
        left: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(_MARK) == self._mark:
                    left.append(process)
        _, left = psutil.wait_procs(left, timeout=_ENDING_S)
        described = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                described.append(f"{' '.join(process.cmdline())[:120]} (pid {process.pid})")
                process.terminate()
        _, stubborn = psutil.wait_procs(left, timeout=5)
        for process in stubborn:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(stubborn, timeout=5)
        return described

    def _record(self) -> None:
        """Write who runs, for somebody who has to clean up after a kill -9 of the demonstration."""
        pids = {child.name: child.process.pid for child in self._running}
        # Replaced, not written over: whoever looks at any moment finds all of it.
        part = self.logs.parent / ".pids.json.part"
        part.write_text(json.dumps(pids, indent=2))
        part.replace(self.logs.parent / "pids.json")
