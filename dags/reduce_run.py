"""A run has ended and its files have come: reduce them to HDF5 files, one set for each run.

| task | what it does | when it fails |
| --- | --- | --- |
| `files_here` | waits until the run has ended and its files are at `location` | it is tried again |
| `reduce` | runs the engine as a job at the computing centre; it reads the files and writes HDF5 | it is tried again |
| `report` | puts numbers of events, files and bytes, and the place, onto the run in the logbook | it is tried again |

The run processor (ARP) makes a run of this DAG on `END_OF_RUN`, `ALL_FILES_TRANSFERRED` or one of the other triggers
for files. By hand: **Trigger** with

```json
{
  "experiment": "mfxx49820", "run": 7, "location": "S3DF",
  "parameters": {
    "config": "/sdf/group/lcls/reduce/mfx.yaml",
    "folder": "/sdf/scratch/mfxx49820/reduced",
    "ranks": 64, "job": {"backend": "batch", "resources": {"duration": 60}}
  }
}
```

`config` is a configuration of the engine, an object or the path of a file on the workers, in whose texts
`{{ experiment }}`, `{{ run }}` (or `{{ run:04d }}`) and `{{ location }}` stand for this run's values. What it says of
`data_handlers` is replaced. `FOLDER/EXPERIMENT-rRUN.h5` is one file over the parts that the ranks have written.

With `register_at` the file is also registered in the logbook's file catalogue, as being at that location.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, AssetAlias, Param, XComArg

from lclstream_airflow.operators.elog import ElogOperator
from lclstream_airflow.operators.engine import EngineJobOperator
from lclstream_airflow.sensors.elog import FilesAtLocationSensor

#: What a workflow definition in the logbook may say.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "required": ["config", "folder"],
    "additionalProperties": False,
    "properties": {
        "config": {
            "type": ["string", "object"],
            "description": "the engine's configuration, or the path of its file on the workers",
        },
        "folder": {"type": "string", "pattern": "^/", "description": "where at the computing centre the files go"},
        "ranks": {"type": "integer", "minimum": 1, "description": "MPI ranks of the engine; default 1"},
        "job": {
            "type": ["string", "object"],
            "description": "resources, backend, attributes, environment of the job, and perhaps a script",
        },
        "pattern": {"type": "string", "description": "which of the run's files are waited for, such as *.xtc2"},
        "least_files": {"type": "integer", "minimum": 0, "description": "how many there must be at least; default 0"},
        "register_at": {"type": "string", "description": "the logbook's name of the place where `folder` is"},
        "psik_conn_id": {"type": "string", "description": "connection of the job service"},
        "elog_conn_id": {"type": "string", "description": "connection of the logbook"},
    },
}
ELOG = "{{ params.parameters.elog_conn_id | default('elog_default') }}"

with DAG(
    dag_id="reduce_run",
    description="A run's files have come: reduce them to HDF5 at a computing centre",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["lclstream", "reduction"],
    max_active_runs=16,
    dagrun_timeout=timedelta(hours=48),
    default_args={"owner": "lclstream", "retries": 2, "retry_delay": timedelta(seconds=10)},
    params={
        "experiment": Param(type="string", minLength=1, description="the experiment's name"),
        "run": Param(type=["integer", "string"], description="the run's number"),
        "location": Param("", type=["string", "null"], description="where the files must be; empty: anywhere"),
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
        elog_conn_id=ELOG,
    )

    reduce = EngineJobOperator(
        task_id="reduce",
        config="{{ params.parameters.config | tojson }}",
        values=RUN,
        folder="{{ params.parameters.folder }}",
        prefix="{{ params.experiment }}-r{{ '%04d' % params.run if params.run is integer else params.run }}",
        ranks="{{ params.parameters.ranks | default(1) }}",
        job="{{ params.parameters.job | default({}) | tojson }}",
        pool="lclstream_nodes",
        psik_conn_id="{{ params.parameters.psik_conn_id | default('psik_default') }}",
    )

    report = ElogOperator(
        task_id="report",
        experiment=RUN["experiment"],
        run=RUN["run"],
        run_params=XComArg(reduce, key="result"),
        prefix="reduced_",
        files="{{ [ti.xcom_pull(task_ids='reduce', key='result')['file']] | tojson }}",
        location="{{ params.parameters.register_at | default('') }}",
        outlets=[AssetAlias("lclstream_results")],
        elog_conn_id=ELOG,
    )

    files_here >> reduce >> report
