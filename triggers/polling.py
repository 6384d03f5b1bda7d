"""The loop all our triggers share: look, wait, look again; give up only for a reason that is told.

One asyncio task of the triggerer owns a running trigger: its client, its connections, its patience. `run` yields
exactly one event. What ends a wait:

==============  ====================================================================================================
``reached``     what was waited for is there
``ended``       the remote work has ended otherwise, or is not known at the service: it will not come any more
``timeout``     the deadline of the task has passed
``unreachable`` the service was not to be had for too long, or refuses us, or we are not able to ask (no certificates,
                no connection) for a minute: what goes on there is UNKNOWN
==============  ====================================================================================================

Airflow calls `on_kill` when the task was marked or cleared, and does not say which. So the trigger asks for the task's
state: a task that Airflow runs again will find its work by its key, and that work goes on; any other's is cancelled.

The triggerer repeats its cancellation every second until the trigger is gone, and each repetition interrupts an
`on_kill` that has not ended. So what has to be done goes on in an asyncio task of its own. And the first question a
triggerer's process asks of Airflow takes seconds, because it loads Airflow's own API for it: the first trigger asks one
when it begins to wait, so that no kill has to wait for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Coroutine
from enum import StrEnum
from typing import Any, ClassVar

from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseTrigger, TriggerEvent

from lclstream_airflow.hooks.patience import Patience, PeerError, ServiceError

#: How long a service may be away before a wait is given up, in seconds.
PATIENCE_S = 600.0
#: How long a wait goes on without certificates, without Airflow's word on the connection, or with answers that are no
#: service's of ours, in seconds: a triggerer may start before its mounts and Airflow's database are there.
UNUSABLE_S = 60.0
#: How long a trigger tries to cancel; after that the lease has to do it.
KILL_PATIENCE_S = 20.0
#: How long Airflow may take to say in which state a task is, in seconds; under load its answers stall.
_ASK_AIRFLOW_S = 15.0
#: What goes on beside the triggers of this process; asyncio itself keeps no task alive.
_beside: set[asyncio.Task[Any]] = set()
#: States of a task that was cleared and waits for its turn, runs, or has come to wait again.
_RUNS_AGAIN = frozenset(
    {None, "scheduled", "queued", "running", "restarting", "deferred", "up_for_retry", "up_for_reschedule"}
)


#: Whether no trigger of this process has begun to wait.
_first = True


def _start_beside(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.create_task(work)
    _beside.add(task)
    task.add_done_callback(_beside.discard)
    return task


class OnKill(StrEnum):
    """What happens to the remote work when its task is killed: marked failed or success, cleared, or timed out."""

    CANCEL = "cancel"
    LEAVE = "leave"


class WaitStatus(StrEnum):
    """Why a wait has ended."""

    REACHED = "reached"
    ENDED = "ended"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"


def event(status: WaitStatus, remote_id: str | int, message: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The payload of a trigger's event: JSON values only."""
    return {"status": status.value, "remote_id": remote_id, "message": message, "facts": facts}


class PollingTrigger(BaseTrigger):
    """Looks at something remote until it is as wanted, has ended, or the time is over.

    :param conn_id: id of the Airflow connection of the service
    :param remote_id: the service's id of what is looked at
    :param deadline: when to give up, in seconds since 1970
    :param poll_interval: pause between two looks, in seconds
    :param patience_s: how long the service may be away, in seconds
    :param on_kill_policy: what a kill of the task does to the remote work; `cleanup` never does anything to it
    """

    #: What the thing is called in messages, such as "transfer".
    what: ClassVar[str]

    def __init__(
        self,
        *,
        conn_id: str,
        remote_id: str | int,
        deadline: float,
        poll_interval: float = 2.0,
        patience_s: float = PATIENCE_S,
        on_kill_policy: str = OnKill.CANCEL,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id
        self.remote_id = remote_id
        self.deadline = deadline
        self.poll_interval = poll_interval
        self.patience_s = patience_s
        self.on_kill_policy = OnKill(on_kill_policy)
        self._facts: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """What `__init__` needs to make this trigger again, as JSON values."""
        return {
            "conn_id": self.conn_id,
            "remote_id": self.remote_id,
            "deadline": self.deadline,
            "poll_interval": self.poll_interval,
            "patience_s": self.patience_s,
            "on_kill_policy": self.on_kill_policy.value,
        }

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments; wrong ones fail here, in the task, and not hours later in the triggerer.

        Raises:
            TypeError: an argument is not a JSON value.
        """
        arguments = self.arguments()
        json.dumps(arguments)
        return f"{type(self).__module__}.{type(self).__qualname__}", arguments

    @abstractmethod
    async def connect(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """A client of the service."""

    @abstractmethod
    async def look(self, client: Any) -> dict[str, Any] | None:
        """One look: the event's payload, or None to look again later. May set ``self._facts`` for later messages.

        Raises:
            PeerError: the look failed; it is repeated if that can help.
            ValueError: the answer is no service's of ours; it is asked for again, for a minute.
        """

    @abstractmethod
    async def cancel(self, client: Any) -> None:
        """End the remote work."""

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until there is something to say, and say it once."""
        global _first
        if _first and self.task_instance is not None:
            _first = False
            _start_beside(self._runs_again())
        # The event is made before it is yielded: whoever takes it may never come back to close our connections.
        payload = await self.wait()
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]

    async def wait(self) -> dict[str, Any]:
        """The payload of the only event."""
        payload = await self._look_until_something(once=False)
        assert payload is not None
        return payload

    async def peek(self) -> dict[str, Any] | None:
        """What one look says, repeated only where the service stumbles; None: nothing yet."""
        return await self._look_until_something(once=True)

    async def _look_until_something(self, *, once: bool) -> dict[str, Any] | None:
        patience, unusable = Patience(self.patience_s), self._until_unusable()
        while True:
            try:
                async with await self.connect() as client:
                    while True:
                        payload = await self.look(client)
                        patience.succeeded()
                        unusable.succeeded()
                        if payload is not None or once:
                            return payload
                        remaining = self.deadline - time.time()
                        if remaining <= 0:
                            return self._timeout()
                        await asyncio.sleep(min(self.poll_interval, remaining))
            except (PeerError, ValueError, OSError) as error:
                if isinstance(error, ServiceError) and error.status == 404:
                    return self._event(WaitStatus.ENDED, f"is not known: {error}")
                if isinstance(error, PeerError):
                    pause, unusable = patience.pause_after(error), self._until_unusable()
                else:
                    # The worker could use connection and certificates before it deferred: giving up at once would
                    # cancel good work because a triggerer was restarted.
                    pause = unusable.pause_after(error)
                if pause is None:
                    return self._event(WaitStatus.UNREACHABLE, f"is in an unknown state: {error}")
                # A new connection reads our certificates again: they may have been renewed meanwhile.
                self.log.warning("%s %s: %s; looking again in %.1f s", self.what, self.remote_id, error, pause)
                if time.time() + pause >= self.deadline:
                    await asyncio.sleep(max(0.0, self.deadline - time.time()))
                    return self._timeout()
                await asyncio.sleep(pause)

    def _until_unusable(self) -> Patience:
        return Patience(min(self.patience_s, UNUSABLE_S))

    def _timeout(self) -> dict[str, Any]:
        return self._event(WaitStatus.TIMEOUT, "took longer than it was given")

    def _event(self, status: WaitStatus, words: str) -> dict[str, Any]:
        return event(status, self.remote_id, f"{self.what} {self.remote_id} {words}", self._facts)

    async def on_kill(self) -> None:
        """Cancel the remote work, when that is wanted: somebody acted on the task while it was deferred."""
        await asyncio.shield(_start_beside(self._end_unless_wanted()))

    async def _end_unless_wanted(self) -> None:
        if self.on_kill_policy is OnKill.LEAVE:
            self.log.info("%s %s is left as it is", self.what, self.remote_id)
            return
        if await self._runs_again():
            self.log.info("%s %s goes on: its task was cleared and will find it again", self.what, self.remote_id)
            return
        patience = Patience(KILL_PATIENCE_S)
        while True:
            try:
                async with await self.connect() as client:
                    await self.cancel(client)
                self.log.info("%s %s is cancelled", self.what, self.remote_id)
                return
            except (PeerError, ValueError, OSError) as error:
                pause = patience.pause_after(error)
                if pause is None:
                    self.log.error("%s %s could not be cancelled: %s", self.what, self.remote_id, error)
                    return
                self.log.warning("%s %s: %s; cancelling again in %.1f s", self.what, self.remote_id, error, pause)
                await asyncio.sleep(pause)

    async def _runs_again(self) -> bool:
        """Whether Airflow runs our task again, or will.

        False also when that cannot be learnt: what is not known to be wanted must end.
        """
        ti = self.task_instance
        if ti is None:
            return False
        map_index = -1 if ti.map_index is None else ti.map_index
        name = ti.task_id if map_index < 0 else f"{ti.task_id}_{map_index}"
        try:
            async with asyncio.timeout(_ASK_AIRFLOW_S):
                states = await asyncio.to_thread(
                    RuntimeTaskInstance.get_task_states,
                    dag_id=ti.dag_id,
                    map_index=map_index,
                    task_ids=[ti.task_id],
                    run_ids=[ti.run_id],
                )
        except Exception as error:  # Airflow's supervisor raises what it likes
            self.log.warning("the state of task %s is not known: %s", name, error)
            return False
        known = states.get(ti.run_id, {})
        return name in known and known[name] in _RUNS_AGAIN
