from __future__ import annotations

from datetime import UTC, datetime

import pytest

from lclstream.elog.models import (
    RunDocument,
    WorkflowDefinition,
    WorkflowJob,
    escape_name,
    run_number,
    unescape_name,
)


def test_a_naive_time_means_utc() -> None:
    run = RunDocument.model_validate({"num": 3, "begin_time": "2026-03-01T12:00:00.5", "end_time": None})
    assert run.begin_time == datetime(2026, 3, 1, 12, 0, 0, 500000, tzinfo=UTC)


def test_unknown_fields_are_kept_and_unset_ones_stay_absent() -> None:
    document = {"_id": "x", "num": "grid7", "future": {"a": 1}}
    assert RunDocument.model_validate(document).document() == document


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), (7, 7), ("120", 120), ("0", 0), ("-4", -4), (str(2**63), 2**63)]
)
def test_what_is_written_like_a_run_number_is_one(text: str, number: int) -> None:
    assert run_number(text) == number


@pytest.mark.parametrize("name", ["grid7", "0007", "2024_01", "+7", " 7", "7\n", "\u0667", "-0", "", "9" * 5000])
def test_a_name_with_digits_stays_a_name(name: str) -> None:
    assert run_number(name) == name


def test_names_are_escaped_and_back() -> None:
    assert escape_name("A.B$") == "A\uff0eB\uff04"
    assert unescape_name(escape_name("A.B$")) == "A.B$"


def test_an_editable_parameter_wins_over_data_takings() -> None:
    run = RunDocument.model_validate(
        {"num": 1, "params": {"Quality": "?", "A\uff0eB": 2}, "editable_params": {"Quality": {"value": "Good"}}}
    )
    assert run.parameters() == {"Quality": "Good", "A.B": 2}


DEFINITION = {"name": "stream", "executable": "airflow:stream_run", "trigger": "START_OF_RUN", "location": "s3df"}


@pytest.mark.parametrize(("parameters", "value"), [("", {}), ("  ", {}), ('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1})])
def test_definition_parameters_are_an_object_or_its_text(parameters: object, value: object) -> None:
    definition = WorkflowDefinition.model_validate({**DEFINITION, "parameters": parameters})
    assert definition.parameter_object() == value


@pytest.mark.parametrize(("parameters", "why"), [("--fast", "not JSON"), ("[1]", "not list")])
def test_definition_parameters_that_are_no_object_are_explained(parameters: str, why: str) -> None:
    definition = WorkflowDefinition.model_validate({**DEFINITION, "parameters": parameters})
    with pytest.raises(ValueError, match=f"'stream'.*{why}"):
        definition.parameter_object()


def test_a_job_carries_its_definition_under_the_logbooks_name() -> None:
    job = WorkflowJob.model_validate({"_id": "j", "run_num": 4, "def": {**DEFINITION, "_id": "d"}})
    assert job.definition is not None
    assert job.definition.id == "d"
    assert job.document()["def"]["name"] == "stream"
