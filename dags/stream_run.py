"""A run starts, and seconds later its events are being analysed on the machine of the user's choice.

| task | what it does | when it fails |
| --- | --- | --- |
| `request_stream` | asks for the stream; waits until it can be pulled from | it is tried again |
| `analyse` | runs the analysis job at the computing centre; it pulls the events | the stream is cancelled |
| `data_flowing` | sees the first message in the buffer | the stream is cancelled |
| `stream_complete` | waits until all is delivered; keeps the transfer's lease | the stream is cancelled |
| `report` | puts what the analysis found onto the run in the logbook | it is tried again |
| `cancel_stream` | ends the transfer; runs only when something has failed | the lease ends the transfer |

The run processor (ARP) makes a run of this DAG when the logbook says that a run has started. By hand: **Trigger** with

```json
{
  "experiment": "mfxx49820", "run": 7,
  "parameters": {
    "stream_config": "/sdf/group/lcls/stream/mfx.yaml",
    "analysis_job": "/sdf/group/lcls/stream/run-summary.yaml"
  }
}
```

`stream_config` is a configuration of the engine, `analysis_job` a job specification: an object, or the path of a file
on the workers. In the texts of both, `{{ experiment }}`, `{{ run }}` (or `{{ run:04d }}`), `{{ location }}` and, in the
job, `{{ url }}` stand for this run's values. The job's script also finds them in its environment:

```sh
lclstream consume run-summary --url "$LCLSTREAM_URL" --output-dir .
```

The numbers and texts in the `result.json` that it writes become run parameters; `report`, a list of names, chooses.

To stop everything: mark the DAG run failed. The job and the transfer are cancelled within seconds. So is the transfer
when somebody marks `data_flowing` or `stream_complete`, also as success: they stand for the stream. To do it again:
clear the DAG run. If Airflow dies altogether, the transfer ends by itself when its lease does.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, AssetAlias, Param, XComArg

from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.lclstream import LCLStreamCancelOperator, LCLStreamTransferOperator
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.sensors.buffer import NNGBufferSensor

#: What a workflow definition in the logbook may say.
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
    dag_id="stream_run",
    description="A run starts: stream its events to an analysis job at a computing centre",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["lclstream", "stream"],
    # More streams at once are a question of ports and nodes; the rest waits its turn.
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

    request_stream = LCLStreamTransferOperator(
        task_id="request_stream",
        config="{{ params.parameters.stream_config | tojson }}",
        values=RUN,
        ranks="{{ params.parameters.ranks | default('', true) }}",
        transfer_name="{{ params.experiment }}-r{{ params.run }}",
        wait_for="ready",
        # The analysis may wait in a queue: a live run does not wait for it.
        on_no_consumer="{{ params.parameters.on_no_consumer | default('prefer_spill') }}",
        # A buffer is there within seconds when its node is free; on a busy one the triggerer waits.
        prompt_s=10,
        outlets=[AssetAlias("lclstream_streams")],
        lease_s=LEASE_S,
        wait_timeout_s=1800,
        pool="lclstream_streams",
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
        pool="lclstream_streams",
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
        # Live runs come before archived ones.
        priority_weight=10,
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
        pool="lclstream_streams",
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

    request_stream >> [data_flowing, analyse]
    data_flowing >> stream_complete
    [analyse, stream_complete] >> report
    [request_stream, data_flowing, analyse, stream_complete] >> cancel_stream
