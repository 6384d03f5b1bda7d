"""A runner runs a script once, bounds it, leaves nothing behind, and writes down the truth."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lclstream.jobs import runner
from lclstream.jobs.backends.plans import interpreter


class Attempt:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "1"
        self.folder.mkdir()
        self.runners: list[subprocess.Popen[bytes]] = []

    def plan(self, script: str, **changes: Any) -> None:
        job = self.folder.parent / "job"
        job.write_text(script)
        plan: dict[str, Any] = {
            "argv": ["/bin/bash", str(job)],
            "directory": str(self.folder.parent),
            "environment": {"base": str(self.folder.parent)},
            "inherit_environment": True,
            "walltime_s": 60.0,
            "grace_s": 5.0,
            "keep_environment": [],
            "log": str(self.folder),
        }
        (self.folder.parent / "plan.json").write_text(json.dumps({**plan, **changes}))

    def begin(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", runner.__file__, str(self.folder.parent), "1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.runners.append(process)
        return process

    def run(self, script: str, **changes: Any) -> dict[str, Any]:
        self.plan(script, **changes)
        self.begin().wait(60)
        return self.exit()

    def exit(self) -> dict[str, Any]:
        return json.loads((self.folder / "exit.json").read_text())  # type: ignore[no-any-return]

    def stdout(self) -> str:
        return (self.folder / "stdout.1").read_text()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("base") == str(self.folder.parent):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    attempt = Attempt(tmp_path)
    yield attempt
    for process in attempt.runners:
        process.kill()
        process.wait(30)
    for left in attempt.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def test_exit_codes_are_kept(attempt: Attempt) -> None:
    assert attempt.run("exit 7")["code"] == 7
    assert attempt.exit()["reason"] == "exit"


def test_a_script_killed_by_a_signal_says_which(attempt: Attempt) -> None:
    outcome = attempt.run("kill -SEGV $$")
    assert outcome["code"] == -signal.SIGSEGV
    assert "Segmentation fault" in outcome["message"]


def test_an_interpreter_that_is_not_there_is_an_error_that_names_it(attempt: Attempt) -> None:
    outcome = attempt.run("", argv=["/no/such/interpreter", "x"])
    assert outcome["reason"] == "error"
    assert "/no/such/interpreter" in outcome["message"]


def test_a_folder_that_is_not_there_is_an_error_that_names_it(attempt: Attempt) -> None:
    assert "/no/such/folder" in attempt.run("true", directory="/no/such/folder")["message"]


def test_a_script_inherits_no_descriptor_and_no_signal_setting(attempt: Attempt) -> None:
    attempt.run("ls /proc/self/fd; grep -E 'Sig(Blk|Ign)' /proc/self/status")
    lines = attempt.stdout().split()
    assert lines[:4] == ["0", "1", "2", "3"]  # 3 is the listing's own
    assert (lines[4], lines[6], len(lines)) == ("SigBlk:", "SigIgn:", 8)
    # Signals 32 and 33 are the C library's own: a process that was given them blocked or ignored keeps them so.
    for mask in (lines[5], lines[7]):
        assert int(mask, 16) & ~0x1_8000_0000 == 0


def test_an_empty_environment_holds_only_what_psik_promises(attempt: Attempt) -> None:
    attempt.run("", argv=["/usr/bin/env"], inherit_environment=False, environment={"base": "b"})
    assert {line.split("=")[0] for line in attempt.stdout().split()} == {"base", "jobid", "jobndx", "nodes"}


def test_a_longer_script_ends_with_its_walltime(attempt: Attempt) -> None:
    outcome = attempt.run("sleep 300", walltime_s=0.3)
    assert outcome["reason"] == "walltime"
    assert attempt.processes() == []


def test_a_script_that_ignores_sigterm_is_killed_after_the_grace_time(
    attempt: Attempt, wait_until: Callable[..., None]
) -> None:
    attempt.plan("trap '' TERM; echo ready; while true; do sleep 0.1; done", grace_s=0.3)
    process = attempt.begin()
    wait_until(lambda: (attempt.folder / "stdout.1").exists() and "ready" in attempt.stdout(), 60, "script")
    process.terminate()
    process.wait(60)
    assert (attempt.exit()["reason"], attempt.exit()["code"]) == ("terminated", -signal.SIGKILL)
    assert attempt.processes() == []


def test_background_processes_and_daemons_end_with_their_script(attempt: Attempt) -> None:
    outcome = attempt.run("sleep 60 & setsid sleep 61 & (setsid setsid sleep 62 &) ; echo done")
    assert outcome["code"] == 0
    assert attempt.stdout() == "done\n"
    assert attempt.processes() == []


_A_MISSED_CHILD = """
import os, subprocess
from lclstream.jobs import runner
script = runner._Script.__new__(runner._Script)
script._runner, script.pid, script.code = os.getpid(), 0, 0
child = subprocess.Popen(["sleep", "300"])
child.returncode = 0  # whoever reaps it
answers = [{}]
everybody = runner.processes
runner.processes = lambda: answers.pop() if answers else everybody()
assert script.end_all(30.0)
assert runner.stat_of(child.pid) is None
"""


def test_a_process_that_is_started_while_the_runner_looks_at_the_others_ends_too() -> None:
    subprocess.run([sys.executable, "-c", _A_MISSED_CHILD], check=True, timeout=60)


def test_sigterm_ends_the_script_which_may_clean_up(attempt: Attempt, wait_until: Callable[..., None]) -> None:
    attempt.plan("trap 'echo cleaned; exit 0' TERM; echo ready; sleep 60")
    process = attempt.begin()
    wait_until(lambda: (attempt.folder / "stdout.1").exists() and "ready" in attempt.stdout(), 60, "script")
    process.terminate()
    process.wait(60)
    assert attempt.exit()["reason"] == "terminated"
    assert attempt.stdout() == "ready\ncleaned\n"


def test_of_several_runners_only_one_runs_the_script(attempt: Attempt) -> None:
    attempt.plan("echo once; sleep 0.3")
    codes = [process.wait(60) for process in [attempt.begin() for _ in range(4)]]
    assert sorted(codes) == [0, *[runner.SUPERSEDED] * 3]
    assert attempt.stdout() == "once\n"


def test_a_script_dies_with_its_runner(attempt: Attempt, wait_until: Callable[..., None]) -> None:
    attempt.plan("echo ready; exec sleep 60")
    process = attempt.begin()
    wait_until(lambda: (attempt.folder / "stdout.1").exists() and "ready" in attempt.stdout(), 60, "script")
    process.kill()
    process.wait(60)
    wait_until(lambda: attempt.processes() == [], 60, "end of the script")
    assert not (attempt.folder / "exit.json").exists()


def test_a_process_is_known_by_its_start_and_not_by_its_number() -> None:
    status = runner.stat_of(os.getpid())
    assert status is not None
    assert runner.is_alive(os.getpid(), status[3])
    assert not runner.is_alive(os.getpid(), status[3] - 1)


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("#!/bin/sh\ntrue", ["/bin/sh"]),
        ("#! /usr/bin/env python3\n", ["/usr/bin/env", "python3"]),
        ("#!/usr/bin/env -S python3 -u\r\n", ["/usr/bin/env", "-S python3 -u"]),
        ("true", ["/bin/bash"]),
        ("#!\ntrue", ["/bin/bash"]),
        ("", ["/bin/bash"]),
    ],
)
def test_the_first_line_chooses_the_interpreter_as_the_kernel_does(script: str, command: list[str]) -> None:
    assert interpreter(script) == command
