from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from lclstream.arp.decisions import (
    Catalogue,
    Decision,
    Scope,
    decide,
    needs_catalogue,
    precheck,
    without_special_numbers,
)
from lclstream.arp.events import Crud, Event, FileEvent, JobEvent, RunEvent
from lclstream.elog.models import FileEntry, RunDocument, Trigger, WorkflowDefinition, WorkflowJob

SCOPE = Scope("s3df")
ENDED = "2026-03-01T12:01:00+00:00"
SENT = datetime(2026, 3, 1, 12, 1, 5, tzinfo=UTC)
LONG_AGO = "2026-02-20T12:01:00+00:00"


def definition(trigger: str = "START_OF_RUN", **changes: Any) -> WorkflowDefinition:
    fields = {
        "_id": "d1",
        "name": "stream",
        "executable": "airflow:stream_run",
        "trigger": trigger,
        "location": "s3df",
        "parameters": '{"stream_config": "/x.yaml"}',
        "run_as_user": "alice",
    }
    return WorkflowDefinition.model_validate(fields | changes)


def run(
    crud: str = "Create", experiment: str = "mfx1", num: int | str = 7, sent: datetime | None = SENT, **fields: Any
) -> RunEvent:
    document = {"num": num, "end_time": None, **fields}
    return RunEvent(experiment, Crud(crud), RunDocument.model_validate(document), document, sent)


def file(path: str = "/r7-s00-c000.xtc2", *locations: str, crud: str = "Update") -> FileEvent:
    return FileEvent("mfx1", Crud(crud), entry(path, *locations))


def entry(path: str, *locations: str) -> FileEntry:
    return FileEntry.model_validate({"path": path, "run_num": 7, "locations": {name: {} for name in locations}})


def job(crud: str = "Create", status: str = "START", **changes: Any) -> JobEvent:
    document = {"_id": "j1", "run_num": 7, "user": "bob", "status": status, "def": definition("MANUAL").document()}
    return JobEvent("mfx1", Crud(crud), WorkflowJob.model_validate(document | changes))


def catalogue(*files: FileEntry, end_time: str | None = ENDED) -> Catalogue:
    return Catalogue(RunDocument.model_validate({"num": 7, "end_time": end_time}), files)


def ids(decision: Decision) -> list[str]:
    return [dag_run.dag_run_id for dag_run in decision.dag_runs]


def test_the_start_of_a_run_starts_what_waits_for_it_with_everything_it_needs() -> None:
    event = run(params={"energy": math.nan})
    (dag_run,) = decide(event, [definition(), definition("END_OF_RUN", name="reduce")], SCOPE).dag_runs
    assert (dag_run.dag_id, dag_run.dag_run_id) == ("stream_run", "mfx1__r0007__start_of_run__stream")
    assert dag_run.conf(None) == {
        "experiment": "mfx1",
        "run": 7,
        "trigger": "START_OF_RUN",
        "definition": "stream",
        "location": "s3df",
        "user": "alice",
        "job_id": None,
        "run_document": {"num": 7, "end_time": None, "params": {"energy": "NaN"}},
        "parameters": {"stream_config": "/x.yaml"},
    }
    json.dumps(dag_run.conf(None), allow_nan=False)


def test_a_start_is_only_the_creation_never_an_update() -> None:
    assert decide(run("Update"), [definition()], SCOPE).not_for_us is not None


@pytest.mark.parametrize("crud", ["Create", "Update"])
def test_the_end_is_any_message_that_knows_it_and_has_one_id(crud: str) -> None:
    ended = run(crud, end_time=ENDED)
    later = run("Update", end_time=ENDED, params={"x": 1})
    reduce = definition("END_OF_RUN")
    assert ids(decide(ended, [reduce], SCOPE)) == ids(decide(later, [reduce], SCOPE))
    assert decide(run("Update"), [reduce], SCOPE).not_for_us is not None


@pytest.mark.parametrize(
    ("update", "ends"),
    [
        (run("Update", end_time=LONG_AGO, params={"hits": 1}), False),
        (run("Update", end_time="2026-02-28T12:01:00+00:00"), False),
        (run("Update", end_time="2026-02-28T12:02:00+00:00"), True),
        (run("Update", end_time="2026-03-01T12:03:00+00:00"), True),
        (run("Update", end_time=LONG_AGO, duration=0.0), True),
        (run("Update", end_time=LONG_AGO, sent=None), True),
    ],
)
def test_an_update_of_a_run_that_ended_long_ago_is_its_end_only_if_it_says_how_long_the_run_took(
    update: RunEvent, ends: bool
) -> None:
    there = catalogue(entry("/a", "s3df"), end_time=LONG_AGO)
    for trigger in ("END_OF_RUN", "ALL_FILES_TRANSFERRED", "ALL_NONREC_FILES_TRANSFERRED"):
        assert bool(decide(update, [definition(trigger)], SCOPE, there).dag_runs) is ends
    assert needs_catalogue(update, [definition("ALL_FILES_TRANSFERRED")]) is ends


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        ("dark", "dark", True),
        (9.5, "9.5", True),
        (9, "9.0", True),
        (True, "true", True),
        (True, "True", True),
        (True, "1", False),
        ("dark", "light", False),
        (math.nan, "nan", True),
        (None, "", False),
        (0, "", False),
        ([1], "[1]", True),
    ],
)
def test_a_parameter_is_compared_as_people_write_it(value: Any, wanted: Any, same: bool) -> None:
    waiting = definition("RUN_PARAM_IS_VALUE", run_param_name="A.B", run_param_value=wanted)
    assert bool(decide(run("Update", params={"A\uff0eB": value}), [waiting], SCOPE).dag_runs) is same
    edited = {"A\uff0eB": {"value": value, "modified_by": "alice"}}
    assert bool(decide(run("Update", editable_params=edited), [waiting], SCOPE).dag_runs) is same


def test_a_parameter_that_is_not_there_or_a_trigger_without_name_never_holds() -> None:
    for waiting in (
        definition("RUN_PARAM_IS_VALUE", run_param_name="x", run_param_value="None"),
        definition("RUN_PARAM_IS_VALUE", run_param_value="1"),
    ):
        assert decide(run("Update", params={"y": 1}), [waiting], SCOPE).not_for_us is not None


def test_the_first_file_at_the_definitions_location_starts_once_however_many_come() -> None:
    first = definition("FIRST_FILE_TRANSFERRED")
    one = decide(file("/a", "s3df"), [first], SCOPE, catalogue(end_time=None))
    other = decide(file("/b", "olcf", "s3df"), [first], SCOPE, catalogue(end_time=None))
    assert ids(one) == ids(other) == ["mfx1__r0007__first_file_transferred__stream"]
    assert one.dag_runs[0].conf(None)["run_document"] == {"num": 7, "end_time": None}
    assert decide(file("/a", "olcf"), [first], SCOPE, catalogue()).not_for_us is not None
    assert precheck(file("/a"), SCOPE) is not None


@pytest.mark.parametrize(
    ("files", "end_time", "all_files", "all_but_recorders"),
    [
        ([("/r7-s00-c000.xtc2", "s3df"), ("/r7-s01-c000.xtc2", "s3df")], ENDED, True, True),
        ([("/r7-s00-c000.xtc2", "s3df"), ("/r7-s80-c000.xtc2", "olcf")], ENDED, False, True),
        ([("/r7-s00-c000.xtc2", "s3df"), ("/r7-s01-c000.xtc2",)], ENDED, False, False),
        ([("/r7-s00-c000.xtc2", "s3df")], None, False, False),
        ([], ENDED, False, False),
        ([("/r7-s81-c000.xtc2", "s3df")], ENDED, True, False),
        ([("/r7-s000-c000.xtc2", "s3df"), ("/r7-s080-c000.xtc2", "olcf")], ENDED, False, True),
    ],
)
@pytest.mark.parametrize("event", [file("/r7-s00-c000.xtc2", "s3df"), run("Update", end_time=ENDED)])
def test_all_files_are_there_when_the_run_has_ended_and_none_is_missing(
    event: Event, files: list[tuple[str, ...]], end_time: str | None, all_files: bool, all_but_recorders: bool
) -> None:
    known = catalogue(*(entry(path, *locations) for path, *locations in files), end_time=end_time)
    for trigger, expected in (
        ("ALL_FILES_TRANSFERRED", all_files),
        ("ALL_NONREC_FILES_TRANSFERRED", all_but_recorders),
    ):
        assert bool(decide(event, [definition(trigger)], SCOPE, known).dag_runs) is expected, trigger


def test_which_files_are_recorders_is_a_setting() -> None:
    known = catalogue(entry("/a.xtc2", "s3df"), entry("/slow/b.h5"))
    scope = Scope("s3df", recorder_files=re.compile("^/slow/"))
    assert decide(file("/a.xtc2", "s3df"), [definition("ALL_NONREC_FILES_TRANSFERRED")], scope, known).dag_runs


def test_a_job_asked_for_by_hand_is_done_each_time_it_is_asked_for() -> None:
    first = decide(job(), [], SCOPE, catalogue(end_time=None))
    again = decide(job(**{"_id": "j2"}), [], SCOPE, catalogue(end_time=None))
    assert ids(first) == ["mfx1__r0007__manual__stream__j1"]
    assert ids(again) == ["mfx1__r0007__manual__stream__j2"]
    conf = first.dag_runs[0].conf(first.dag_runs[0].job_id)
    assert (conf["trigger"], conf["user"], conf["job_id"]) == ("MANUAL", "bob", "j1")
    assert conf["run_document"] == {"num": 7, "end_time": None}


def test_a_workflow_with_another_trigger_can_be_asked_for_by_hand_too() -> None:
    (dag_run,) = decide(job(**{"def": definition("START_OF_RUN").document()}), [], SCOPE, catalogue()).dag_runs
    assert dag_run.trigger == Trigger.MANUAL


@pytest.mark.parametrize(
    "event",
    [
        job("Update", "RUNNING"),
        job("Delete"),
        job("Create", "RUNNING"),
        job(**{"def": definition("MANUAL", location="olcf").document()}),
        job(**{"def": definition("MANUAL", executable="/bin/batch").document()}),
        run("Delete"),
    ],
)
def test_jobs_that_run_already_or_belong_elsewhere_and_deletions_start_nothing(event: Event) -> None:
    assert decide(event, [definition()], SCOPE, catalogue()).not_for_us is not None


def test_a_job_without_its_definition_cannot_be_done() -> None:
    (invalid,) = decide(job(**{"def": None}), [], SCOPE, catalogue()).invalid
    assert "without its workflow definition" in invalid.reason


@pytest.mark.parametrize(
    "other", [{"location": "olcf"}, {"executable": "/sdf/batch.sh"}, {"trigger": "MANUAL"}, {"trigger": "NEW_ONE"}]
)
def test_definitions_of_others_are_not_an_error(other: dict[str, str]) -> None:
    decision = decide(run(), [definition(**other)], SCOPE)
    assert decision.not_for_us is not None
    assert not decision.dag_runs
    assert not decision.invalid


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parameters": "--fast"}, "not JSON"),
        ({"executable": "airflow:"}, "names no DAG"),
        ({"executable": "airflow:../x y"}, "names no DAG"),
    ],
)
def test_a_definition_that_cannot_be_followed_is_said_and_the_others_are(change: dict[str, str], why: str) -> None:
    decision = decide(run(), [definition(**change), definition(name="good")], SCOPE)
    assert ids(decision) == ["mfx1__r0007__start_of_run__good"]
    assert why in decision.invalid[0].reason


@pytest.mark.parametrize(
    ("patterns", "experiment", "covered"),
    [((), "mfx1", True), (("mfx*",), "mfx1", True), (("mfx*", "tmox1"), "tmox1", True), (("mfx*",), "tmox1", False)],
)
def test_experiments_are_chosen_by_name_or_pattern(patterns: tuple[str, ...], experiment: str, covered: bool) -> None:
    decision = decide(run(experiment=experiment), [definition()], Scope("s3df", patterns))
    assert bool(decision.dag_runs) is covered
    assert (decision.not_for_us is None) is covered


@pytest.mark.parametrize(
    ("event", "trigger", "needed"),
    [
        (run(), "ALL_FILES_TRANSFERRED", False),
        (run("Update", end_time=ENDED), "ALL_FILES_TRANSFERRED", True),
        (run("Update", end_time=ENDED), "END_OF_RUN", False),
        (file("/a", "s3df"), "FIRST_FILE_TRANSFERRED", True),
        (file("/a", "s3df"), "START_OF_RUN", False),
        (job(), "MANUAL", True),
    ],
)
def test_the_logbook_is_asked_for_files_only_where_they_matter(event: Event, trigger: str, needed: bool) -> None:
    assert needs_catalogue(event, [definition(trigger)]) is needed


def test_special_numbers_become_text_wherever_they_are() -> None:
    value = {"a": [math.nan, {"b": -math.inf}], "c": math.inf, "d": 1.5}
    assert without_special_numbers(value) == {"a": ["NaN", {"b": "-Infinity"}], "c": "Infinity", "d": 1.5}
