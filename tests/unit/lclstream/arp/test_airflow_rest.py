from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lclstream.arp.airflow_rest import AirflowClient, AirflowRefusalError, AirflowUnavailableError
from lclstream.arp.config import AirflowConfig
from lclstream.config_file import ConfigError

_FAKE = Path(__file__).parents[4] / "benchmarks" / "fake_airflow.py"


@pytest.fixture(scope="module")
def fake_airflow() -> Any:
    spec = importlib.util.spec_from_file_location("fake_airflow_for_units", _FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(fake_airflow: Any) -> Iterator[Any]:
    with fake_airflow.FakeAirflow() as server:
        yield server


@pytest.fixture
def password_file(tmp_path: Path, fake_airflow: Any) -> Path:
    path = tmp_path / "password"
    path.write_text(fake_airflow.PASSWORD)
    path.chmod(0o600)
    return path


@pytest.fixture
def airflow(server: Any, password_file: Path) -> Iterator[AirflowClient]:
    config = AirflowConfig(url=server.url, username="arp", password_file=password_file, timeout_s=30)
    with AirflowClient(config) as client:
        yield client


def test_a_dag_run_is_made_once_with_its_conf(airflow: AirflowClient, server: Any) -> None:
    assert airflow.create_dag_run("stream_run", "a__r0001", {"x": "\ud800"}) is True
    assert airflow.create_dag_run("stream_run", "a__r0001", {"x": 2}) is False
    assert server.conf("a__r0001") == {"x": "\ud800"}
    assert server.token_requests == 1


@pytest.mark.parametrize(
    ("fault", "answered"), [(500, 500), (502, None), (503, None), (429, None), ("drop", None), ("made-then-drop", None)]
)
def test_what_may_work_later_is_worth_another_attempt(
    airflow: AirflowClient, server: Any, fault: int | str, answered: int | None
) -> None:
    server.faults.append(fault)
    with pytest.raises(AirflowUnavailableError) as unavailable:
        airflow.create_dag_run("stream_run", "a", {})
    assert unavailable.value.answered_with == answered
    assert airflow.create_dag_run("stream_run", "a", {}) is (fault != "made-then-drop")


@pytest.mark.parametrize("status", [400, 403, 404, 422])
def test_a_refusal_is_final_and_has_airflows_words(airflow: AirflowClient, server: Any, status: int) -> None:
    server.faults.append(status)
    with pytest.raises(AirflowRefusalError, match=f"refuses a DAG run of stream_run with {status}") as refusal:
        airflow.create_dag_run("stream_run", "a", {})
    assert refusal.value.detail == f"fake answer {status} for stream_run"


def test_a_token_that_is_no_longer_taken_is_renewed_within_the_call(airflow: AirflowClient, server: Any) -> None:
    airflow.create_dag_run("stream_run", "a", {})
    server.tokens.clear()
    assert airflow.create_dag_run("stream_run", "b", {}) is True
    assert server.token_requests == 2


def test_a_wrong_password_may_be_corrected_and_is_not_in_the_message(
    airflow: AirflowClient, server: Any, password_file: Path
) -> None:
    password_file.write_text("guess-me-not")
    with pytest.raises(AirflowUnavailableError, match="does not accept user 'arp'") as refused:
        airflow.create_dag_run("stream_run", "a", {})
    assert "guess-me-not" not in str(refused.value)
    assert refused.value.answered_with == 401
    password_file.write_text(server.password)
    assert airflow.create_dag_run("stream_run", "a", {}) is True


def test_an_airflow_that_is_away_is_said(airflow: AirflowClient, server: Any) -> None:
    server.stop()
    with pytest.raises(AirflowUnavailableError, match="does not answer"):
        airflow.create_dag_run("stream_run", "a", {})


def test_an_issuer_file_that_cannot_be_read_is_a_configuration_error(server: Any, password_file: Path) -> None:
    config = AirflowConfig(url=server.url, username="arp", password_file=password_file, ca_file=Path("/none.crt"))
    with pytest.raises(ConfigError, match=r"ca_file: /none\.crt"):
        AirflowClient(config)


def test_a_dag_run_is_read_and_failed_with_a_note(airflow: AirflowClient, server: Any) -> None:
    airflow.create_dag_run("stream_run", "a", {"x": 1})
    assert airflow.dag_run("stream_run", "a")["state"] == "queued"
    airflow.fail_dag_run("stream_run", "a", note="because")
    found = airflow.dag_run("stream_run", "a")
    assert (found["state"], found["note"], found["conf"]) == ("failed", "because", {"x": 1})
    for call in (lambda: airflow.dag_run("stream_run", "b"), lambda: airflow.fail_dag_run("stream_run", "b", note="")):
        with pytest.raises(AirflowRefusalError, match="404"):
            call()


def test_changed_dag_runs_come_page_by_page_from_a_time_on(airflow: AirflowClient, server: Any) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    for number in range(205):
        airflow.create_dag_run("stream_run", f"r{number}", {})
    assert len(list(airflow.changed_dag_runs(before))) == 205
    time.sleep(0.01)
    later = datetime.now(UTC)
    server.set_state("r3", "running", ["success", None])
    assert [entry["dag_run_id"] for entry in airflow.changed_dag_runs(later)] == ["r3"]
    assert airflow.task_states("stream_run", "r3") == ["success", None]


def test_the_page_of_a_dag_run_is_a_link_for_people(airflow: AirflowClient, server: Any) -> None:
    assert airflow.page("stream_run", "a__r0001") == f"{server.url}/dags/stream_run/runs/a__r0001"
