"""A backfill against a small Airflow that keeps DAG runs as the real one does: ids are unique, runs take their time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from typer.testing import CliRunner

from lclstream.backfill.cli import app
from lclstream.backfill.runs import Reprocess, RunsError, Step, backfill_run_id, parse_runs, step


class SmallAirflow:
    """DAG runs that end after a few looks; `worst` is how many were under way at once."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.fails: set[str] = set()
        self.away = 0
        self.worst = 0
        self.cleared: list[str] = []
        self.app = FastAPI()
        self.app.post("/auth/token")(lambda: {"access_token": "t"})
        self.app.post("/api/v2/dags/{dag}/dagRuns")(self.create)
        self.app.get("/api/v2/dags/{dag}/dagRuns/{run}")(self.show)
        self.app.post("/api/v2/dags/{dag}/dagRuns/{run}/clear")(self.clear)

    async def create(self, dag: str, request: Request) -> dict[str, Any]:
        body = await request.json()
        if dag != "backfill_run":
            raise HTTPException(404, f"no DAG {dag}")
        if body["dag_run_id"] in self.runs:
            raise HTTPException(409, "there is one")
        self.runs[body["dag_run_id"]] = {"state": "queued", "looks": 2, "conf": body["conf"]}
        if self.away:
            self.away -= 1
            raise HTTPException(500, "database is locked")
        return {}

    def show(self, dag: str, run: str) -> dict[str, Any]:
        if run not in self.runs:
            raise HTTPException(404, "none")
        active = [entry for entry in self.runs.values() if entry["state"] == "queued"]
        self.worst = max(self.worst, len(active))
        found = self.runs[run]
        found["looks"] -= 1
        if found["looks"] <= 0 and found["state"] == "queued":
            found["state"] = "failed" if run in self.fails else "success"
        return {"dag_run_id": run, "state": found["state"], "conf": found["conf"]}

    def clear(self, dag: str, run: str) -> dict[str, Any]:
        self.cleared.append(run)
        self.runs[run].update(state="queued", looks=2)
        return {}


@pytest.fixture
def airflow(free_port: Callable[..., int], wait_until: Callable[..., None]) -> Iterator[SmallAirflow]:
    small = SmallAirflow()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(small.app, port=port, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 60, "start of the small Airflow")
    small.url = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield small
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def run(airflow: Any, tmp_path: Path) -> Any:
    password = tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o600)
    file = tmp_path / "parameters.yaml"
    file.write_text("stream_config: /a.yaml\nanalysis_job: /b.yaml\n")

    def command(*words: str, parameters: bool = True) -> Any:
        options = ["--airflow", airflow.url, "--password-file", str(password), "--poll", "0.05"]
        options += ["--parameters", str(file)] if parameters and "--parameters" not in words else []
        return CliRunner().invoke(app, [*words, *options])

    return command


def test_every_run_gets_one_dag_run_and_never_too_many_at_once(run: Any, airflow: SmallAirflow) -> None:
    answer = run("mfx100", "3..8,12", "--max-active", "2")
    assert answer.exit_code == 0, answer.output
    assert sorted(airflow.runs) == [f"mfx100__r{number:04d}__backfill__backfill" for number in (3, 4, 5, 6, 7, 8, 12)]
    assert airflow.worst <= 2
    conf = airflow.runs["mfx100__r0012__backfill__backfill"]["conf"]
    assert (conf["experiment"], conf["run"]) == ("mfx100", 12)
    assert conf["parameters"] == {"stream_config": "/a.yaml", "analysis_job": "/b.yaml"}


def test_what_was_done_is_not_done_again_unless_asked(run: Any, airflow: SmallAirflow) -> None:
    failing = "mfx100__r0002__backfill__backfill"
    airflow.fails = {failing}
    assert run("mfx100", "1..3").exit_code == 1
    assert run("mfx100", "1..3").exit_code == 1
    assert airflow.cleared == []
    airflow.fails = set()
    assert run("mfx100", "1..3", "--reprocess", "failed").exit_code == 0
    assert airflow.cleared == [failing]
    assert run("mfx100", "1..3", "--reprocess", "completed").exit_code == 0
    assert len(airflow.cleared) == 4
    assert len(airflow.runs) == 3


def test_other_parameters_or_another_place_for_a_dag_run_there_is_are_refused_and_not_ignored(
    run: Any, airflow: SmallAirflow, tmp_path: Path
) -> None:
    failing = "mfx100__r0002__backfill__backfill"
    airflow.fails = {failing}
    assert run("mfx100", "1..3").exit_code == 1
    airflow.fails = set()
    corrected = tmp_path / "corrected.yaml"
    corrected.write_text("stream_config: /corrected.yaml\nanalysis_job: /b.yaml\n")
    for words in (["--parameters", str(corrected)], ["--location", "S3DF"]):
        answer = run("mfx100", "1..3", "--reprocess", "failed", *words)
        assert answer.exit_code == 2, answer.output
        assert failing in answer.output
        assert words[0] in answer.output
        assert "--name" in answer.output
    assert airflow.cleared == []
    # Runs that are not processed again keep what they had, and new ones get the new.
    assert run("mfx100", "1,4", "--reprocess", "failed", "--parameters", str(corrected)).exit_code == 0
    assert airflow.runs["mfx100__r0004__backfill__backfill"]["conf"]["parameters"]["stream_config"] == "/corrected.yaml"


def test_without_a_file_of_parameters_a_run_is_processed_again_with_those_it_had(
    run: Any, airflow: SmallAirflow
) -> None:
    failing = "mfx100__r0002__backfill__backfill"
    airflow.fails = {failing}
    assert run("mfx100", "2").exit_code == 1
    airflow.fails = set()
    assert run("mfx100", "2", "--reprocess", "failed", parameters=False).exit_code == 0
    assert airflow.cleared == [failing]


def test_the_location_reaches_the_dag(run: Any, airflow: SmallAirflow) -> None:
    assert run("mfx100", "1", "--location", "S3DF").exit_code == 0
    assert airflow.runs["mfx100__r0001__backfill__backfill"]["conf"]["location"] == "S3DF"
    assert run("mfx100", "2").exit_code == 0
    # A DAG may have a default of its own.
    assert "location" not in airflow.runs["mfx100__r0002__backfill__backfill"]["conf"]


def test_a_name_that_makes_too_long_an_id_is_said(run: Any) -> None:
    answer = run("mfx100", "1", "--name", "x" * 300)
    assert answer.exit_code == 2
    assert "choose a shorter --name" in answer.output


def test_a_dry_run_changes_nothing(run: Any, airflow: SmallAirflow) -> None:
    answer = run("mfx100", "1..3", "--dry-run")
    assert answer.exit_code == 0
    assert "create" in answer.output
    assert airflow.runs == {}


def test_a_lost_answer_makes_no_second_dag_run(run: Any, airflow: SmallAirflow) -> None:
    airflow.away = 1
    assert run("mfx100", "1").exit_code == 0
    assert len(airflow.runs) == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["mfx100", "1..x"], 2, "neither a run number nor a range"),
        (["mfx100", "5..3"], 2, "ends before it begins"),
        (["mfx100", "1", "--dag", "nothing"], 1, "no DAG nothing"),
        (["mfx100", "1", "--where", "a=1"], 2, "give its address with --elog"),
        (["mfx100", "all"], 2, "`all` asks the logbook"),
    ],
)
def test_what_is_wrong_is_said(run: Any, words: list[str], code: int, message: str) -> None:
    answer = run(*words)
    assert answer.exit_code == code, answer.output
    assert message in answer.output


def test_a_backfill_asks_the_logbook_which_runs_there_are(
    run: Any, airflow: SmallAirflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = run("mfx100", "1..3", "--elog", "https://127.0.0.1:9")
    assert answer.exit_code == 2
    assert "--credentials" in answer.output
    answer = run("mfx100", "1..3", "--elog", "https://127.0.0.1:9", "--credentials", str(tmp_path / "nowhere"))
    assert answer.exit_code == 2
    assert airflow.runs == {}


def test_runs_are_read_as_people_write_them() -> None:
    assert parse_runs("5, 1..3,2") == [1, 2, 3, 5]
    with pytest.raises(RunsError, match="more than 10000"):
        parse_runs("1..999999999")
    with pytest.raises(RunsError, match="--name"):
        backfill_run_id("mfx", 1, "x" * 300)


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        (None, [Step.CREATE] * 3),
        ("running", [Step.FOLLOW] * 3),
        ("queued", [Step.FOLLOW] * 3),
        ("failed", [Step.SKIP, Step.CLEAR, Step.CLEAR]),
        ("success", [Step.SKIP, Step.SKIP, Step.CLEAR]),
    ],
)
def test_the_step_for_each_state(state: str | None, steps: list[Step]) -> None:
    assert [step(state, reprocess) for reprocess in Reprocess] == steps
