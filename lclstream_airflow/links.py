"""Buttons on a task's page: the transfer, the job's logs, the run in the logbook.

A task writes the address when it knows it; the link reads it from there (`xcom_key`), without asking the service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink
from airflow.sdk.execution_time.xcom import XCom

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator, Context
    from airflow.sdk.types import TaskInstanceKey


class _RecordedLink(BaseOperatorLink):
    """A link whose address the task has recorded."""

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The recorded address, or an empty text while there is none."""
        return XCom.get_value(key=self.xcom_key, ti_key=ti_key) or ""

    def record(self, context: Context, url: str) -> None:
        """Write the address down."""
        context["ti"].xcom_push(key=self.xcom_key, value=url)


class TransferLink(_RecordedLink):
    """To the transfer's document at the transfer service."""

    name = "Transfer"

    @property
    def xcom_key(self) -> str:
        """Where the task has put the address."""
        return "transfer_link"


class JobLink(_RecordedLink):
    """To the logs of the batch job."""

    name = "Job log"

    @property
    def xcom_key(self) -> str:
        """Where the task has put the address."""
        return "job_link"


class RunLink(_RecordedLink):
    """To the run in the logbook."""

    name = "Run"

    @property
    def xcom_key(self) -> str:
        """Where the task has put the address."""
        return "run_link"
