"""Ends what Airflow has started and nobody waits for any more: transfers and jobs whose task or DAG run is gone.

| task | what it does | when it fails |
| --- | --- | --- |
| `end_orphans` | asks services what is under way and Airflow about the tasks; ends the orphans | it is tried again |
| `tell_logbook` | writes the table of what was ended into a logbook | it is tried again |

Leases and walltimes end everything that nobody looks after; this DAG ends it sooner, says what it was, and finds jobs
at services that know no leases. A table is in the log of `end_orphans`; its XCom `ended` is a number to raise an alarm
on.

It runs every 15 minutes once it is switched on (it is made paused). By hand: **Trigger**, with `dry_run` to see only.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import DAG, Param

from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.reconcile import ReconcileOperator

CONNECTIONS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}

with DAG(
    dag_id="reconcile",
    description="Ends transfers and jobs whose task or DAG run is gone",
    doc_md=__doc__,
    schedule=timedelta(minutes=15),
    start_date=datetime(2025, 1, 1, tzinfo=UTC),
    catchup=False,
    is_paused_upon_creation=True,
    tags=["lclstream", "operations"],
    max_active_runs=1,
    dagrun_timeout=timedelta(minutes=30),
    default_args={"owner": "lclstream", "retries": 2, "retry_delay": timedelta(seconds=30)},
    params={
        "lclstream_conn_ids": Param(["lclstream_default"], description="transfer services to look at", **CONNECTIONS),
        "psik_conn_ids": Param(["psik_default"], description="job services to look at", **CONNECTIONS),
        "dry_run": Param(False, type="boolean", description="say what would be ended, and end nothing"),
        "experiment": Param("", type="string", description="whose logbook is told; empty: none"),
        "elog_conn_id": Param("elog_default", type="string", description="connection of the logbook"),
    },
) as dag:
    end_orphans = ReconcileOperator(
        task_id="end_orphans",
        lclstream_conn_ids="{{ params.lclstream_conn_ids | join(',') }}",
        psik_conn_ids="{{ params.psik_conn_ids | join(',') }}",
        report_only="{{ params.dry_run }}",
    )

    tell_logbook = ElogOperator(
        task_id="tell_logbook",
        experiment="{{ params.experiment }}",
        # Empty when no logbook is named or nothing was ended: then nothing is written.
        comment="{{ ti.xcom_pull(task_ids='end_orphans', key='report') if params.experiment else '' }}",
        comment_title="Transfers and jobs without a task",
        comment_tags="AIRFLOW",
        elog_conn_id="{{ params.elog_conn_id }}",
    )

    end_orphans >> tell_logbook
