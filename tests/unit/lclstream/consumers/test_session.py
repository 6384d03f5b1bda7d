"""A session is a process with a letter box."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANALYSIS = """
case "$LCLSTREAM_RUN" in
  bad) exit 3;;
  long) sleep 60;;
esac
printf '{"run": "%s", "url": "%s"}' "$LCLSTREAM_RUN" "$LCLSTREAM_URL" > result.json
"""


def put(folder: Path, name: str, **letter: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f".{name}").write_text(json.dumps(letter))
    (folder / f".{name}").replace(folder / f"{name}.json")


def answer(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outbox" / f"{name}.json").read_text())
    return found


def test_streams_are_analysed_as_they_come_until_the_end_is_asked_for(
    tmp_path: Path, start: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    box, inbox = tmp_path / "job", tmp_path / "job" / "inbox"
    box.mkdir()
    put(inbox, "r0001", run="1", url="tcp://a:1")
    put(inbox, "r0002", run="bad", url="tcp://a:2", IGNORED="$(touch /tmp/x)")
    session = start("lclstream", "session", "--folder", box, "--at-once", 2, "--", "/bin/sh", "-c", ANALYSIS)
    wait_until((box / "outbox" / "r0002.json").exists, 60, "the second answer")
    (inbox / "half.json").write_text('{"run": ')
    put(inbox, "r0003", run="long", url="tcp://a:3")
    wait_until((box / "r0003").exists, 60, "the third analysis")
    (inbox / "r0003.cancel").touch()
    wait_until((box / "outbox" / "r0003.json").exists, 60, "its end")
    (inbox / "half.json").write_text('{"run": 4, "url": "tcp://a:4"}')
    wait_until((box / "outbox" / "half.json").exists, 60, "the fourth answer")
    (inbox / "broken.json").write_text("{")
    (inbox / "end").touch()
    assert session.wait() == 0, session.output()
    assert answer(box, "r0001") == {"state": "done", "exit_code": 0, "result": {"run": "1", "url": "tcp://a:1"}}
    assert answer(box, "r0002") == {"state": "failed", "exit_code": 3, "result": {}}
    assert answer(box, "r0003")["state"] == "cancelled"
    assert answer(box, "broken")["state"] == "failed"
    assert answer(box, "half")["result"] == {"run": "4", "url": "tcp://a:4"}
    assert json.loads((box / "result.json").read_text()) == {
        "acquisitions": 5, "done": 2, "failed": 2, "cancelled": 1,
    }  # fmt: skip


def test_a_command_that_is_not_there_is_told(tmp_path: Path, start: Callable[..., Any]) -> None:
    put(tmp_path / "inbox", "r0001", run="1")
    session = start("lclstream", "session", "--folder", tmp_path, "--", "/nowhere/analyse")
    assert session.wait() == 2
    assert "/nowhere/analyse: cannot be started" in session.output()


def test_a_signal_ends_the_analyses_too(
    tmp_path: Path, start: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    put(tmp_path / "inbox", "r0001", run="long")
    session = start("lclstream", "session", "--folder", tmp_path, "--", "/bin/sh", "-c", ANALYSIS)
    wait_until((tmp_path / "r0001").exists, 60, "the analysis")
    session.signal(signal.SIGTERM)
    assert session.wait() == 143
    assert answer(tmp_path, "r0001")["state"] == "cancelled"
