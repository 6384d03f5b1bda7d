"""The pools are there before a task needs them, count deferred tasks, and stay as the operators have set them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from airflow.dag_processing.dagbag import DagBag
from airflow.jobs.job import Job
from airflow.models.pool import Pool
from airflow.utils.session import create_session

from lclstream_airflow.pools import POOLS
from lclstream_airflow.sensors.polling import PollingSensor

DAGS = Path(__file__).resolve().parents[3] / "dags"


def pools() -> dict[str, tuple[int, bool]]:
    with create_session() as session:
        return {pool.pool: (pool.slots, pool.include_deferred) for pool in Pool.get_pools(session=session)}


def test_a_starting_airflow_makes_missing_pools_and_changes_none() -> None:
    names = {pool.name for pool in POOLS}
    with create_session() as session:
        for pool in Pool.get_pools(session=session):
            if pool.pool in names:
                session.delete(pool)
    # Airflow itself asks: this is what each of its parts makes first.
    Job()
    made = pools()
    assert {name: made[name] for name in names} == {pool.name: (pool.slots, True) for pool in POOLS}
    with create_session() as session:
        Pool.create_or_update_pool(
            "lclstream_streams", slots=3, description="ours", include_deferred=True, session=session
        )
    Job()
    assert pools()["lclstream_streams"] == (3, True)


def test_every_pool_of_a_dag_is_made_and_whoever_keeps_a_stream_comes_before_a_new_one() -> None:
    known = {"default_pool", *(pool.name for pool in POOLS)}
    for dag in DagBag(dag_folder=str(DAGS)).dags.values():
        for task in dag.tasks:
            assert task.pool in known, f"{dag.dag_id}.{task.task_id}: {task.pool}"
            if task.pool != "default_pool" and isinstance(task, PollingSensor):
                # Without `absolute` the weights of all later tasks are added, and the first task comes first.
                assert task.weight_rule == "absolute", f"{dag.dag_id}.{task.task_id}"
                assert task.priority_weight > 1, f"{dag.dag_id}.{task.task_id}"


def test_airflow_itself_finds_the_listener() -> None:
    script = (
        "from airflow.listeners.listener import get_listener_manager as manager\n"
        "print([getattr(one, '__name__', '') for one in manager().pm.get_plugins()])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    assert "lclstream_airflow.pools" in told.stdout, told.stdout + told.stderr
