"""A demonstration counts as successful only when every event arrived exactly once and nothing was left."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lclstream.demo.airflow import Airflow
from lclstream.demo.processes import DemoError
from lclstream.demo.report import Summary
from lclstream.demo.workspace import Workspace, free_port_range

GOOD = {"events_expected": 9, "events_received": 9, "events_unique": 9, "dag_run_state": "success"}


def test_all_is_well_when_every_event_came_once() -> None:
    assert Summary(**GOOD).ok  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"events_received": 8, "events_unique": 8},
        {"events_received": 10},
        {"events_unique": 8},
        {"events_expected": None},
        {"dag_run_state": "failed"},
        {"left_behind": ["nngstream (pid 7)"]},
        {"error": "Kafka did not answer"},
    ],
)
def test_anything_else_is_not(change: dict[str, Any]) -> None:
    assert not Summary(**{**GOOD, **change}).ok


def test_the_table_and_the_file_say_the_same(tmp_path: Path) -> None:
    summary = Summary(experiment="tmo", run=3, run_start_to_dag_run_s=0.5, **GOOD)  # type: ignore[arg-type]
    summary.write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["events_received"] == 9
    text = io.StringIO()
    summary.show(Console(file=text, width=100))
    assert "9 (9 different)" in text.getvalue()
    assert "0.5 s" in text.getvalue()


def test_a_folder_in_use_is_refused_and_a_left_one_is_emptied(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "demo")
    (first / "data/old.xtc2").touch()
    with pytest.raises(DemoError, match="another demonstration is running"):
        Workspace(tmp_path / "demo")
    first.release()
    second = Workspace(tmp_path / "demo")
    assert not (second / "data/old.xtc2").exists()
    assert second.write_secret("password", "x").stat().st_mode & 0o777 == 0o600
    second.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="--folder"):
        Workspace(tmp_path / "file/demo")


def test_port_ranges_are_neighbours() -> None:
    first, last = free_port_range(12)
    assert last - first == 11


def test_a_tasks_log_is_reduced_to_its_errors(tmp_path: Path) -> None:
    detail = [{"exc_type": "ServiceError", "exc_value": "no such detector"}, {"exc_type": "HTTPStatusError"}]
    lines = [
        json.dumps({"level": "info", "event": "starting"}),
        "not JSON",
        json.dumps({"level": "error", "event": "Task failed", "error_detail": detail}),
        json.dumps({"level": "error", "event": "lost contact"}),
    ]
    log = tmp_path / "attempt=1.log"
    log.write_text("\n".join(lines))
    assert Airflow.errors_in(log) == ["ServiceError: no such detector", "lost contact"]
