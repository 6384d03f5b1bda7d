"""One reduction at two centres: at NERSC by the Superfacility API, and on a Slurm cluster with a job service."""

from airflow.sdk import DAG

from lclstream_airflow.operators.slurm import SlurmOperator
from lclstream_airflow.operators.superfacility import SuperfacilityOperator

SCRIPT = """#!/bin/bash
#SBATCH --nodes=1
#SBATCH --time=5
echo "reducing run $RUN at $SLURM_JOB_ID"
echo "{\\"run\\": $RUN}" > result.json
"""

with DAG(dag_id="two_centres", schedule=None, params={"run": 7, "folder": "/pscratch/sd/a/ada/mfxx49820"}):
    at_nersc = SuperfacilityOperator(
        task_id="at_nersc",
        script=SCRIPT,
        folder="{{ params.folder }}",
        environment={"RUN": "{{ params.run }}"},
        result_file="result.json",
        poll_interval=10,
    )
    at_slac = SlurmOperator(
        task_id="at_slac",
        script=SCRIPT,
        partition="debug",
        walltime="5",
        environment={"RUN": "{{ params.run }}"},
        result_file="result.json",
        psik_conn_id="psik_default",
    )
    at_nersc >> at_slac
