"""Whatever the demonstration starts ends with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lclstream.demo.processes import Children, DemoError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    made = Children(tmp_path / "logs", {"COLOUR": "blue"})
    yield made
    made.stop()


def test_a_program_that_ends_is_noticed_with_its_last_words(children: Children) -> None:
    child = children.start("broken", [sys.executable, "-c", "import sys; print('out of paper'); sys.exit(7)"])
    child.process.wait(60)
    with pytest.raises(DemoError, match=r"broken ended unexpectedly \(exit code 7\)[\s\S]*out of paper"):
        children.check()


def test_a_program_that_may_end_is_no_surprise_unless_it_failed(children: Children) -> None:
    good = children.start("writer", [sys.executable, "-c", ""], ends=True)
    good.process.wait(60)
    children.check()
    children.finish(good, timeout=1)
    bad = children.start("writer", [sys.executable, "-c", "raise SystemExit('disk full')"], ends=True)
    with pytest.raises(DemoError, match="disk full"):
        children.finish(bad, timeout=60)


def test_waiting_ends_when_a_program_dies(children: Children) -> None:
    children.start("broken", [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(DemoError, match="broken ended"):
        children.wait_until(lambda: False, timeout=30, what="never")


def test_waiting_is_bounded_and_says_for_what(children: Children) -> None:
    with pytest.raises(DemoError, match=r"Airflow is healthy: not within 0 s"):
        children.wait_until(lambda: False, timeout=0.3, what="Airflow is healthy")


def test_programs_get_our_environment_and_this_python_first(children: Children, tmp_path: Path) -> None:
    show = "import os; print(os.environ['COLOUR'], os.environ['PATH'].split(os.pathsep)[0])"
    said = children.run("show", [sys.executable, "-c", show], timeout=60).decode()
    assert said.split() == ["blue", str(Path(sys.executable).parent)]


def test_a_failed_run_shows_why(children: Children) -> None:
    with pytest.raises(DemoError, match="no such detector"):
        children.run("describe", [sys.executable, "-c", "raise SystemExit('no such detector')"], timeout=60)


def test_a_missing_program_is_named(children: Children) -> None:
    with pytest.raises(DemoError, match="no-such-program is not there"):
        children.start("x", ["no-such-program"])


def test_stop_ends_every_program_last_started_first(children: Children, tmp_path: Path) -> None:
    order = tmp_path / "order"
    program = (
        "import signal, sys, time\n"
        "def bye(*_):\n open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, bye); print('ready', flush=True); time.sleep(60)"
    )
    started = [children.start(name, [sys.executable, "-c", program, str(order), name]) for name in "abc"]
    children.wait_until(lambda: all("ready" in child.tail() for child in started), timeout=60, what="ready")
    assert children.stop() == []
    assert order.read_text() == "cba"
    assert all(child.process.poll() == 0 for child in started)


def test_stop_finds_what_programs_left_in_sessions_of_their_own(
    children: Children, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    note = tmp_path / "pid"
    launch = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[2:], start_new_session=True); "
        "open(sys.argv[1], 'w').write(str(p.pid))"
    )
    parent = children.start("launcher", [sys.executable, "-c", launch, str(note), *SLEEP], ends=True)
    children.finish(parent, timeout=60)
    pid = int(note.read_text())
    assert psutil.pid_exists(pid)
    (left,) = children.stop()
    assert str(pid) in left
    wait_until(lambda: not _runs(pid), 60, "end")


def test_a_stubborn_program_is_killed_and_reported(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lclstream.demo.processes.STOP_S", 0.5)
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); "
    child = children.start("mule", [sys.executable, "-c", program + "time.sleep(60)"])
    children.wait_until(lambda: "ready" in child.tail(), timeout=60, what="ready")
    assert children.stop() == [f"mule (pid {child.process.pid})"]
    assert child.process.poll() == -signal.SIGKILL


def test_a_killed_program_takes_what_it_forked_with_it_and_can_be_started_again(
    children: Children, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid}.part; mv {pid}.part {pid}; wait"
    children.start("part", ["/bin/sh", "-c", script])
    children.wait_until(pid.exists, timeout=60, what="the fork")
    children.kill("part")
    children.wait_until(lambda: not _runs(int(pid.read_text())), timeout=60, what="the end of the fork")
    children.check()
    with pytest.raises(DemoError, match="part is not running"):
        children.kill("part")
    children.start("part", ["/bin/sleep", "60"])
    assert children.stop() == []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_who_runs_can_be_read_at_any_moment(children: Children) -> None:
    over = threading.Event()
    seen: list[dict[str, int]] = []

    def read() -> None:
        note = children.logs.parent / "pids.json"
        while not over.is_set():
            if note.exists():
                seen.append(json.loads(note.read_text()))

    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read)
        child = children.start("sleeper", SLEEP)
        for _ in range(200):
            children._record()
        over.set()
        reading.result(60)
    assert seen[-1] == {"sleeper": child.process.pid}


def test_a_strangers_process_is_left_alone(children: Children) -> None:
    children.stop()
    assert psutil.pid_exists(os.getpid())
