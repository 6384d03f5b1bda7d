"""Reduction, archived runs, sessions and the reconciler against real services, run by `dag.test`."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest

from lclstream.jobs.models import JobSpec, JobState

# By a thread: reading a DAG file switches off the alarm that the other method needs.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600, method="thread")]

ANALYSIS = """#!/usr/bin/env python3
import json, os
from lclstream.client import pull
events = 0
with pull(os.environ["LCLSTREAM_URL"], timeout_s=120) as stream:
    for batch in stream.batches():
        events += len(batch["/data/image"])
json.dump({"events": events, "run": os.environ["LCLSTREAM_RUN"]}, open("result.json", "w"))
"""
SESSION = f"""#!/bin/sh
cat > analyse.py <<'END'
{ANALYSIS}
END
exec lclstream session -- python3 "$PWD/analyse.py"
"""


def run_dag(dag_id: str, conf: dict[str, Any], order: Sequence[str] = (), **pauses: Any) -> Any:
    """The DAG run; `pauses` are attributes of tasks that have them, so that nobody waits for the sake of waiting.

    `dag.test` runs one task after the other, those that could run at once in any order: `order` names tasks of which
    one has to end before the next begins.
    """
    from airflow.dag_processing.dagbag import DagBag

    dag = DagBag(dag_folder=str(Path(__file__).resolve().parents[3] / "dags" / f"{dag_id}.py")).dags[dag_id]
    for task in dag.tasks:
        for name, value in pauses.items():
            if hasattr(task, name):
                setattr(task, name, value)
    for earlier, later in itertools.pairwise(order):
        dag.set_dependency(earlier, later)
    return dag.test(logical_date=None, run_conf=conf)


def states(dag_run: Any) -> dict[str, str]:
    return {task.task_id: str(task.state) for task in dag_run.get_task_instances()}


def asset_events(experiment: str) -> dict[str, Any]:
    """URI of the asset → facts of its only event, as Airflow has recorded them."""
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        events = session.scalars(select(AssetEvent)).all()
        return {event.asset.uri: event.extra for event in events if event.extra.get("experiment") == experiment}


def test_a_run_is_reduced_to_one_file_that_the_logbook_knows(
    facility: Any, stream_config: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "reduced"
    with facility.logbook() as elog:
        run = elog.start_run("mfx200")
        elog.register_file("mfx200", "/data/a.xtc2", run.num)
        elog.file_available_at_location("mfx200", run.num, "/data/a.xtc2", "S3DF")
        elog.end_run("mfx200")
    dag_run = run_dag(
        "reduce_run",
        {
            "experiment": "mfx200",
            "run": run.num,
            "location": "S3DF",
            "parameters": {
                "config": stream_config(40),
                "folder": str(folder),
                "ranks": 2,
                "pattern": "*.xtc2",
                "least_files": 1,
                "register_at": "OLCF",
                "psik_conn_id": "psik_olcf",
            },
        },
    )
    assert states(dag_run) == {"files_here": "success", "reduce": "success", "report": "success"}
    name = f"mfx200-r{run.num:04d}"
    with h5py.File(folder / f"{name}.h5") as file:
        assert file["data/image"].shape == (40, 64, 64)
        assert (file["data/image"][:] != 0).any(axis=(1, 2)).all()
    with facility.logbook() as elog:
        parameters = elog.run("mfx200", run.num).parameters()
        files = {entry.path: list(entry.locations) for entry in elog.files("mfx200", run.num)}
    assert (parameters["reduced_events"], parameters["reduced_files"]) == (40, 8)
    assert parameters["reduced_file"] == str(folder / f"{name}.h5")
    assert files[str(folder / f"{name}.h5")] == ["OLCF"]


def test_an_archived_run_is_analysed_again_beside_its_first_results(
    facility: Any, stream_config: Callable[[int], dict[str, Any]], until: Callable[..., float]
) -> None:
    with facility.logbook() as elog:
        run = elog.start_run("mfx201")
        elog.add_run_params("mfx201", {"events": 1}, run.num)
        elog.end_run("mfx201")
    dag_run = run_dag(
        "backfill_run",
        {
            "experiment": "mfx201",
            "run": run.num,
            "trigger": "BACKFILL",
            "parameters": {
                "stream_config": stream_config(20),
                "analysis_job": {"script": ANALYSIS},
                "psik_conn_id": "psik_olcf",
                "prefix": "again_",
            },
        },
    )
    assert dag_run.state == "success", states(dag_run)
    with facility.logbook() as elog:
        parameters = elog.run("mfx201", run.num).parameters()
    assert (parameters["events"], parameters["again_events"]) == (1, 20)
    events = asset_events("mfx201")
    assert events["lclstream://streams/mfx201"]["url"].partition("://")[2].startswith("127.0.0.1:")
    assert events["lclstream://results/mfx201"] == {
        "experiment": "mfx201", "run": str(run.num), "files": [],
        "parameters": {"again_events": 20, "again_run": str(run.num)},
    }  # fmt: skip
    until(lambda: not facility.running(), 60, "end of all jobs")


def acquire(facility: Any, config: dict[str, Any], run: int, folder: Path) -> Any:
    return run_dag(
        "stream_acquisition",
        {
            "experiment": "mfx202",
            "run": run,
            "parameters": {
                "stream_config": config,
                "disk": {"folder": str(folder), "psik_conn_id": "psik_olcf"},
                "psik_conn_id": "psik_olcf",
            },
        },
        # Nothing is complete before somebody has taken it.
        order=("analyse", "stream_complete"),
    )


def test_acquisitions_go_into_the_open_session_and_otherwise_to_disk(
    facility: Any, stream_config: Callable[[int], dict[str, Any]], tmp_path: Path, until: Callable[..., float]
) -> None:
    with facility.logbook() as elog:
        first, second = elog.start_run("mfx202").num, elog.start_run("mfx202").num
    with facility.jobs() as jobs:
        job = jobs.submit(JobSpec(script=SESSION), tags={"session": "mfx202"})
        until(lambda: jobs.state(job) is JobState.active, 60, "session")
        into_session = acquire(facility, stream_config(20), first, tmp_path)
        jobs.upload(job, "inbox/end", b"")
        until(lambda: jobs.state(job) is JobState.completed, 60, "end of the session")
    ended = states(into_session)
    assert into_session.state == "success", ended
    assert (ended["analyse"], ended["report"]) == ("success", "success")
    assert (ended["keep_on_disk"], ended["report_on_disk"], ended["cancel_stream"]) == ("skipped",) * 3
    to_disk = acquire(facility, stream_config(10), second, tmp_path)
    ended = states(to_disk)
    assert to_disk.state == "success", ended
    assert (ended["find_session"], ended["request_stream"], ended["report"]) == ("skipped",) * 3
    with facility.logbook() as elog:
        assert elog.run("mfx202", first).parameters()["events"] == 20
        parameters = elog.run("mfx202", second).parameters()
    assert (parameters["acquired_events"], parameters["acquired_files"]) == (10, 2)
    assert Path(parameters["acquired_file"]).parent == tmp_path
    until(lambda: not facility.running(), 60, "end of all jobs")


def test_a_session_holds_its_nodes_until_the_logbook_ends_it(facility: Any, until: Callable[..., float]) -> None:
    failures: list[BaseException] = []

    def shift() -> None:
        try:
            with facility.jobs() as jobs, facility.logbook() as elog:
                until(lambda: jobs.list(tags={"session": "shift-7"}, state=JobState.active), 120, "session")
                (session,) = jobs.list(tags={"session": "shift-7"})
                until(lambda: "outbox" in jobs.files(session.jobid), 60, "letter box")
                for name in ("a", "b"):
                    jobs.upload(session.jobid, f"inbox/{name}.json", json.dumps({"run": name}).encode())
                until(lambda: len(jobs.files(session.jobid, "outbox")) == 2, 60, "answers")
                elog.new_elog_entry("mfx203", "That was the shift.", tags=["SHIFT_END"])
        except BaseException as error:
            failures.append(error)

    with facility.logbook() as elog:
        elog.start_run("mfx203")
        elog.new_elog_entry("mfx203", "The shift before.", tags=["SHIFT_END"])
    thread = threading.Thread(target=shift)
    thread.start()
    dag_run = run_dag(
        "stream_session",
        {
            "experiment": "mfx203",
            "parameters": {
                "session_job": {"script": "#!/bin/sh\nexec lclstream session -- sh -c 'test $LCLSTREAM_RUN = a'"},
                "session": "shift-7",
                "end_tag": "SHIFT_END",
                "hours": 1,
                "psik_conn_id": "psik_olcf",
            },
        },
        poke_interval=0.2,
        poll_interval=0.2,
    )
    thread.join(60)
    assert not thread.is_alive()
    assert not failures
    assert dag_run.state == "success", states(dag_run)
    with facility.logbook() as elog:
        (entry,) = [entry for entry in elog.elog_entries("mfx203") if entry.title == "Streaming session"]
    assert entry.content.startswith("Streaming session shift-7: 2 acquisitions analysed; ended by the logbook.")
    until(lambda: not facility.running(), 60, "end of all jobs")


def test_the_reconciler_ends_what_no_dag_run_wants_and_tells_the_logbook(
    facility: Any, until: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lclstream_airflow.operators.remote import installation

    with facility.logbook() as elog:
        elog.start_run("operations")
    tags = {"airflow": installation(), "dag_id": "stream_run", "run_id": "never_was", "task_id": "analyse"}
    with facility.jobs() as jobs:
        orphan = jobs.submit(JobSpec(script="sleep 900"), tags={**tags, "on_kill": "cancel"})
        other = jobs.submit(JobSpec(script="sleep 900"), tags={**tags, "on_kill": "leave"})
        conf = {"psik_conn_ids": ["psik_olcf"], "experiment": "operations"}
        dag_run = run_dag("reconcile", conf, second_look_s=0.5)
        assert dag_run.state == "success", states(dag_run)
        until(lambda: jobs.state(orphan) is JobState.canceled, 60, "end of the orphan")
        assert not jobs.state(other).is_final
        jobs.cancel(other)
    with facility.logbook() as elog:
        (entry,) = elog.elog_entries("operations")
    assert "stream_run / never_was / analyse" in entry.content
    until(lambda: not facility.running(), 60, "end of all jobs")
