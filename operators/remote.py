"""A task whose work runs elsewhere: started once, found again, waited for, cancelled when nobody wants it any more.

Ids come before effects. Every start carries a key made from DAG, run, task and map index, so the service gives the
same work to a task that is run again; the id is recorded the instant it is known. Whether a task that runs again wants
the old work or new work follows from what became of the old:

=====================================  ===============================================================================
the earlier work is under way          it is taken over (a worker died, or somebody cleared the task)
it has succeeded, its task did not     it is taken over: its task died before it said so, or Airflow did not hear it
anything else                          new work, under the next key: ``…#2``, ``…#3``
=====================================  ===============================================================================

Clearing a task that *has* succeeded asks for new work. What tells that from Airflow's own retry is the number of tries
Airflow allows, which every clearing raises.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from abc import abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import BaseOperator
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferralError, TaskDeferralTimeout

from lclstream_airflow.hooks.patience import PeerError, ServiceError, insist
from lclstream_airflow.hooks.verdict import task_error
from lclstream_airflow.operators.documents import DocumentError
from lclstream_airflow.triggers.polling import PATIENCE_S, OnKill, PollingTrigger, WaitStatus

if TYPE_CHECKING:
    from airflow.sdk import Context

#: How long starting is tried when the service cannot be reached, in seconds.
START_PATIENCE_S = 30.0
#: How long a worker that is being killed tries to cancel, in seconds; Airflow kills it for good soon after.
KILL_PATIENCE_S = 5.0
#: Work that is found under way may be about to be cancelled: by the worker of the try that somebody cleared a moment
#: ago, or by its trigger, when that cannot learn that the task runs again (1 to 5 s after the click). After this pause,
#: in seconds, it is looked at again.
TAKE_OVER_PAUSE_S = 5.0
#: Beyond the deadline that the trigger watches itself, Airflow's own one, in seconds.
_BACKSTOP_S = 60.0
#: Pause between two looks before deferring, in seconds.
_PROMPT_PAUSE_S = 0.5
#: A task that was cleared more often than this has another problem.
_MOST_ROUNDS = 1000
_STATE_KEY = "lclstream_unfinished"
#: The work whose success the last try has reported, and how many tries Airflow allowed then.
_SUCCESS_KEY = "lclstream_succeeded"
#: What services take as a key, which travels in an HTTP header; room is left for ``#N``.
_HEADER_VALUE = re.compile(r"[!-~]{1,200}")


class Progress(Enum):
    """What can be said about remote work."""

    UNDER_WAY = "under way"
    SUCCEEDED = "succeeded"
    OVER = "over without success"


@dataclass(frozen=True)
class Remote:
    """Remote work: the service's id of it, and how it stands."""

    id: str | int
    progress: Progress


def idempotency_key(context: Context) -> str:
    """The name of a task's remote work, the same for every try: DAG, run, task, and index of a mapped task."""
    ti = context["ti"]
    key = f"{ti.dag_id}/{ti.run_id}/{ti.task_id}"
    if ti.map_index is not None and ti.map_index >= 0:
        key += f"/{ti.map_index}"
    if not _HEADER_VALUE.fullmatch(key):
        key = "sha256:" + hashlib.sha256(key.encode()).hexdigest()
    return key


def installation() -> str:
    """The name of this Airflow: what it calls itself in links (``[api] base_url``)."""
    return str(conf.get("api", "base_url", fallback=None) or "http://localhost:8080")


def work_tags(context: Context, policy: OnKill, lasts: Literal["task", "run"]) -> dict[str, str]:
    """What remote work carries so that the reconciler knows whose it is: installation, DAG, run, task, try, policy.

    :param lasts: whether the work is wanted until its task ends, or until its DAG run does

    Empty when an id cannot be written as a tag: work under a changed name would look like nobody's, and be ended.
    """
    ti = context["ti"]
    tags = {
        "airflow": installation(),
        "dag_id": ti.dag_id,
        "run_id": ti.run_id,
        "task_id": ti.task_id,
        "try": str(ti.try_number),
        "on_kill": policy.value,
        "lasts": lasts,
    }
    if ti.map_index is not None and ti.map_index >= 0:
        tags["map_index"] = str(ti.map_index)
    return tags if all(value.isprintable() for value in tags.values()) else {}


class RemoteWorkOperator(BaseOperator):
    """What the operators for transfers and jobs have in common.

    :param deferrable: wait in the triggerer, without a worker slot (default); otherwise in the worker
    :param prompt_s: before deferring, wait in the worker for so many seconds: what is there at once needs no way
        through the triggerer and no second start of a worker
    :param retry_failed_work: whether `retries` also start anew what has failed there (default). Otherwise they only
        help where Airflow or the way to the service failed, and the work itself is found again
    :param poll_interval: pause between two looks, in seconds
    :param wait_timeout_s: end the wait after that many seconds, and cancel the work. Not `execution_timeout`, which
        Airflow counts only while a worker has the task
    :param patience_s: how long the service may be away while we wait, in seconds; its work goes on meanwhile
    :param on_kill_policy: ``"cancel"`` (default) or ``"leave"`` the work when the task is killed: marked failed or
        success, cleared, timed out
    """

    def __init__(
        self,
        *,
        deferrable: bool = True,
        prompt_s: float = 0.0,
        retry_failed_work: bool = True,
        poll_interval: float = 2.0,
        wait_timeout_s: float = 24 * 3600.0,
        patience_s: float = PATIENCE_S,
        on_kill_policy: OnKill | str = OnKill.CANCEL,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.deferrable = deferrable
        self.retry_failed_work = retry_failed_work
        self.prompt_s = prompt_s
        self.poll_interval = poll_interval
        self.wait_timeout_s = wait_timeout_s
        self.patience_s = patience_s
        self.on_kill_policy = OnKill(on_kill_policy)
        self._key: str | None = None
        self._remote_id: str | int | None = None
        #: What `start` puts on the work, where the service knows tags.
        self.tags: dict[str, str] = {}

    @abstractmethod
    def prepare(self, context: Context) -> None:
        """Read and check everything that can be wrong, before anything is started.

        Raises:
            ValueError: an argument, a document or a connection is wrong.
        """

    @abstractmethod
    def start(self, key: str) -> Remote:
        """Start the work under that key, or get what was started under it before."""

    @abstractmethod
    def state(self, remote_id: str | int) -> Remote:
        """How the work stands."""

    @abstractmethod
    def record(self, context: Context, remote_id: str | int) -> None:
        """Write down the id, and what else is known, for people and later tasks."""

    @abstractmethod
    def trigger(self, remote_id: str | int, deadline: float) -> PollingTrigger:
        """What waits for the work."""

    @abstractmethod
    def cancel(self, remote_id: str | int) -> None:
        """End the work."""

    @abstractmethod
    def finish(self, context: Context, remote_id: str | int, facts: dict[str, Any]) -> dict[str, Any]:
        """What the task returns, after what was waited for is there."""

    def lasts(self) -> Literal["task", "run"]:
        """Whether the work is wanted until this task ends, or until its DAG run does."""
        return "task"

    def explain(self, remote_id: str | int) -> str:
        """What else a message about failed work should say."""
        del remote_id
        return ""

    def execute(self, context: Context) -> dict[str, Any]:
        """Start the work and wait for it.

        Raises:
            AirflowFailException: it would fail in the same way if it were tried again.
            AirflowException: it failed; `retries` may help.
        """
        self.tags = work_tags(context, self.on_kill_policy, self.lasts())
        try:
            self.prepare(context)
            # Wrong arguments of the trigger must show before anything runs.
            self.trigger(0, time.time()).serialize()
        except (PeerError, ValueError) as error:
            raise task_error(error) from error
        try:
            remote = self._start_or_find(context)
        except (PeerError, ValueError) as error:
            raise task_error(error, checked=not isinstance(error, DocumentError)) from error
        try:
            return self._await(context, remote.id)
        except Exception:
            # Failing here must not leave behind what nobody waits for.
            self._cancel_quietly(remote.id)
            raise

    def _start_or_find(self, context: Context) -> Remote:
        store = context.get("task_state_store")
        unfinished = self._unfinished(context)
        base = idempotency_key(context)
        for turn in range(1, _MOST_ROUNDS):
            self._key = base if turn == 1 else f"{base}#{turn}"
            try:
                remote = insist(lambda key=self._key: self.start(key), limit_s=START_PATIENCE_S)  # type: ignore[misc]
            except ServiceError as error:
                if error.status != 409:
                    raise
                # The same task with another configuration: what it started before the change is not wanted any more.
                self.log.info("Key %s was used with another description; taking the next one", self._key)
                if unfinished is not None:
                    self._cancel_quietly(unfinished)
                continue
            if remote.progress is Progress.UNDER_WAY:
                self._remote_id = remote.id
                self.record(context, remote.id)
                if store is not None:
                    store.set(_STATE_KEY, remote.id)
                if remote.id != unfinished:
                    return remote
                self.log.info("Found %s under way; looking again in %.0f s", remote.id, TAKE_OVER_PAUSE_S)
                time.sleep(TAKE_OVER_PAUSE_S)
                remote = insist(lambda known=remote.id: self.state(known), limit_s=START_PATIENCE_S)  # type: ignore[misc]
                if remote.progress is not Progress.OVER:
                    return remote
            elif remote.progress is Progress.SUCCEEDED and remote.id == unfinished:
                self.log.info("%s has succeeded; the earlier try of this task had no time to say so", remote.id)
                self._remote_id = remote.id
                self.record(context, remote.id)
                return remote
            self.log.info("%s is %s: starting anew", remote.id, remote.progress.value)
            self._remote_id = None
        raise AirflowFailException(f"{base} was started {_MOST_ROUNDS} times already")

    def _await(self, context: Context, remote_id: str | int) -> dict[str, Any]:
        trigger = self.trigger(remote_id, time.time() + self.wait_timeout_s)
        if self.deferrable:
            payload = asyncio.run(self._prompt_answer(trigger)) if self.prompt_s > 0 else None
            if payload is not None:
                return self.execute_complete(context, payload)
            backstop = self.wait_timeout_s + self.patience_s + _BACKSTOP_S
            self.defer(trigger=trigger, method_name="execute_complete", timeout=timedelta(seconds=backstop))
        return self.execute_complete(context, asyncio.run(trigger.wait()))

    async def _prompt_answer(self, trigger: PollingTrigger) -> dict[str, Any] | None:
        until = time.monotonic() + self.prompt_s
        while True:
            payload = await trigger.peek()
            if payload is not None or time.monotonic() >= until:
                return payload
            await asyncio.sleep(min(_PROMPT_PAUSE_S, self.poll_interval))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Continue with what the trigger says.

        Raises:
            AirflowException: the work failed, took too long, or its state is unknown; it is cancelled first.
        """
        remote_id = self._remote_id = event["remote_id"]
        status = WaitStatus(event["status"])
        if status is WaitStatus.REACHED:
            try:
                result = self.finish(context, remote_id, event["facts"])
            except (PeerError, ValueError) as error:
                checked = not isinstance(error, DocumentError)
                raise task_error(error, f"{event['message']}, but {error}", checked=checked) from error
            self._forget(context, succeeded=remote_id)
            return result
        if status is not WaitStatus.ENDED:
            self._cancel_quietly(remote_id)
        self._forget(context)
        more = ""
        try:
            more = self.explain(remote_id)
        except (PeerError, ValueError) as error:
            self.log.warning("Nothing more is known about %s: %s", remote_id, error)
        if status is WaitStatus.ENDED and not self.retry_failed_work:
            raise AirflowFailException(f"{event['message']}{more}")
        raise AirflowException(f"{event['message']}{more}")

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """As Airflow does it; and when the wait itself has failed, the work is cancelled.

        The trigger's `on_kill` is not called when Airflow's own timeout of deferred tasks strikes or a trigger crashes.
        """
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except (TaskDeferralTimeout, TaskDeferralError):
            unfinished = self._unfinished(context)
            if unfinished is not None:
                self._cancel_quietly(unfinished)
                self._forget(context)
            raise

    def on_kill(self) -> None:
        """The worker is being killed: cancel the work, when that is wanted."""
        if self.on_kill_policy is OnKill.LEAVE:
            return
        try:
            if self._remote_id is None and self._key is not None:
                # Killed between asking for the work and the answer: the key says what it was.
                self._remote_id = insist(lambda: self.start(self._key or ""), limit_s=KILL_PATIENCE_S).id
        except (PeerError, ValueError) as error:
            self.log.error("What was started under %s is not known and cannot be cancelled: %s", self._key, error)
        if self._remote_id is not None:
            self._cancel_quietly(self._remote_id, KILL_PATIENCE_S)

    def _cancel_quietly(self, remote_id: str | int, limit_s: float = START_PATIENCE_S) -> None:
        if self.on_kill_policy is OnKill.LEAVE:
            return
        try:
            insist(lambda: self.cancel(remote_id), limit_s=limit_s)
            self.log.info("Cancelled %s", remote_id)
        except (PeerError, ValueError) as error:
            self.log.error("%s could not be cancelled: %s", remote_id, error)

    @staticmethod
    def _unfinished(context: Context) -> str | int | None:
        """The id of the work that a try of this task has recorded, and not brought to an end that Airflow knows."""
        store = context.get("task_state_store")
        if store is None:
            return None
        recorded = store.get(_STATE_KEY)
        if recorded is None:
            reported = store.get(_SUCCESS_KEY)
            # Nobody has cleared the task since, and still it runs again: Airflow has marked the try failed before it
            # heard of the success, as its scheduler does with resumed tasks under load.
            if isinstance(reported, dict) and reported.get("max_tries") == context["ti"].max_tries:
                recorded = reported.get("id")
        return recorded if isinstance(recorded, str | int) else None

    @staticmethod
    def _forget(context: Context, succeeded: str | int | None = None) -> None:
        store = context.get("task_state_store")
        if store is not None:
            if succeeded is not None:
                store.set(_SUCCESS_KEY, {"id": succeeded, "max_tries": context["ti"].max_tries})
            store.delete(_STATE_KEY)
