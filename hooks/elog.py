"""The experiment's logbook (Elog) as an Airflow hook."""

from __future__ import annotations

import asyncio

from lclstream.elog.client import AsyncElogClient, ElogClient, ElogError
from lclstream.elog.models import FileEntry, RunDocument, run_number
from lclstream_airflow.hooks.service import ServiceHook

__all__ = ["AsyncElogClient", "ElogClient", "ElogError", "ElogHook", "FileEntry", "RunDocument", "run_number"]


class ElogHook(ServiceHook):
    """Gives clients of the logbook that a connection of type `elog` names.

    :param elog_conn_id: id of the connection: host, port (8448), extra ``{"credentials": FOLDER, "prefix"?}``; `prefix`
        is the path of the logbook on its host
    """

    conn_name_attr = "elog_conn_id"
    default_conn_name = "elog_default"
    conn_type = "elog"
    hook_name = "Elog"
    default_port = 8448
    default_prefix = ""

    #: Any name will do for asking which triggers there are.
    _TEST_EXPERIMENT = "test"

    def __init__(self, elog_conn_id: str = default_conn_name) -> None:
        super().__init__(elog_conn_id)

    def get_conn(self) -> ElogClient:
        """A blocking client; use it in a ``with``."""
        endpoint = self.endpoint()
        return ElogClient(endpoint.base_url + endpoint.prefix, endpoint.credentials)

    async def get_async_conn(self) -> AsyncElogClient:
        """A client for an event loop; use it in an ``async with``."""
        endpoint = await self.aendpoint()
        # Certificates are read from disk, which may be a slow network file system.
        return await asyncio.to_thread(AsyncElogClient, endpoint.base_url + endpoint.prefix, endpoint.credentials)

    def run_url(self, experiment: str, run: int | str) -> str:
        """The address of a run's document."""
        endpoint = self.endpoint()
        return f"{endpoint.base_url}{endpoint.prefix}/lgbk/{experiment}/ws/runs/{run}"

    def _greet(self) -> str:
        with self.get_conn() as client:
            try:
                client.workflow_triggers(self._TEST_EXPERIMENT)
            except ElogError as error:
                # A logbook that knows no such experiment has answered, too; anything else is no logbook.
                if not error.errormsg:
                    raise
        return f"The logbook at {self.endpoint().base_url} answers."
