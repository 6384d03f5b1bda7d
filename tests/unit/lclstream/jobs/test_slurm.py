"""What Slurm prints, in its several versions, is read as what it means."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lclstream.config_file import ConfigError
from lclstream.jobs.backends.slurm import _accounted, _is_away, _quoted, _snapshot_of
from lclstream.jobs.config import JobsConfig


def slurm(**settings: Any) -> JobsConfig:
    backends = {"default": {"type": "slurm", **settings}}
    return JobsConfig.model_validate({"prefix": "/p", "credentials": "/c", "backends": backends})


OLD = {
    "job_id": 7, "job_state": "RUNNING", "restart_cnt": 1, "start_time": 100, "end_time": 200, "exit_code": 512,
    "nodes": "n1", "state_reason": "None", "comment": "lclstream:/p/1.5",
}  # fmt: skip
NEW = {
    **OLD,
    "job_state": ["RUNNING", "COMPLETING"],
    "restart_cnt": 1,
    "start_time": {"set": True, "infinite": False, "number": 100},
    "end_time": {"set": True, "infinite": False, "number": 200},
    "exit_code": {"status": ["ERROR"], "return_code": {"set": True, "infinite": False, "number": 2}},
}


@pytest.mark.parametrize("entry", [OLD, NEW], ids=["22.05", "23.11"])
def test_squeues_json_is_read_in_its_old_and_new_form(entry: dict[str, Any]) -> None:
    snapshot = _snapshot_of({"jobs": [entry]}, 0.0)
    record = snapshot.records["7"]
    assert (record.state, record.restarts, record.started, record.ended) == ("RUNNING", 1, 100.0, 200.0)
    assert (record.exit_code, record.nodes) == ("2", "n1")
    assert snapshot.by_comment == {"lclstream:/p/1.5": "7"}


def test_sacct_is_read() -> None:
    record = _accounted(
        [
            "NODE_FAIL|2026-01-02T03:04:01|2026-01-02T03:04:02|0:0|n1|None",
            "CANCELLED by 1|2026-01-02T03:04:05|Unknown|0:15|n2|None",
        ]
    )
    assert record is not None
    assert (record.state, record.restarts, record.ended, record.nodes) == ("CANCELLED", 1, 0.0, "n2")
    assert record.started == time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))


def test_a_job_sacct_does_not_know_is_unknown() -> None:
    assert _accounted([]) is None


def test_a_scheduler_that_is_away_is_not_a_refusal() -> None:
    assert _is_away("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)")
    assert _is_away("slurm_load_jobs error: Socket timed out on send/recv operation")
    assert not _is_away("sbatch: error: invalid partition specified: nowhere")


def test_paths_are_quoted_for_the_shell() -> None:
    assert _quoted("it's $HOME") == "'it'\\''s $HOME'"


@pytest.mark.parametrize("option", ["--uid", "--wrap", "--output", "--export", "-p", "qos", "--qos=x", "--a b"])
def test_options_that_are_the_services_own_cannot_be_allowed(option: str) -> None:
    with pytest.raises(ValueError, match="option"):
        slurm(allow_attributes=[option])


def test_a_machine_without_slurm_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from lclstream.jobs.backends.slurm import SlurmBackend
    from lclstream.jobs.config import SlurmBackend as SlurmConfig

    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch"):
        SlurmBackend(SlurmConfig(type="slurm"))
