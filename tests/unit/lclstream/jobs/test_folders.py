"""A job on disk is Psi-k's, complete or not there, and keeps its secret."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from anyio import Path as AnyioPath
from pydantic import SecretStr

from lclstream.jobs import folders
from lclstream.jobs.models import JobSpec, JobState, ResourceSpec, Transition

psik = pytest.importorskip("psik", reason="the published psik goes together with Airflow on Python 3.11 only")


def make(prefix: Path, spec: JobSpec, key: str | None = None) -> folders.JobFolder:
    return folders.make(
        prefix,
        spec,
        login="alice",
        issuer="O=s3df",
        idempotency_key=key,
        request_sha256="00",
        backend={"type": "local"},
        start=True,
    )


def test_the_published_package_reads_our_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, JobSpec(name="sum", script="true", resources=ResourceSpec(duration=0.5)))
    folder.append([Transition(time=2e9, jobndx=1, state=JobState.queued, info="4711")])

    async def read() -> psik.Job:
        return await psik.Job(AnyioPath(folder.path))

    job = asyncio.run(read())
    assert job.spec.name == "sum"
    assert job.spec.directory == str(folder.path / "work")
    assert [line.state.value for line in job.history] == ["new", "queued"]


def test_the_published_psik_ls_lists_our_folders(tmp_path: Path) -> None:
    folder = make(tmp_path / "", JobSpec(name="mine", script="true"))
    (tmp_path / ".service").mkdir()
    config = tmp_path / "psik.json"
    config.write_text(json.dumps({"prefix": str(tmp_path)}))
    command = [str(Path(sys.executable).parent / "psik"), "ls", "--config", str(config)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert folder.stamp in listed
    assert "mine" in listed


def test_a_specification_comes_back_as_it_was(tmp_path: Path) -> None:
    spec = JobSpec(
        script="echo é\n",
        environment={"A": "b"},
        resources=ResourceSpec(duration=0.25),
        callback="https://host/",
        cb_secret=SecretStr("hush"),
        cb_headers={"x-token": "t"},
    )
    folder = make(tmp_path, spec)
    assert folder.spec() == spec.model_copy(update={"directory": str(folder.path / "work")})


def test_a_secret_is_in_one_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    folder = make(tmp_path, JobSpec(script="true", cb_secret=SecretStr("hush-hush")))
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]
    assert holding == [folder.path / "spec.json"]
    assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_jobs_made_at_the_same_moment_have_different_ids(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make(tmp_path, JobSpec(script="true")).stamp, range(40)))
    assert len(set(made)) == 40
    assert [folder.stamp for folder in folders.find(tmp_path)] == sorted(made)


def test_a_half_made_job_is_no_job_and_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".new-0123").mkdir()
    (tmp_path / "1712345678.123").mkdir()
    assert list(folders.find(tmp_path)) == []
    assert not (tmp_path / ".new-0123").exists()


def test_a_line_break_in_a_schedulers_words_is_not_another_transition(tmp_path: Path) -> None:
    folder = make(tmp_path, JobSpec(script="true"))
    folder.append([Transition(time=2e9, jobndx=0, state=JobState.failed, info="sbatch: error: a, b\n9,1,completed,x")])
    assert [line.state for line in folder.history()] == [JobState.new, JobState.failed]
    assert folder.history()[-1].info == "sbatch: error: a, b 9,1,completed,x"


def test_a_last_line_cut_short_by_a_power_failure_is_removed(tmp_path: Path) -> None:
    folder = make(tmp_path, JobSpec(script="true"))
    whole = folder.history()
    with open(folder.path / "status.csv", "a") as file:
        file.write("1700000000.1,1,que")
    folder.repair_history()
    assert folder.history() == whole


@pytest.mark.parametrize("text", ["", "1,0,queued,x\n", "nonsense\n", "1,0,new,{}\n1,x,active,\n"])
def test_a_damaged_history_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path, JobSpec(script="true"))
    (folder.path / "status.csv").write_text(text)
    with pytest.raises(folders.DamagedJobError, match=r"status\.csv"):
        folder.history()
