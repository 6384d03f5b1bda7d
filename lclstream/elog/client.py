"""Typed clients for the logbook's REST interface: :class:`ElogClient` blocks, :class:`AsyncElogClient` does not.

Both speak to our stand-in and to the real logbook alike. A call raises

* :class:`.ElogError` when the logbook refuses (its `errormsg` says why) or the answer is not a logbook's,
* :class:`.PeerError` when it cannot be reached, does not accept our certificate, or answers with an HTTP error;
  `retry` tells whether trying again can help. Nothing is retried here: a run must not be started twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from lclstream.elog import calls
from lclstream.elog.calls import Call, ElogError
from lclstream.elog.models import (
    Counter,
    ElogEntry,
    FileEntry,
    RunDocument,
    RunNumber,
    WorkflowDefinition,
    WorkflowJob,
)
from lclstream.security.credentials import Credentials
from lclstream.security.http import TIMEOUT_S, aexplained, async_client, client, explained

__all__ = ["AsyncElogClient", "ElogClient", "ElogError"]

Value = TypeVar("Value")


class ElogClient:
    """A blocking client for one logbook; close it, or use it in a ``with``.

    Args:
        base_url: where the logbook is; a path in it goes in front of every call.
        credentials: our certificate, and whom we trust.
        timeout: seconds one call may take.
    """

    def __init__(self, base_url: str, credentials: Credentials, *, timeout: float = TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = client(self.base_url, credentials, timeout=timeout)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[Value]) -> Value:
        with explained(self.base_url):
            response = self._http.request(
                call.method, call.path, params=call.query, content=call.body, data=call.form, headers=call.headers
            )
            response.raise_for_status()
        return call.read(response.content, self.base_url)

    def start_run(
        self,
        experiment: str,
        run_type: str = "DATA",
        run_num: RunNumber | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        start_time: datetime | None = None,
        sample: str | None = None,
    ) -> RunDocument:
        """Start a run; an open one is ended first. The number is the next one unless `run_num` says otherwise."""
        return self._send(calls.start_run(experiment, run_type, run_num, params, start_time, sample))

    def end_run(self, experiment: str, *, end_time: datetime | None = None) -> RunDocument:
        """End the current run."""
        return self._send(calls.end_run(experiment, end_time))

    def current_run(self, experiment: str, *, skip_closed: bool = False) -> RunDocument | None:
        """The latest run; None when there is none (with `skip_closed`: none that is open)."""
        return self._send(calls.current_run(experiment, skip_closed))

    def add_run_params(
        self, experiment: str, params: Mapping[str, Any], run_num: RunNumber | None = None
    ) -> RunDocument:
        """Put parameters on a run (the current one unless `run_num`); the run may have ended."""
        return self._send(calls.add_run_params(experiment, params, run_num))

    def update_editable_param(self, experiment: str, run_num: RunNumber, name: str, value: str) -> Any:
        """Change a parameter that people edit in the run table."""
        return self._send(calls.update_editable_param(experiment, run_num, name, value))

    def runs(self, experiment: str, *, include_params: bool = True) -> list[RunDocument]:
        """All runs, the latest first."""
        return self._send(calls.runs(experiment, include_params))

    def run(self, experiment: str, run_num: RunNumber) -> RunDocument:
        """One run."""
        return self._send(calls.run(experiment, run_num))

    def runs_matching_params(self, experiment: str, params: Mapping[str, Any]) -> list[RunNumber]:
        """Numbers of the runs whose parameters have all these values."""
        return self._send(calls.runs_matching_params(experiment, params))

    def runs_matching_editable(self, experiment: str, name: str, regex: str) -> list[RunNumber]:
        """Numbers of the runs whose editable parameter matches a regular expression, letter case ignored."""
        return self._send(calls.runs_matching_editable(experiment, name, regex))

    def runs_with_tag(self, experiment: str, tag: str) -> list[RunNumber]:
        """Numbers of the runs that a logbook entry with this tag belongs to."""
        return self._send(calls.runs_with_tag(experiment, tag))

    def workflow_triggers(self, experiment: str) -> list[dict[str, str]]:
        """What a definition's `trigger` may be: ``{value, label}``."""
        return self._send(calls.workflow_triggers(experiment))

    def workflow_definitions(self, experiment: str) -> list[WorkflowDefinition]:
        """The experiment's workflow definitions."""
        return self._send(calls.workflow_definitions(experiment))

    def create_update_workflow_def(
        self, experiment: str, definition: WorkflowDefinition | Mapping[str, Any]
    ) -> WorkflowDefinition:
        """Write a definition: a new one, or, with `_id`, in place of the one there. It becomes the caller's."""
        return self._send(calls.create_update_workflow_def(experiment, definition))

    def delete_workflow_definition(self, experiment: str, def_id: str) -> None:
        """Delete a definition that no job refers to."""
        return self._send(calls.delete_workflow_definition(experiment, def_id))

    def workflow_jobs(self, experiment: str) -> list[WorkflowJob]:
        """The experiment's workflow jobs, those of the latest runs first."""
        return self._send(calls.workflow_jobs(experiment))

    def create_workflow_job(self, experiment: str, job_name: str, run_num: RunNumber) -> WorkflowJob:
        """Ask for a definition (`job_name`) to be executed for a run."""
        return self._send(calls.create_workflow_job(experiment, job_name, run_num))

    def update_workflow_job(
        self,
        experiment: str,
        job_id: str,
        *,
        status: str | None = None,
        counters: Iterable[Counter | Mapping[str, Any]] | None = None,
        tool_id: str | None = None,
        log_file_path: str | None = None,
    ) -> WorkflowJob:
        """Say how a job goes; what is None stays as it is."""
        return self._send(calls.update_workflow_job(experiment, job_id, status, counters, tool_id, log_file_path))

    def kill_workflow_job(self, experiment: str, job_id: str) -> WorkflowJob:
        """Ask the run processor of the job's location to stop it."""
        return self._send(calls.kill_workflow_job(experiment, job_id))

    def delete_workflow_job(self, experiment: str, job_id: str) -> Any:
        """Remove a job's entry; nothing is stopped."""
        return self._send(calls.delete_workflow_job(experiment, job_id))

    def register_file(
        self,
        experiment: str,
        path: str,
        run_num: RunNumber | None = None,
        *,
        size: int | None = None,
        checksum: str | None = None,
    ) -> Any:
        """Say that a file of a run (the current one unless `run_num`) exists; `size` in bytes."""
        return self._send(calls.register_file(experiment, path, run_num, size, checksum))

    def files(self, experiment: str, run_num: RunNumber) -> list[FileEntry]:
        """The files of a run, and where they are."""
        return self._send(calls.files(experiment, run_num))

    def file_available_at_location(self, experiment: str, run_num: RunNumber, path: str, location: str) -> Any:
        """Say that a registered file has arrived at a location."""
        return self._send(calls.file_available_at_location(experiment, run_num, path, location))

    def new_elog_entry(
        self,
        experiment: str,
        text: str,
        run_num: RunNumber | None = None,
        *,
        title: str | None = None,
        tags: Iterable[str] = (),
    ) -> Any:
        """Write a text into the logbook; a tag is one word."""
        return self._send(calls.new_elog_entry(experiment, text, run_num, title, tags))

    def elog_entries(self, experiment: str) -> list[ElogEntry]:
        """The texts in the logbook."""
        return self._send(calls.elog_entries(experiment))


class AsyncElogClient:
    """The same for an event loop; close it with :meth:`aclose`, or use it in an ``async with``.

    Args:
        base_url: where the logbook is; a path in it goes in front of every call.
        credentials: our certificate, and whom we trust.
        timeout: seconds one call may take.
    """

    def __init__(self, base_url: str, credentials: Credentials, *, timeout: float = TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = async_client(self.base_url, credentials, timeout=timeout)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _send(self, call: Call[Value]) -> Value:
        async with aexplained(self.base_url):
            response = await self._http.request(
                call.method, call.path, params=call.query, content=call.body, data=call.form, headers=call.headers
            )
            response.raise_for_status()
        return call.read(response.content, self.base_url)

    async def start_run(
        self,
        experiment: str,
        run_type: str = "DATA",
        run_num: RunNumber | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        start_time: datetime | None = None,
        sample: str | None = None,
    ) -> RunDocument:
        """Start a run; an open one is ended first. The number is the next one unless `run_num` says otherwise."""
        return await self._send(calls.start_run(experiment, run_type, run_num, params, start_time, sample))

    async def end_run(self, experiment: str, *, end_time: datetime | None = None) -> RunDocument:
        """End the current run."""
        return await self._send(calls.end_run(experiment, end_time))

    async def current_run(self, experiment: str, *, skip_closed: bool = False) -> RunDocument | None:
        """The latest run; None when there is none (with `skip_closed`: none that is open)."""
        return await self._send(calls.current_run(experiment, skip_closed))

    async def add_run_params(
        self, experiment: str, params: Mapping[str, Any], run_num: RunNumber | None = None
    ) -> RunDocument:
        """Put parameters on a run (the current one unless `run_num`); the run may have ended."""
        return await self._send(calls.add_run_params(experiment, params, run_num))

    async def update_editable_param(self, experiment: str, run_num: RunNumber, name: str, value: str) -> Any:
        """Change a parameter that people edit in the run table."""
        return await self._send(calls.update_editable_param(experiment, run_num, name, value))

    async def runs(self, experiment: str, *, include_params: bool = True) -> list[RunDocument]:
        """All runs, the latest first."""
        return await self._send(calls.runs(experiment, include_params))

    async def run(self, experiment: str, run_num: RunNumber) -> RunDocument:
        """One run."""
        return await self._send(calls.run(experiment, run_num))

    async def runs_matching_params(self, experiment: str, params: Mapping[str, Any]) -> list[RunNumber]:
        """Numbers of the runs whose parameters have all these values."""
        return await self._send(calls.runs_matching_params(experiment, params))

    async def runs_matching_editable(self, experiment: str, name: str, regex: str) -> list[RunNumber]:
        """Numbers of the runs whose editable parameter matches a regular expression, letter case ignored."""
        return await self._send(calls.runs_matching_editable(experiment, name, regex))

    async def runs_with_tag(self, experiment: str, tag: str) -> list[RunNumber]:
        """Numbers of the runs that a logbook entry with this tag belongs to."""
        return await self._send(calls.runs_with_tag(experiment, tag))

    async def workflow_triggers(self, experiment: str) -> list[dict[str, str]]:
        """What a definition's `trigger` may be: ``{value, label}``."""
        return await self._send(calls.workflow_triggers(experiment))

    async def workflow_definitions(self, experiment: str) -> list[WorkflowDefinition]:
        """The experiment's workflow definitions."""
        return await self._send(calls.workflow_definitions(experiment))

    async def create_update_workflow_def(
        self, experiment: str, definition: WorkflowDefinition | Mapping[str, Any]
    ) -> WorkflowDefinition:
        """Write a definition: a new one, or, with `_id`, in place of the one there. It becomes the caller's."""
        return await self._send(calls.create_update_workflow_def(experiment, definition))

    async def delete_workflow_definition(self, experiment: str, def_id: str) -> None:
        """Delete a definition that no job refers to."""
        return await self._send(calls.delete_workflow_definition(experiment, def_id))

    async def workflow_jobs(self, experiment: str) -> list[WorkflowJob]:
        """The experiment's workflow jobs, those of the latest runs first."""
        return await self._send(calls.workflow_jobs(experiment))

    async def create_workflow_job(self, experiment: str, job_name: str, run_num: RunNumber) -> WorkflowJob:
        """Ask for a definition (`job_name`) to be executed for a run."""
        return await self._send(calls.create_workflow_job(experiment, job_name, run_num))

    async def update_workflow_job(
        self,
        experiment: str,
        job_id: str,
        *,
        status: str | None = None,
        counters: Iterable[Counter | Mapping[str, Any]] | None = None,
        tool_id: str | None = None,
        log_file_path: str | None = None,
    ) -> WorkflowJob:
        """Say how a job goes; what is None stays as it is."""
        return await self._send(calls.update_workflow_job(experiment, job_id, status, counters, tool_id, log_file_path))

    async def kill_workflow_job(self, experiment: str, job_id: str) -> WorkflowJob:
        """Ask the run processor of the job's location to stop it."""
        return await self._send(calls.kill_workflow_job(experiment, job_id))

    async def delete_workflow_job(self, experiment: str, job_id: str) -> Any:
        """Remove a job's entry; nothing is stopped."""
        return await self._send(calls.delete_workflow_job(experiment, job_id))

    async def register_file(
        self,
        experiment: str,
        path: str,
        run_num: RunNumber | None = None,
        *,
        size: int | None = None,
        checksum: str | None = None,
    ) -> Any:
        """Say that a file of a run (the current one unless `run_num`) exists; `size` in bytes."""
        return await self._send(calls.register_file(experiment, path, run_num, size, checksum))

    async def files(self, experiment: str, run_num: RunNumber) -> list[FileEntry]:
        """The files of a run, and where they are."""
        return await self._send(calls.files(experiment, run_num))

    async def file_available_at_location(self, experiment: str, run_num: RunNumber, path: str, location: str) -> Any:
        """Say that a registered file has arrived at a location."""
        return await self._send(calls.file_available_at_location(experiment, run_num, path, location))

    async def new_elog_entry(
        self,
        experiment: str,
        text: str,
        run_num: RunNumber | None = None,
        *,
        title: str | None = None,
        tags: Iterable[str] = (),
    ) -> Any:
        """Write a text into the logbook; a tag is one word."""
        return await self._send(calls.new_elog_entry(experiment, text, run_num, title, tags))

    async def elog_entries(self, experiment: str) -> list[ElogEntry]:
        """The texts in the logbook."""
        return await self._send(calls.elog_entries(experiment))
