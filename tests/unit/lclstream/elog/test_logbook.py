from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from lclstream.elog.config import LocationConfig
from lclstream.elog.database import Message, open_database
from lclstream.elog.logbook import Logbook, RefusedError, UnknownExperimentError

EXPERIMENT = "mfx100852324"
STREAM = {
    "name": "stream",
    "executable": "airflow:stream_run",
    "trigger": "START_OF_RUN",
    "location": "s3df",
    "parameters": "{}",
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path}/elog.sqlite")
    yield engine
    engine.dispose()


@pytest.fixture
def book(engine: Engine) -> Logbook:
    return Logbook(engine)


def messages(engine: Engine, topic: str) -> list[dict[str, Any]]:
    with Session(engine) as session:
        rows = session.scalars(select(Message.payload).where(Message.topic == topic).order_by(Message.id))
        return [json.loads(payload) for payload in rows]


def test_starting_a_run_publishes_its_document(book: Logbook, engine: Engine) -> None:
    run = book.start_run(EXPERIMENT, params={"energy": 9.5})
    assert run["num"] == 1
    assert run["end_time"] is None
    assert run["begin_time"].endswith("+00:00")
    assert messages(engine, "runs") == [{"experiment_name": EXPERIMENT, "CRUD": "Create", "value": run}]


def test_runs_are_numbered_from_one_and_a_number_given_by_hand_is_not_given_again(book: Logbook) -> None:
    numbers = [book.start_run(EXPERIMENT)["num"], book.start_run(EXPERIMENT, run_num="5")["num"]]
    assert [*numbers, book.start_run(EXPERIMENT)["num"]] == [1, 5, 6]


def test_the_same_run_is_not_started_twice_and_a_refusal_publishes_nothing(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT, run_num="3")
    before = messages(engine, "runs")
    with pytest.raises(RefusedError, match="already has a run 3"):
        book.start_run(EXPERIMENT, run_num="3")
    assert messages(engine, "runs") == before
    current = book.current_run(EXPERIMENT)
    assert current is not None
    assert current["end_time"] is None


def test_starting_a_run_ends_an_open_one_first(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.start_run(EXPERIMENT)
    said = [(m["CRUD"], m["value"]["num"], m["value"]["end_time"] is None) for m in messages(engine, "runs")]
    assert said == [("Create", 1, True), ("Update", 1, False), ("Create", 2, True)]


def test_the_end_says_duration_and_files_and_later_updates_do_not(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.register_file(EXPERIMENT, {"path": "/data/r0001-s00.xtc2"})
    ended = book.end_run(EXPERIMENT)
    assert ended["duration"] >= 0
    assert [file["path"] for file in ended["file_catalog"]] == ["/data/r0001-s00.xtc2"]
    book.add_run_params(EXPERIMENT, {"events": 200})
    last = messages(engine, "runs")[-1]["value"]
    assert last["end_time"] == ended["end_time"]
    assert "duration" not in last
    assert "file_catalog" not in last


def test_parameter_names_are_escaped_and_nan_survives(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.add_run_params(EXPERIMENT, {"MFX:DG1.RBV": math.nan, "$cost": math.inf})
    with Session(engine) as session:
        payload = session.scalars(select(Message.payload).order_by(Message.id.desc()).limit(1)).one()
    assert "NaN" in payload
    assert "Infinity" in payload
    assert set(json.loads(payload)["value"]["params"]) == {"MFX:DG1\uff0eRBV", "\uff04cost"}


@pytest.mark.parametrize("number", ["0", "-4", str(2**63)])
def test_a_run_number_that_cannot_be_is_refused(book: Logbook, number: str) -> None:
    with pytest.raises(RefusedError, match="must be between 1 and"):
        book.start_run(EXPERIMENT, run_num=number)


def test_runs_may_have_names_instead_of_numbers(book: Logbook) -> None:
    assert book.start_run("cryo01", run_num="grid7_0012")["num"] == "grid7_0012"
    current = book.current_run("cryo01")
    assert current is not None
    assert current["num"] == "grid7_0012"
    assert book.run("cryo01", "grid7_0012")["type"] == "DATA"


def test_a_name_of_digits_is_another_run_than_the_number(book: Logbook) -> None:
    for name in ("0007", "7", "2024_01"):
        book.start_run("cryo01", run_num=name)
    assert [book.run("cryo01", name)["num"] for name in ("0007", "7", "2024_01")] == ["0007", 7, "2024_01"]


def test_after_a_run_with_a_name_the_end_ends_the_run_that_was_started_last(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.start_run(EXPERIMENT, run_num="alignment")
    book.end_run(EXPERIMENT)
    assert book.start_run(EXPERIMENT)["num"] == 2
    assert book.end_run(EXPERIMENT)["num"] == 2
    assert (book.current_run(EXPERIMENT) or {})["num"] == 2


def test_after_a_run_with_a_name_the_next_start_ends_the_run_that_was_open(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.start_run(EXPERIMENT, run_num="alignment")
    book.end_run(EXPERIMENT)
    book.start_run(EXPERIMENT)
    book.start_run(EXPERIMENT)
    assert book.run(EXPERIMENT, "2")["end_time"] is not None
    said = [(m["CRUD"], m["value"]["num"]) for m in messages(engine, "runs")[-3:]]
    assert said == [("Create", 2), ("Update", 2), ("Create", 3)]


def test_a_run_started_earlier_by_the_clock_but_later_in_fact_is_the_current_one(book: Logbook) -> None:
    book.start_run(EXPERIMENT, run_num="5")
    book.start_run(EXPERIMENT, run_num="3", start_time=datetime(2020, 1, 1, tzinfo=UTC))
    assert book.end_run(EXPERIMENT)["num"] == 3


def test_in_a_database_from_before_the_highest_number_is_the_current_run(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT, run_num="5")
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE latest_runs")
    open_database(str(engine.url)).dispose()
    assert book.end_run(EXPERIMENT)["num"] == 5
    assert book.start_run(EXPERIMENT)["num"] == 6
    assert book.end_run(EXPERIMENT)["num"] == 6


def test_current_run_can_leave_out_closed_ones(book: Logbook) -> None:
    book.start_run(EXPERIMENT)
    book.end_run(EXPERIMENT)
    assert book.current_run(EXPERIMENT) is not None
    assert book.current_run(EXPERIMENT, skip_closed=True) is None


def test_ending_without_any_run_is_refused(engine: Engine) -> None:
    book = Logbook(engine, experiments=[EXPERIMENT])
    with pytest.raises(RefusedError, match="has no run yet"):
        book.end_run(EXPERIMENT)


def test_with_a_list_of_experiments_there_are_no_others(engine: Engine) -> None:
    book = Logbook(engine, experiments=[EXPERIMENT])
    with pytest.raises(UnknownExperimentError):
        book.start_run("tmox42619")
    assert book.experiments() == [EXPERIMENT]


def test_reading_makes_no_experiment(book: Logbook) -> None:
    with pytest.raises(UnknownExperimentError):
        book.runs("tmox42619")
    assert book.experiments() == []


def test_runs_are_found_by_parameter_editable_value_and_tag(book: Logbook) -> None:
    for energy in (9, 9.5, 9):
        book.start_run(EXPERIMENT, params={"energy.kev": energy})
    assert book.runs_matching_params(EXPERIMENT, {"energy.kev": 9}) == [3, 1]
    book.update_editable(EXPERIMENT, "2", "Quality", "Good", "alice")
    assert book.runs_matching_editable(EXPERIMENT, "Quality", "^good$") == [2]
    with pytest.raises(RefusedError, match="not a regular expression"):
        book.runs_matching_editable(EXPERIMENT, "Quality", "(")
    book.write_entry(EXPERIMENT, "pedestal", "alice", run_num="2", title=None, tags=["DARK"])
    book.write_entry(EXPERIMENT, "no run", "alice", run_num=None, title=None, tags=["DARK"])
    assert book.runs_with_tag(EXPERIMENT, "DARK") == [2]


def test_an_editable_change_is_published_with_who_and_when(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.update_editable(EXPERIMENT, "1", "Quality", "Good", "alice")
    entry = messages(engine, "runs")[-1]["value"]["editable_params"]["Quality"]
    assert (entry["value"], entry["modified_by"]) == ("Good", "alice")
    assert entry["modified_time"].endswith("+00:00")


def test_a_file_is_published_when_registered_and_when_it_arrives(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    book.register_file(EXPERIMENT, {"path": "/a.xtc2", "run_num": 1, "size": 7})
    book.file_available(EXPERIMENT, "1", "/a.xtc2", "olcf")
    created, updated = messages(engine, "file_catalog")
    assert (created["CRUD"], created["value"]["size"], created["value"]["locations"]) == ("Create", 7, {})
    assert (updated["CRUD"], set(updated["value"]["locations"])) == ("Update", {"olcf"})
    with pytest.raises(RefusedError, match="register it first"):
        book.file_available(EXPERIMENT, "1", "/b.xtc2", "olcf")


def test_registering_a_file_again_replaces_it(book: Logbook) -> None:
    book.start_run(EXPERIMENT)
    book.register_file(EXPERIMENT, {"path": "/a.xtc2", "size": 7})
    book.register_file(EXPERIMENT, {"path": "/a.xtc2", "size": 8})
    assert [file["size"] for file in book.files(EXPERIMENT, "1")] == [8]


def test_a_definition_becomes_its_writers_and_names_are_unique(book: Logbook) -> None:
    made = book.write_definition(EXPERIMENT, STREAM, "alice")
    assert made["run_as_user"] == "alice"
    with pytest.raises(RefusedError, match="already is a workflow definition"):
        book.write_definition(EXPERIMENT, STREAM, "alice")
    changed = book.write_definition(EXPERIMENT, {**made, "location": "olcf"}, "bob")
    assert (changed["_id"], changed["run_as_user"], changed["location"]) == (made["_id"], "bob", "olcf")
    assert book.definitions(EXPERIMENT) == [changed]


@pytest.mark.parametrize("user", ["root", "mfxopr", "tmoopr"])
def test_operator_accounts_cannot_own_a_definition(book: Logbook, user: str) -> None:
    with pytest.raises(RefusedError, match="too many rights"):
        book.write_definition(EXPERIMENT, STREAM, user)


def test_a_parameter_trigger_needs_a_parameter(book: Logbook) -> None:
    with pytest.raises(RefusedError, match="run_param_name"):
        book.write_definition(EXPERIMENT, {**STREAM, "trigger": "RUN_PARAM_IS_VALUE"}, "alice")


def test_known_locations_are_the_only_ones(engine: Engine) -> None:
    book = Logbook(engine, locations={"s3df": LocationConfig()})
    book.write_definition(EXPERIMENT, STREAM, "alice")
    with pytest.raises(RefusedError, match="'nersc' is not one of s3df"):
        book.write_definition(EXPERIMENT, {**STREAM, "name": "other", "location": "nersc"}, "alice")


def test_a_job_goes_from_request_to_counters_to_deletion_and_each_step_is_published(
    book: Logbook, engine: Engine
) -> None:
    book.start_run(EXPERIMENT)
    definition = book.write_definition(EXPERIMENT, STREAM, "alice")
    job = book.create_job(EXPERIMENT, "stream", 1, "bob")
    assert (job["status"], job["user"], job["def"]["name"], job["experiment"]) == ("START", "bob", "stream", EXPERIMENT)
    changed = book.update_job(
        EXPERIMENT, job["_id"], {"status": "RUNNING", "counters": [{"key": "events", "value": 5}], "tool_id": ""}
    )
    assert (changed["status"], changed["counters"]) == ("RUNNING", [{"key": "events", "value": 5}])
    assert "tool_id" not in changed
    with pytest.raises(RefusedError, match="1 jobs refer"):
        book.delete_definition(EXPERIMENT, definition["_id"])
    book.delete_job(EXPERIMENT, job["_id"])
    assert [message["CRUD"] for message in messages(engine, "workflow_jobs")] == ["Create", "Update", "Delete"]
    book.delete_definition(EXPERIMENT, definition["_id"])
    assert book.definitions(EXPERIMENT) == []


def test_another_experiments_job_is_not_there(book: Logbook) -> None:
    book.start_run(EXPERIMENT)
    book.start_run("tmox42619")
    book.write_definition(EXPERIMENT, STREAM, "alice")
    job = book.create_job(EXPERIMENT, "stream", 1, "bob")
    with pytest.raises(RefusedError, match="has no workflow job"):
        book.update_job("tmox42619", job["_id"], {"status": "DONE"})


def test_jobs_are_listed_latest_run_first_in_the_order_they_were_asked_for(book: Logbook) -> None:
    book.write_definition(EXPERIMENT, STREAM, "alice")
    for _ in range(2):
        book.start_run(EXPERIMENT)
    first = [book.create_job(EXPERIMENT, "stream", num, "alice")["_id"] for num in (1, 2, 2)]
    assert [job["_id"] for job in book.jobs(EXPERIMENT)] == [first[1], first[2], first[0]]


def test_writers_at_the_same_time_get_different_numbers(book: Logbook) -> None:
    numbers: list[int] = []

    def start() -> None:
        for _ in range(5):
            numbers.append(book.start_run(EXPERIMENT)["num"])

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(numbers) == list(range(1, 21))


def test_the_outbox_says_how_much_waits_and_since_when(book: Logbook) -> None:
    assert book.waiting() == (0, None)
    book.start_run(EXPERIMENT)
    count, oldest = book.waiting()
    assert count == 2
    assert oldest is not None


def test_what_no_broker_takes_is_refused_and_changes_nothing(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT, params={"gas": 1})
    book.write_definition(EXPERIMENT, STREAM | {"parameters": "x" * 1_000_000}, "alice")
    before = messages(engine, "runs")
    much = {"image": "x" * 1_000_000}
    for refused in (
        lambda: book.add_run_params(EXPERIMENT, much),
        lambda: book.start_run(EXPERIMENT, params=much),
        lambda: book.register_file(EXPERIMENT, {"path": "/a.xtc2", **much}),
        lambda: book.create_job(EXPERIMENT, "stream", 1, "alice"),
    ):
        with pytest.raises(RefusedError, match=r"would have 100\d{4} bytes.*at most 900000: .*path"):
            refused()
    assert messages(engine, "runs") == before
    current = book.current_run(EXPERIMENT)
    assert current is not None
    assert (current["params"], current["end_time"]) == ({"gas": 1}, None)


def test_the_end_of_a_run_with_too_many_files_is_told_without_them(book: Logbook, engine: Engine) -> None:
    book.start_run(EXPERIMENT)
    for number in range(4):
        book.register_file(EXPERIMENT, {"path": f"/{number}.xtc2", "index": "x" * 300_000})
    ended = book.end_run(EXPERIMENT)
    assert len(ended["file_catalog"]) == 4
    told = messages(engine, "runs")[-1]["value"]
    assert "file_catalog" not in told
    assert (told["end_time"], told["duration"]) == (ended["end_time"], ended["duration"])


def test_a_run_that_is_as_large_as_it_can_be_ends_and_the_next_one_starts(book: Logbook, engine: Engine) -> None:
    document = book.start_run(EXPERIMENT, params={"fill": ""})
    envelope = {"experiment_name": EXPERIMENT, "CRUD": "Update", "value": document}
    book.add_run_params(EXPERIMENT, {"fill": "x" * (900_000 - len(json.dumps(envelope)))})
    with pytest.raises(RefusedError):
        book.add_run_params(EXPERIMENT, {"one": "more"})
    assert book.start_run(EXPERIMENT)["num"] == 2
    assert messages(engine, "runs")[-2]["value"]["duration"] >= 0
