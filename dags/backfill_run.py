"""One archived run is streamed to an analysis again: what `lclstream backfill` makes a DAG run of for each run.

| task | what it does | when it fails |
| --- | --- | --- |
| `files_here` | waits until the run has ended and its files are at `location` | it is tried again |
| `request_stream` | asks for the stream; waits until it can be pulled from | it is tried again |
| `analyse` | runs the analysis job at the computing centre; it pulls the events | the stream is cancelled |
| `data_flowing` | sees the first message in the buffer | the stream is cancelled |
| `stream_complete` | waits until all is delivered; keeps the transfer's lease | the stream is cancelled |
| `report` | puts what the analysis found onto the run in the logbook, under names with `prefix` | it is tried again |
| `cancel_stream` | ends the transfer; runs only when something has failed | the lease ends the transfer |

It differs from `stream_run` in that nothing is live: the run's files have to be there, the data wait for the analysis
(the full buffer holds up the engine), the streams share a pool of their own, and jobs of live runs come first.

```sh
lclstream backfill mfxx49820 100..150,160 --parameters backfill.yaml --location S3DF --max-active 4
```

To stop everything: mark the DAG run failed. The job and the transfer are cancelled within seconds. So is the transfer
when somebody marks `data_flowing` or `stream_complete`, also as success: they stand for the stream.

Parameters are those of `stream_run`, and `prefix` (of the run parameters), `pattern` and `least_files` (what is waited
for).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, AssetAlias, Param, XComArg

from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.lclstream import LCLStreamCancelOperator, LCLStreamTransferOperator
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.sensors.buffer import NNGBufferSensor
from lclstream_airflow.sensors.elog import FilesAtLocationSensor

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "required": ["stream_config", "analysis_job"],
    "additionalProperties": False,
    "properties": {
        "stream_config": {
            "type": ["string", "object"],
            "description": "the engine's configuration, or the path of its file on the workers",
        },
        "analysis_job": {
            "type": ["string", "object"],
            "description": "the analysis' job specification, or the path of its file on the workers",
        },
        "report": {
            "type": "array",
            "items": {"type": "string"},
            "description": "which of the analysis' results become run parameters; all of them when it is not there",
        },
        "prefix": {"type": "string", "description": "put before the names of run parameters"},
        "pattern": {"type": "string", "description": "which of the run's files are waited for, such as *.xtc2"},
        "least_files": {"type": "integer", "minimum": 0, "description": "how many there must be at least; default 0"},
        "ranks": {"type": ["integer", "null"], "minimum": 1, "description": "MPI ranks of the engine"},
        "on_no_consumer": {
            "enum": ["prefer_spill", "spill", "wait"],
            "description": "while no analysis pulls: go on into files (where the service can, or always), or wait",
        },
        "lease_s": {"type": "number", "minimum": 10, "description": "the stream ends when nobody cared that long"},
        "lclstream_conn_id": {"type": "string", "description": "connection of the transfer service"},
        "psik_conn_id": {"type": "string", "description": "connection of the job service where the analysis runs"},
        "elog_conn_id": {"type": "string", "description": "connection of the logbook"},
    },
}
LCLSTREAM = "{{ params.parameters.lclstream_conn_id | default('lclstream_default') }}"
PSIK = "{{ params.parameters.psik_conn_id | default('psik_default') }}"
ELOG = "{{ params.parameters.elog_conn_id | default('elog_default') }}"
# Longer than Airflow ever needs to start the next task that renews it.
LEASE_S = "{{ params.parameters.lease_s | default(120) }}"

with DAG(
    dag_id="backfill_run",
    description="An archived run: stream its events to an analysis job at a computing centre",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["lclstream", "archive"],
    # How many stream at once says the pool.
    max_active_runs=32,
    dagrun_timeout=timedelta(days=7),
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

    files_here = FilesAtLocationSensor(
        task_id="files_here",
        experiment=RUN["experiment"],
        run=RUN["run"],
        location=RUN["location"],
        pattern="{{ params.parameters.pattern | default('*') }}",
        least="{{ params.parameters.least_files | default(0) }}",
        # Files may have to come from tape.
        timeout=timedelta(days=3),
        elog_conn_id=ELOG,
    )

    request_stream = LCLStreamTransferOperator(
        task_id="request_stream",
        config="{{ params.parameters.stream_config | tojson }}",
        values=RUN,
        ranks="{{ params.parameters.ranks | default('', true) }}",
        transfer_name="{{ params.experiment }}-r{{ params.run }}",
        wait_for="ready",
        # Archived data can wait for the analysis.
        on_no_consumer="{{ params.parameters.on_no_consumer | default('wait') }}",
        # A buffer is there within seconds when its node is free; on a busy one the triggerer waits.
        prompt_s=10,
        outlets=[AssetAlias("lclstream_streams")],
        lease_s=LEASE_S,
        wait_timeout_s=1800,
        pool="lclstream_archive",
        lclstream_conn_id=LCLSTREAM,
    )

    TRANSFER = "{{ ti.xcom_pull(task_ids='request_stream', key='transfer_id') }}"
    STREAM_URL = "{{ ti.xcom_pull(task_ids='request_stream', key='url') }}"

    data_flowing = NNGBufferSensor(
        task_id="data_flowing",
        transfer_id=TRANSFER,
        until="flowing",
        lease_s=LEASE_S,
        timeout=timedelta(hours=3),
        # Until the first message it stands for the stream: `cancel_stream` does not run in a DAG run marked failed.
        on_kill_policy="cancel",
        pool="lclstream_archive",
        # A stream that has begun keeps its slot before another one begins.
        priority_weight=10,
        lclstream_conn_id=LCLSTREAM,
    )

    analyse = PsikOperator(
        task_id="analyse",
        job="{{ params.parameters.analysis_job | tojson }}",
        values={**RUN, "url": STREAM_URL},
        environment={
            "LCLSTREAM_URL": STREAM_URL,
            "LCLSTREAM_EXPERIMENT": RUN["experiment"],
            "LCLSTREAM_RUN": RUN["run"],
        },
        result_file="result.json",
        pool="lclstream_nodes",
        psik_conn_id=PSIK,
        # What it missed is gone: a second job on the same stream would count half a run. A try that Airflow itself has
        # lost, as it does under load, finds its job again.
        retry_failed_work=False,
    )

    stream_complete = NNGBufferSensor(
        task_id="stream_complete",
        transfer_id=TRANSFER,
        until="done",
        lease_s=LEASE_S,
        # This sensor stands for the stream: whoever kills it wants the stream ended.
        on_kill_policy="cancel",
        pool="lclstream_archive",
        priority_weight=10,
        lclstream_conn_id=LCLSTREAM,
    )

    report = ElogOperator(
        task_id="report",
        experiment=RUN["experiment"],
        run=RUN["run"],
        run_params=XComArg(analyse, key="result"),
        prefix="{{ params.parameters.prefix | default('') }}",
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

    files_here >> request_stream
    request_stream >> [data_flowing, analyse]
    data_flowing >> stream_complete
    [analyse, stream_complete] >> report
    [request_stream, data_flowing, analyse, stream_complete] >> cancel_stream
