"""Waiting for the logbook to say something about a run: that it has ended, that its files have arrived."""

from __future__ import annotations

import contextlib
import fnmatch
from typing import Any, ClassVar

from lclstream_airflow.hooks.elog import AsyncElogClient, ElogError, ElogHook, FileEntry, RunDocument, run_number
from lclstream_airflow.triggers.polling import PATIENCE_S, OnKill, PollingTrigger, WaitStatus, event

#: Facts go through Airflow's database; a run with more files than that gives their number only.
_MOST_PATHS = 500


class ElogRunTrigger(PollingTrigger):
    """Waits for something about one run. There is nothing remote to cancel: a kill only ends the wait.

    :param experiment: the experiment's name
    :param run: the run's number
    """

    what: ClassVar[str] = "run"

    def __init__(
        self,
        *,
        conn_id: str,
        experiment: str,
        run: int | str,
        deadline: float,
        poll_interval: float = 10.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(
            conn_id=conn_id,
            remote_id=run,
            deadline=deadline,
            poll_interval=poll_interval,
            patience_s=patience_s,
            on_kill_policy=OnKill.LEAVE,
        )
        self.experiment = experiment
        self.run_number = run_number(run)

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        return {
            "conn_id": self.conn_id,
            "experiment": self.experiment,
            "run": self.remote_id,
            "deadline": self.deadline,
            "poll_interval": self.poll_interval,
            "patience_s": self.patience_s,
        }

    async def connect(self) -> contextlib.AbstractAsyncContextManager[AsyncElogClient]:
        """A client of the logbook."""
        return await ElogHook(self.conn_id).get_async_conn()

    async def look(self, client: AsyncElogClient) -> dict[str, Any] | None:
        """Ask, and judge the answer; a run the logbook does not know will not come by waiting."""
        try:
            return await self.ask(client)
        except ElogError as error:
            if not error.errormsg:
                # Not the logbook's words: a proxy in its place, say, while it is restarted.
                raise ValueError(str(error)) from error
            return event(WaitStatus.ENDED, self.remote_id, str(error), {})

    async def ask(self, client: AsyncElogClient) -> dict[str, Any] | None:
        """What this trigger waits for; see :meth:`PollingTrigger.look`."""
        raise NotImplementedError

    async def cancel(self, client: AsyncElogClient) -> None:
        """Nothing is remote."""


class ElogRunClosedTrigger(ElogRunTrigger):
    """Waits until a run has ended."""

    async def ask(self, client: AsyncElogClient) -> dict[str, Any] | None:
        """Whether the run has an end."""
        run = await client.run(self.experiment, self.run_number)
        if run.end_time is None:
            return None
        return event(WaitStatus.REACHED, self.remote_id, f"run {run.num} has ended", run_facts(self.experiment, run))


class ElogFilesTrigger(ElogRunTrigger):
    """Waits until a run has ended and all its files, or those that match, are at a location.

    :param location: the logbook's name of the place, such as ``SLAC``; empty: wherever they are
    :param pattern: which files count, such as ``*.xtc2``
    :param least: how many there must be at least
    """

    def __init__(self, *, location: str, pattern: str = "*", least: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.location = location
        self.pattern = pattern
        self.least = least

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        return {**super().arguments(), "location": self.location, "pattern": self.pattern, "least": self.least}

    async def ask(self, client: AsyncElogClient) -> dict[str, Any] | None:
        """Whether the files are there. While the run is open there may always be one more."""
        run = await client.run(self.experiment, self.run_number)
        files = [
            file
            for file in await client.files(self.experiment, self.run_number)
            if fnmatch.fnmatch(file.path, self.pattern)
        ]
        here = [file for file in files if not self.location or self.location in file.locations]
        self._facts = {**run_facts(self.experiment, run), **_files_facts(self.location, here)}
        self.log.info("run %s: %d of %d files are at %s", run.num, len(here), len(files), self.location)
        if run.end_time is None or len(here) < max(len(files), self.least):
            return None
        return event(
            WaitStatus.REACHED, self.remote_id, f"run {run.num}: {len(here)} files are at {self.location}", self._facts
        )


def run_facts(experiment: str, run: RunDocument) -> dict[str, Any]:
    """What a DAG may know about a run; JSON values only."""
    return {
        "experiment": experiment,
        "run": run.num,
        "type": run.type,
        "begin_time": run.begin_time.isoformat() if run.begin_time else None,
        "end_time": run.end_time.isoformat() if run.end_time else None,
        "duration_s": (run.end_time - run.begin_time).total_seconds() if run.end_time and run.begin_time else None,
    }


def _files_facts(location: str, files: list[FileEntry]) -> dict[str, Any]:
    return {
        "location": location,
        "files": len(files),
        "bytes": sum(file.size or 0 for file in files),
        "paths": sorted(file.path for file in files)[:_MOST_PATHS],
    }
