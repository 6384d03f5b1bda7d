"""DAGs with one task each, whose remote work never ends by itself; `chaos_airflow.py` ends them in every way there is.

``CHAOS_LEASE_S`` is the lease of the work, ``CHAOS_LIMIT_S`` what the timeouts allow, both in seconds.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from lclstream_airflow.operators.lclstream import LCLStreamTransferOperator
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.operators.remote import RemoteWorkOperator

LEASE_S = float(os.environ.get("CHAOS_LEASE_S", "60"))
LIMIT = timedelta(seconds=float(os.environ.get("CHAOS_LIMIT_S", "30")))
#: More events than a buffer holds, and nobody pulls.
STREAM = {
    "source_identifier": "exp=chaos,run=1",
    "skip_incomplete_events": False,
    "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 1_000_000},
    "data_sources": {"image": {"type": "GenericRandomNumpyArray", "array_shape": "64,64", "array_dtype": "float32"}},
    "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 5},
    "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"image": "/data/image"}},
    "data_handlers": [],
}
JOB = {"name": "endless", "script": "#!/bin/sh\nexec sleep 3600\n", "resources": {"duration": 60}}


class _EarlyTimeout(RemoteWorkOperator):
    """Airflow's own timeout of the deferral comes before the deadline that the trigger watches."""

    def defer(self, *, timeout: timedelta | None = None, **arguments: Any) -> Any:
        """As every operator, but not for long."""
        del timeout
        super().defer(timeout=LIMIT, **arguments)


class _ImpatientTransfer(_EarlyTimeout, LCLStreamTransferOperator):
    pass


class _ImpatientJob(_EarlyTimeout, PsikOperator):
    pass


TRANSFER = {
    "config": STREAM,
    "transfer_name": "{{ run_id }}",
    "wait_for": "complete",
    "lease_s": LEASE_S,
    "lclstream_conn_id": "lclstream_default",
}
ANALYSIS = {"job": JOB, "lease_s": LEASE_S, "psik_conn_id": "psik_olcf"}
#: Variant -> arguments of the task, arguments of the DAG.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "waits": ({}, {}),
    "defer_timeout": ({}, {}),
    "dagrun_timeout": ({}, {"dagrun_timeout": LIMIT}),
    "execution_timeout": ({"deferrable": False, "execution_timeout": LIMIT}, {}),
    "works": ({"deferrable": False}, {}),
    "works_again": ({"deferrable": False, "retries": 1, "retry_delay": timedelta(seconds=1)}, {}),
}

for variant, (of_task, of_dag) in VARIANTS.items():
    for kind, arguments in (("transfer", TRANSFER), ("job", ANALYSIS)):
        impatient = variant == "defer_timeout"
        operators = {
            "transfer": _ImpatientTransfer if impatient else LCLStreamTransferOperator,
            "job": _ImpatientJob if impatient else PsikOperator,
        }
        with DAG(dag_id=f"{variant}_{kind}", schedule=None, catchup=False, max_active_runs=16, **of_dag):
            operators[kind](task_id="work", **arguments, **of_task)
