"""One acquisition goes into the session that is open, or to disk when none is.

| task | what it does | when it fails |
| --- | --- | --- |
| `find_session` | asks the centre whether the session has nodes now; skipped when it has none | it is tried again |
| `request_stream` | asks for the stream; waits until it can be pulled from | it is tried again |
| `analyse` | hands the stream to the session, which pulls it; waits for its answer | the stream is cancelled |
| `stream_complete` | waits until all is delivered; keeps the transfer's lease | the stream is cancelled |
| `report` | puts what the analysis found onto the run in the logbook | it is tried again |
| `cancel_stream` | ends the transfer; runs only when something has failed | the lease ends the transfer |
| `keep_on_disk` | runs only when no session is open: the engine writes the events into files | it is tried again |
| `report_on_disk` | says in the logbook where they are | it is tried again |

The run processor (ARP) makes a run of this DAG when the logbook says that a run has started. A session is opened and
closed by `stream_session`; while it is open, what comes faster than it is analysed spills into the buffer's files where
the transfer service can do that.

```json
{
  "experiment": "mfxx49820", "run": 7,
  "parameters": {
    "stream_config": "/sdf/group/lcls/stream/mfx.yaml",
    "disk": {"folder": "/sdf/scratch/mfxx49820/acquired", "ranks": 8}
  }
}
```
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, AssetAlias, Param, XComArg

from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.engine import EngineJobOperator
from lclstream_airflow.operators.lclstream import LCLStreamCancelOperator, LCLStreamTransferOperator
from lclstream_airflow.operators.session import FindSessionOperator, SessionStreamOperator
from lclstream_airflow.sensors.buffer import NNGBufferSensor

#: What a workflow definition in the logbook may say.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "required": ["stream_config", "disk"],
    "additionalProperties": False,
    "properties": {
        "stream_config": {
            "type": ["string", "object"],
            "description": "the engine's configuration, or the path of its file on the workers",
        },
        "disk": {
            "type": "object",
            "required": ["folder"],
            "additionalProperties": False,
            "description": "where an acquisition goes that no session takes",
            "properties": {
                "folder": {"type": "string", "pattern": "^/", "description": "on the machine of the job service"},
                "ranks": {"type": "integer", "minimum": 1, "description": "MPI ranks of the engine; default 1"},
                "job": {"type": ["string", "object"], "description": "resources, backend, attributes of the job"},
                "psik_conn_id": {"type": "string", "description": "connection of the job service that writes"},
            },
        },
        "session": {"type": "string", "description": "the session's name; default: the experiment's"},
        "report": {
            "type": "array",
            "items": {"type": "string"},
            "description": "which of the analysis' results become run parameters; all of them when it is not there",
        },
        "ranks": {"type": ["integer", "null"], "minimum": 1, "description": "MPI ranks of the engine"},
        "on_no_consumer": {
            "enum": ["prefer_spill", "spill", "wait"],
            "description": "while the session is busy: go on into files (where the service can, or always), or wait",
        },
        "lease_s": {"type": "number", "minimum": 10, "description": "the stream ends when nobody cared that long"},
        "lclstream_conn_id": {"type": "string", "description": "connection of the transfer service"},
        "psik_conn_id": {"type": "string", "description": "connection of the job service where the session is"},
        "elog_conn_id": {"type": "string", "description": "connection of the logbook"},
    },
}
LCLSTREAM = "{{ params.parameters.lclstream_conn_id | default('lclstream_default') }}"
PSIK = "{{ params.parameters.psik_conn_id | default('psik_default') }}"
ELOG = "{{ params.parameters.elog_conn_id | default('elog_default') }}"
LEASE_S = "{{ params.parameters.lease_s | default(120) }}"

with DAG(
    dag_id="stream_acquisition",
    description="One acquisition: into the session that is open, or to disk",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["lclstream", "stream", "session"],
    max_active_runs=8,
    dagrun_timeout=timedelta(hours=24),
    default_args={
        "owner": "lclstream",
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        # Otherwise a task that begins a stream would come before those that keep one.
        "weight_rule": "absolute",
    },
    params={
        "experiment": Param(type="string", minLength=1, description="the experiment's name"),
        "run": Param(type=["integer", "string"], description="the run's number"),
        "location": Param("", type=["string", "null"], description="where the data are"),
        "parameters": Param(**PARAMETERS),
    },
) as dag:
    RUN = {
        "experiment": "{{ params.experiment }}",
        "run": "{{ params.run }}",
        "location": "{{ params.location or '' }}",
    }
    TRANSFER = "{{ ti.xcom_pull(task_ids='request_stream', key='transfer_id') }}"
    NAME = "{{ params.experiment }}-r{{ '%04d' % params.run if params.run is integer else params.run }}"

    find_session = FindSessionOperator(
        task_id="find_session",
        session="{{ params.parameters.session | default(params.experiment) }}",
        psik_conn_id=PSIK,
    )

    request_stream = LCLStreamTransferOperator(
        task_id="request_stream",
        config="{{ params.parameters.stream_config | tojson }}",
        values=RUN,
        ranks="{{ params.parameters.ranks | default('', true) }}",
        transfer_name=NAME,
        wait_for="ready",
        on_no_consumer="{{ params.parameters.on_no_consumer | default('prefer_spill') }}",
        prompt_s=10,
        outlets=[AssetAlias("lclstream_streams")],
        lease_s=LEASE_S,
        wait_timeout_s=1800,
        pool="lclstream_streams",
        lclstream_conn_id=LCLSTREAM,
    )

    analyse = SessionStreamOperator(
        task_id="analyse",
        job_id="{{ ti.xcom_pull(task_ids='find_session') }}",
        # A run that is streamed again is another stream.
        name=NAME + "-{{ ti.xcom_pull(task_ids='request_stream', key='transfer_id') }}",
        letter={
            "url": "{{ ti.xcom_pull(task_ids='request_stream', key='url') }}",
            "experiment": RUN["experiment"],
            "run": RUN["run"],
        },
        psik_conn_id=PSIK,
    )

    stream_complete = NNGBufferSensor(
        task_id="stream_complete",
        transfer_id=TRANSFER,
        until="done",
        lease_s=LEASE_S,
        on_kill_policy="cancel",
        pool="lclstream_streams",
        # A stream that has begun keeps its slot before another one begins.
        priority_weight=10,
        lclstream_conn_id=LCLSTREAM,
    )

    report = ElogOperator(
        task_id="report",
        experiment=RUN["experiment"],
        run=RUN["run"],
        run_params=XComArg(analyse, key="result"),
        only="{{ params.parameters.report | default([], true) | tojson }}",
        outlets=[AssetAlias("lclstream_results")],
        elog_conn_id=ELOG,
    )

    cancel_stream = LCLStreamCancelOperator(
        task_id="cancel_stream",
        transfer_id=TRANSFER,
        lclstream_conn_id=LCLSTREAM,
        trigger_rule="one_failed",
    )

    keep_on_disk = EngineJobOperator(
        task_id="keep_on_disk",
        config="{{ params.parameters.stream_config | tojson }}",
        values=RUN,
        folder="{{ params.parameters.disk.folder }}",
        prefix=NAME,
        ranks="{{ params.parameters.disk.ranks | default(1) }}",
        job="{{ params.parameters.disk.job | default({}) | tojson }}",
        trigger_rule="all_skipped",
        pool="lclstream_nodes",
        psik_conn_id="{{ params.parameters.disk.psik_conn_id | default('psik_default') }}",
    )

    report_on_disk = ElogOperator(
        task_id="report_on_disk",
        experiment=RUN["experiment"],
        run=RUN["run"],
        run_params=XComArg(keep_on_disk, key="result"),
        prefix="acquired_",
        elog_conn_id=ELOG,
    )

    find_session >> [request_stream, keep_on_disk]
    request_stream >> [analyse, stream_complete]
    [analyse, stream_complete] >> report
    [request_stream, analyse, stream_complete] >> cancel_stream
    keep_on_disk >> report_on_disk
