"""Stream a run, and keep the picture that the analysis makes."""

from datetime import timedelta

from airflow.sdk import DAG, XComArg

from lclstream_airflow.operators.lclstream import LCLStreamTransferOperator
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.sensors.buffer import NNGBufferSensor

with DAG(dag_id="my_stream", schedule=None, dagrun_timeout=timedelta(hours=12)):
    stream = LCLStreamTransferOperator(
        task_id="stream",
        config="/sdf/group/lcls/stream/mfx.yaml",
        values={"experiment": "mfxx49820", "run": "{{ dag_run.conf['run'] }}"},
        lease_s=120,
    )
    picture = PsikOperator(
        task_id="picture",
        job="/sdf/group/lcls/stream/run-summary.yaml",
        values={"experiment": "mfxx49820", "run": "{{ dag_run.conf['run'] }}"},
        environment={"LCLSTREAM_URL": "{{ ti.xcom_pull(task_ids='stream', key='url') }}"},
        result_file="result.json",
        output_files=["*.png"],
        output_folder="/sdf/group/lcls/pictures/{{ dag_run.conf['run'] }}",
        psik_conn_id="psik_olcf",
    )
    finished = NNGBufferSensor(
        task_id="finished",
        transfer_id="{{ ti.xcom_pull(task_ids='stream', key='transfer_id') }}",
        until="done",
        lease_s=120,
        on_kill_policy="cancel",
    )
    # XComArg(picture, key="result") hands the numbers in result.json to whatever comes next.
    numbers = XComArg(picture, key="result")
    stream >> [picture, finished]
