from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from lclstream.elog.client import ElogClient
from lclstream_airflow.hooks.elog import ElogHook
from lclstream_airflow.operators import elog as elog_module
from lclstream_airflow.operators.elog import ElogOperator


def operator(**arguments: Any) -> ElogOperator:
    return ElogOperator(**{"task_id": "report", "experiment": "mfx100", **arguments})


def test_results_become_run_parameters(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run("mfx100")
    results = {
        "events": 200,
        "rate_hz": 119.5,
        "complete": True,
        "pulse_energy": {"mean": 1.5, "unit": "mJ"},
        "histogram": [1, 2, 3],
        "nothing": None,
        "note": "x" * 2000,
    }
    for _ in range(2):
        written = operator(run=str(run.num), run_params=results, prefix="stream_").execute(context)
    assert written == {
        "stream_events": 200,
        "stream_rate_hz": 119.5,
        "stream_complete": True,
        "stream_pulse_energy_mean": 1.5,
        "stream_pulse_energy_unit": "mJ",
        "stream_note": "x" * 1000,
    }
    assert elog.run("mfx100", run.num).parameters() == written
    assert context["ti"].xcoms["run_link"].endswith(f"/lgbk/mfx100/ws/runs/{run.num}")


@pytest.mark.parametrize("only", [["events", "hits"], '["events", "hits"]'])
def test_only_chosen_results_become_run_parameters(elog: ElogClient, context: dict[str, Any], only: Any) -> None:
    run = elog.start_run("mfx103")
    results = {"events": 7, "hits": 3, "peak_method": "a long story"}
    assert operator(experiment="mfx103", run=run.num, run_params=results, only=only).execute(context) == {
        "events": 7,
        "hits": 3,
    }


def test_a_choice_that_is_no_list_of_names_is_refused(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run("mfx104")
    for wrong in ("events", '{"events": 1}', [1]):
        with pytest.raises(AirflowFailException, match="only is"):
            operator(experiment="mfx104", run=run.num, run_params={"events": 7}, only=wrong).execute(context)


def test_counters_and_status_reach_the_workflow_job(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run("mfx101")
    definition = {
        "name": "stream",
        "executable": "airflow:stream_run",
        "trigger": "MANUAL",
        "location": "s3df",
        "parameters": "{}",
    }
    elog.create_update_workflow_def("mfx101", definition)
    job = elog.create_workflow_job("mfx101", "stream", run.num)
    operator(
        experiment="mfx101", run=run.num, job_id=job.id, counters={"events": 7, "rate": "3 Hz"}, status="RUNNING"
    ).execute(context)
    (seen,) = elog.workflow_jobs("mfx101")
    assert seen.status == "RUNNING"
    assert {counter.key: counter.value for counter in seen.counters} == {"events": 7, "rate": "3 Hz"}


def test_a_comment_is_written_once_however_often_the_task_runs(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run("mfx105")
    for _ in range(2):
        operator(
            experiment="mfx105",
            run=str(run.num),
            comment="12 % hits\n",
            comment_title="LCLStream",
            comment_tags="DARK HITS",
        ).execute(context)
    operator(experiment="mfx105", run=run.num, comment="13 % hits", comment_tags=["HITS"]).execute(context)
    operator(experiment="mfx105", run="None", comment="the hutch is searched").execute(context)
    first, second, third = elog.elog_entries("mfx105")
    assert (first.content.strip(), first.title, first.run_num, first.tags) == (
        "12 % hits", "LCLStream", run.num, ["DARK", "HITS"],
    )  # fmt: skip
    assert (second.content, second.title) == ("13 % hits", None)
    assert (third.content, third.run_num) == ("the hutch is searched", None)
    assert elog.runs_with_tag("mfx105", "DARK") == [run.num]


def test_files_are_registered_where_they_are(elog: ElogClient, context: dict[str, Any]) -> None:
    run = elog.start_run("mfx106")
    for _ in range(2):
        operator(experiment="mfx106", run=run.num, files='["/scratch/a.h5"]', location="OLCF").execute(context)
    operator(experiment="mfx106", run=run.num, files=["/scratch/b.h5"], location="").execute(context)
    (file,) = elog.files("mfx106", run.num)
    assert (file.path, list(file.locations)) == ("/scratch/a.h5", ["OLCF"])


def test_nothing_to_say_is_no_error(elog: ElogClient, context: dict[str, Any]) -> None:
    elog.start_run("mfx102")
    assert operator(experiment="mfx102", run=1, run_params={}, job_id="None", status="DONE").execute(context) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": 99, "run_params": {"a": 1}}, "99"),
        ({"run": None, "run_params": {"a": 1}}, "run is empty"),
        ({"run": 1, "experiment": "", "run_params": {"a": 1}}, "experiment is empty"),
        ({"run": 1, "experiment": "None", "comment": "12 % hits"}, "experiment is empty"),
        ({"run": 1, "run_params": "{'a': 1}"}, "run_params is a str, not an object"),
    ],
)
def test_what_the_logbook_refuses_is_not_tried_again(
    elog: ElogClient, context: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    elog.start_run("mfx100")
    with pytest.raises(AirflowFailException, match=message):
        operator(**arguments).execute(context)


def test_a_logbook_that_is_away_may_come_back(
    elog: ElogClient, context: dict[str, Any], connection: Any, airflow_identity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elog_module, "START_PATIENCE_S", 0.2)
    connection("elog_default", "elog", "https://127.0.0.1:9", airflow_identity.folder)
    with pytest.raises(AirflowException, match="cannot be reached") as caught:
        operator(run=1, run_params={"a": 1}).execute(context)
    assert not isinstance(caught.value, AirflowFailException)


def test_the_test_button_finds_the_logbook(elog: ElogClient) -> None:
    works, words = ElogHook().test_connection()
    assert works, words
    assert words.endswith("answers.")
