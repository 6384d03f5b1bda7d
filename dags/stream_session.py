"""A shift's streaming session: nodes at a computing centre are allocated once, and every acquisition streams into them.

| task | what it does | when it fails |
| --- | --- | --- |
| `allocate` | starts the session's job, and waits until it has its nodes | it is tried again |
| `hold` | keeps the nodes until the session is to end | the job ends with its lease |
| `release` | lets the job finish the streams it has, and gives the nodes back | the job is cancelled |
| `tell_logbook` | says in the logbook how many acquisitions were analysed, and what ended it | it is tried again |

The job runs `lclstream session -- COMMAND`: it stays, and runs the command for each stream that `stream_acquisition`
hands to it. While no session is open, that DAG writes the acquisition to disk instead; nobody has to switch anything.

By hand, at the beginning of a shift: **Trigger** with

```json
{
  "experiment": "mfxx49820",
  "parameters": {"session_job": "/sdf/group/lcls/stream/session.yaml", "hours": 12}
}
```

A session ends after `hours`, at `ends_at`, by an entry in the logbook with the tag `end_tag`, when its job ends (its
longest run time is part of its specification), or by hand: mark `hold` as success. To give everything up at once, mark
the DAG run failed, and `release` with it or not: the job ends with its lease.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param

from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.session import SessionOperator, SessionReleaseOperator
from lclstream_airflow.sensors.session import SessionEndSensor

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "required": ["session_job"],
    "additionalProperties": False,
    "properties": {
        "session_job": {
            "type": ["string", "object"],
            "description": "the session's job specification, or the path of its file on the workers",
        },
        "session": {"type": "string", "description": "the session's name; default: the experiment's"},
        "hours": {"type": "number", "exclusiveMinimum": 0, "description": "how long it lasts"},
        "ends_at": {"type": "string", "description": "when it ends, such as 2026-03-01T18:00-08:00"},
        "end_tag": {"type": "string", "description": "the tag of the logbook's entry that ends it"},
        "finish_s": {"type": "number", "minimum": 1, "description": "how long it may finish its streams; default 1800"},
        "lease_s": {"type": "number", "minimum": 10, "description": "the job ends when nobody cared that long"},
        "psik_conn_id": {"type": "string", "description": "connection of the job service"},
        "elog_conn_id": {"type": "string", "description": "connection of the logbook"},
    },
}
PSIK = "{{ params.parameters.psik_conn_id | default('psik_default') }}"
ELOG = "{{ params.parameters.elog_conn_id | default('elog_default') }}"
LEASE_S = "{{ params.parameters.lease_s | default(300) }}"

with DAG(
    dag_id="stream_session",
    description="A shift's session: allocate nodes first, stream every acquisition into them, release them at the end",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["lclstream", "stream", "session"],
    max_active_runs=4,
    dagrun_timeout=timedelta(days=8),
    default_args={
        "owner": "lclstream",
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        # Otherwise a task that asks for nodes would come before the one that keeps them.
        "weight_rule": "absolute",
    },
    params={
        "experiment": Param(type="string", minLength=1, description="the experiment's name"),
        "parameters": Param(**PARAMETERS),
    },
) as dag:
    SESSION = "{{ params.parameters.session | default(params.experiment) }}"
    JOB = "{{ ti.xcom_pull(task_ids='allocate', key='job_id') }}"

    allocate = SessionOperator(
        task_id="allocate",
        session=SESSION,
        job="{{ params.parameters.session_job | tojson }}",
        values={"experiment": "{{ params.experiment }}", "session": SESSION},
        lease_s=LEASE_S,
        # Nodes may be asked for long before the shift begins; then nobody else waits for this task.
        wait_timeout_s=24 * 3600,
        pool="lclstream_nodes",
        psik_conn_id=PSIK,
    )

    hold = SessionEndSensor(
        task_id="hold",
        job_id=JOB,
        hours="{{ params.parameters.hours | default('') }}",
        ends_at="{{ params.parameters.ends_at | default('') }}",
        experiment="{{ params.experiment }}",
        tag="{{ params.parameters.end_tag | default('') }}",
        lease_s=LEASE_S,
        pool="lclstream_nodes",
        priority_weight=100,
        psik_conn_id=PSIK,
        elog_conn_id=ELOG,
    )

    release = SessionReleaseOperator(
        task_id="release",
        job_id=JOB,
        finish_s="{{ params.parameters.finish_s | default(1800) }}",
        trigger_rule="all_done",
        psik_conn_id=PSIK,
    )

    tell_logbook = ElogOperator(
        task_id="tell_logbook",
        experiment="{{ params.experiment }}",
        comment=(
            f"Streaming session {SESSION}: "
            "{{ ti.xcom_pull(task_ids='release', key='result')['acquisitions'] }} acquisitions analysed; "
            # A task that was marked has no result.
            "ended by {{ (ti.xcom_pull(task_ids='hold') or {'ended_by': 'hand'})['ended_by'] }}. ({{ run_id }})"
        ),
        comment_title="Streaming session",
        elog_conn_id=ELOG,
    )

    allocate >> hold >> release
    [hold, release] >> tell_logbook
