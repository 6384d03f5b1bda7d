from __future__ import annotations

import json
from typing import Any

import pytest

from lclstream.arp.actions import Actions, Kind, RetryError
from lclstream.arp.airflow_rest import AirflowRefusalError, AirflowUnavailableError
from lclstream.arp.decisions import Scope
from lclstream.elog.client import ElogError
from lclstream.elog.models import FileEntry, RunDocument, WorkflowDefinition
from lclstream.security.errors import AuthenticationError, PeerError, ServiceError, UnreachableError

ENDED = "2026-03-01T12:01:00+00:00"


class Airflow:
    """Keeps DAG runs; `errors` are raised for the ids they are given for."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.errors: dict[str, Exception] = {}

    def create_dag_run(self, dag_id: str, dag_run_id: str, conf: dict[str, Any]) -> bool:
        if dag_id in self.errors:
            raise self.errors[dag_id]
        new = dag_run_id not in self.made
        self.made.setdefault(dag_run_id, conf)
        return new


class Logbook:
    """Definitions, one run and its files; `error` is raised by every call."""

    def __init__(self, *definitions: WorkflowDefinition) -> None:
        self.definitions = list(definitions)
        self.files_known: list[FileEntry] = []
        self.error: PeerError | None = None
        self.asked: list[bool] = []

    def of(self, experiment: str, *, fresh: bool) -> list[WorkflowDefinition]:
        self.asked.append(fresh)
        self._fail()
        return self.definitions

    def run(self, experiment: str, number: int | str) -> RunDocument:
        self._fail()
        return RunDocument.model_validate({"num": number, "end_time": ENDED})

    def files(self, experiment: str, number: int | str) -> list[FileEntry]:
        self._fail()
        return self.files_known

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def definition(name: str = "stream", trigger: str = "START_OF_RUN") -> WorkflowDefinition:
    return WorkflowDefinition.model_validate(
        {"name": name, "executable": f"airflow:{name}", "trigger": trigger, "location": "s3df"}
    )


def message(crud: str = "Create", **value: Any) -> bytes:
    return json.dumps({"experiment_name": "mfx1", "CRUD": crud, "value": {"num": 1, **value}}).encode()


def actions(airflow: Airflow, logbook: Logbook) -> Actions:
    return Actions(Scope("s3df"), logbook, airflow, logbook)  # type: ignore[arg-type]


def test_the_same_message_twice_makes_one_dag_run_and_both_are_done() -> None:
    airflow, logbook = Airflow(), Logbook(definition())
    outcomes = [actions(airflow, logbook).handle("runs", message()).kind for _ in range(2)]
    assert outcomes == [Kind.MADE, Kind.EXISTED]
    assert list(airflow.made) == ["mfx1__r0001__start_of_run__stream"]


def test_definitions_are_asked_for_anew_when_a_run_starts_and_not_for_every_parameter() -> None:
    logbook = Logbook(definition())
    for crud in ("Create", "Update"):
        actions(Airflow(), logbook).handle("runs", message(crud))
    assert logbook.asked == [True, False]


def test_one_workflow_that_airflow_refuses_does_not_keep_the_other_from_starting() -> None:
    airflow = Airflow()
    airflow.errors["gone"] = AirflowRefusalError("no such DAG", status=404, detail="no such DAG")
    outcome = actions(airflow, Logbook(definition("gone"), definition("stream"))).handle("runs", message())
    assert outcome.kind == Kind.DEAD_LETTER
    assert outcome.made == ["mfx1__r0001__start_of_run__stream"]
    assert outcome.rejected == ["workflow 'gone': no such DAG"]


@pytest.mark.parametrize(("status", "suspicious"), [(None, False), (500, True)])
def test_an_airflow_that_fails_means_try_again(status: int | None, suspicious: bool) -> None:
    airflow = Airflow()
    airflow.errors["stream"] = AirflowUnavailableError("down", answered_with=status)
    with pytest.raises(RetryError) as retry:
        actions(airflow, Logbook(definition())).handle("runs", message())
    assert retry.value.suspicious is suspicious


@pytest.mark.parametrize(
    "error",
    [
        UnreachableError("nobody"),
        AuthenticationError("certificate"),
        ServiceError("bad gateway", status=502, detail=""),
        ServiceError("slow down", status=429, detail=""),
        ElogError("an HTML page", errormsg=""),
    ],
)
def test_a_logbook_that_says_nothing_means_that_we_do_not_know(error: PeerError) -> None:
    logbook = Logbook(definition())
    logbook.error = error
    with pytest.raises(RetryError):
        actions(Airflow(), logbook).handle("runs", message())


@pytest.mark.parametrize(
    "error", [ServiceError("no such experiment", status=404, detail=""), ElogError("refused", errormsg="refused")]
)
def test_a_logbook_that_says_no_means_dead_letter(error: PeerError) -> None:
    logbook = Logbook(definition())
    logbook.error = error
    assert actions(Airflow(), logbook).handle("runs", message()).kind == Kind.DEAD_LETTER


def test_the_logbook_is_not_asked_for_what_is_not_for_us() -> None:
    logbook = Logbook()
    outcome = actions(Airflow(), logbook).handle("file_catalog", message(path="/a", run_num=1))
    assert outcome.kind == Kind.NOT_FOR_US
    assert logbook.asked == []


def test_files_are_looked_up_when_a_workflow_waits_for_all_of_them() -> None:
    airflow, logbook = Airflow(), Logbook(definition(trigger="ALL_FILES_TRANSFERRED"))
    for locations, expected in (({}, 0), ({"s3df": {}}, 1)):
        logbook.files_known = [FileEntry.model_validate({"path": "/a", "run_num": 1, "locations": locations})]
        actions(airflow, logbook).handle("runs", message("Update", end_time=ENDED))
        assert len(airflow.made) == expected


def test_the_log_line_says_what_was_decided() -> None:
    airflow, logbook = Airflow(), Logbook(definition())
    assert str(actions(airflow, logbook).handle("runs", message())) == (
        "mfx1 run 1: made mfx1__r0001__start_of_run__stream"
    )
    assert "not for us: no trigger of 1 workflow(s) fits" in str(
        actions(airflow, logbook).handle("runs", message("Update"))
    )
