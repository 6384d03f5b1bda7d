"""Does what the state machine asks for, and follows what the jobs and buffers really do.

Who owns what: the service's event loop runs one :class:`Supervisor`; it owns one task for every transfer that is not
released yet (:class:`.Driver`), one that forgets old transfers, one that marks that the service is there, and a small
pool of threads for the database.
A transfer's driver is the only one that talks to the job service about it, that reads its buffers, and that turns what
its jobs did into events. Request handlers, in other threads, only write rows (a cancellation, a renewed lease, what a
callback said) and wake the driver.

Everything may be killed at any moment. Whatever a driver needs is in the database before it acts; on start each
transfer that is not released gets a driver again, which repeats what may have been done and asks how things are. The
time in which the service or its database was away counts against no lease and no time limit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from lclstream.api import absence
from lclstream.api.config import ApiConfig
from lclstream.api.driver import Driver, JobService, StatusReader
from lclstream.api.store import Store

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

#: Threads for the database: SQLite lets one write at a time anyhow.
_DATABASE_THREADS = 4
#: How often old transfers are forgotten, in seconds.
_PRUNE_S = 3600.0
#: Transfers that go on at once after a start, and seconds between the others: hundreds at the same moment would keep
#: the first requests waiting.
_AT_ONCE, _RESUME_S = 8, 0.01
#: Seconds until a driver that died of a programming error is started again.
_RESTART_S = 5.0
#: How often the service marks that it is there, in seconds; several times within :data:`.absence.AWAY_S`.
_PRESENT_S = 5.0


class Supervisor:
    """All drivers; use it in an ``async with`` in the event loop that shall own them.

    Args:
        store: the transfers.
        jobs: the job service.
        config: the service's configuration.
        reader: makes a reader of a buffer's status from its URL.
    """

    def __init__(
        self, store: Store, jobs: JobService, config: ApiConfig, reader: Callable[[str], StatusReader]
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._config = config
        self._reader = reader
        self._drivers: dict[int, Driver] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(_DATABASE_THREADS, thread_name_prefix="transfers")
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        away_s = await self.in_thread(self._store.present, returned=True)
        self._marked, self._away = self._loop.time(), False
        self._marking = asyncio.create_task(self._mark(), name="transfers-mark")
        self._pruning = asyncio.create_task(self._prune(), name="transfers-prune")
        waiting = await self.in_thread(self._store.unreleased)
        if waiting:
            log.info("%d transfers go on where they were; the service was away for %.0f s", len(waiting), away_s)
        for transfer in waiting[:_AT_ONCE]:
            self._watch(transfer)
        self._resuming = asyncio.create_task(self._resume(waiting[_AT_ONCE:]), name="transfers-resume")
        return self

    async def _resume(self, waiting: Sequence[int]) -> None:
        for transfer in waiting:
            self._watch(transfer)
            await asyncio.sleep(_RESUME_S)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        # Jobs go on running: a service that is restarted finds them again.
        loop, self._loop = self._loop, None
        assert loop is not None
        tasks = [self._marking, self._pruning, self._resuming, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown()

    def wake(self, transfer: int) -> None:
        """Look at a transfer now: it is new, or something about it was written. May be called from any thread."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._watch, transfer)

    def live(self, transfer: int) -> list[dict[str, Any] | None] | None:
        """The last status documents of a transfer's buffers, newer than the stored ones; None when nobody drives it."""
        driver = self._drivers.get(transfer)
        return None if driver is None else driver.documents

    async def in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of the store in one of the database's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))

    def _watch(self, transfer: int) -> None:
        if self._loop is None:
            return
        driver = self._drivers.get(transfer)
        if driver is not None:
            driver.wake()
            return
        driver = Driver(
            transfer, self._store, self._jobs, self._config, self._reader, self.in_thread, lambda: not self._was_away()
        )
        self._drivers[transfer] = driver
        self._tasks[transfer] = asyncio.create_task(self._drive(driver), name=f"transfer-{transfer}")

    def _was_away(self) -> bool:
        """Whether the database was away, and what it missed has still to be added to leases and limits."""
        # A call that hangs has not failed yet.
        return self._away or asyncio.get_running_loop().time() - self._marked > absence.AWAY_S

    async def _mark(self) -> None:
        while True:
            await asyncio.sleep(_PRESENT_S)
            try:
                away_s = await self.in_thread(self._store.present, returned=self._away)
            except Exception as error:
                self._away = True
                log.warning("the database does not answer; leases and time limits stand still: %s", error)
                continue
            if away_s:
                log.warning("the database was away for %.0f s, which count against no lease and no limit", away_s)
            self._marked, self._away = asyncio.get_running_loop().time(), False

    async def _prune(self) -> None:
        while True:
            try:
                count = await self.in_thread(self._store.prune, self._store.clock() - 86400 * self._config.keep_days)
                if count:
                    log.info(
                        "%d transfers ended more than %g days ago and are forgotten", count, self._config.keep_days
                    )
            except Exception:
                log.exception("old transfers could not be forgotten; tried again in %g s", _PRUNE_S)
            await asyncio.sleep(_PRUNE_S)

    async def _drive(self, driver: Driver) -> None:
        try:
            while True:
                try:
                    await driver.run()
                    return
                except Exception:
                    # One transfer's trouble must neither end the others nor leave its own jobs without an owner.
                    log.exception(
                        "transfer %d: its driver failed; it starts again in %g s", driver.transfer, _RESTART_S
                    )
                    await asyncio.sleep(_RESTART_S)
        finally:
            self._drivers.pop(driver.transfer, None)
            self._tasks.pop(driver.transfer, None)
