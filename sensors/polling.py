"""What our sensors share: they wait with a trigger, in the triggerer or, look by look, in a worker."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, PokeReturnValue
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from lclstream_airflow.hooks.verdict import task_error
from lclstream_airflow.triggers.polling import PATIENCE_S, PollingTrigger, WaitStatus

if TYPE_CHECKING:
    from airflow.sdk import Context

#: Beyond the deadline that the trigger watches itself, Airflow's own one, in seconds.
_BACKSTOP_S = 60.0


class PollingSensor(BaseSensorOperator):
    """Waits with a trigger.

    :param deferrable: wait in the triggerer (default); otherwise in the worker, as `mode` says
    :param patience_s: how long the service may be away, in seconds
    :param poke_interval: pause between two looks, in seconds
    :param timeout: fail after that many seconds
    """

    def __init__(
        self,
        *,
        deferrable: bool = True,
        patience_s: float = PATIENCE_S,
        poke_interval: timedelta | float = 2.0,
        timeout: timedelta | float = 24 * 3600.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, timeout=timeout, **kwargs)
        self.deferrable = deferrable
        self.patience_s = patience_s
        self._looker: PollingTrigger | None = None

    @abstractmethod
    def trigger(self, deadline: float) -> PollingTrigger:
        """What waits."""

    @abstractmethod
    def record_link(self, context: Context) -> None:
        """Write down where people can look at what is waited for.

        Raises:
            ValueError: an argument or the connection is wrong.
        """

    def execute(self, context: Context) -> Any:
        """Wait.

        Raises:
            AirflowFailException: it will never come, or an argument is wrong.
            AirflowException: it did not come in time, or cannot be seen.
        """
        try:
            self.record_link(context)
            trigger = self.trigger(time.time() + self.timeout)
        except ValueError as error:
            raise task_error(error) from error
        if not self.deferrable:
            return super().execute(context)
        backstop = self.timeout + self.patience_s + _BACKSTOP_S
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timedelta(seconds=backstop))

    def poke(self, context: Context) -> PokeReturnValue:
        """One look, from a worker."""
        del context
        if self._looker is None:
            # One for all looks: some judge by what has changed since the last one.
            self._looker = self.trigger(time.time() + self.timeout)
        payload = asyncio.run(self._looker.peek())
        if payload is None:
            return PokeReturnValue(is_done=False)
        return PokeReturnValue(is_done=True, xcom_value=self._conclude(payload))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Continue with what the trigger says."""
        del context
        return self._conclude(event)

    def _conclude(self, payload: dict[str, Any]) -> dict[str, Any]:
        status = WaitStatus(payload["status"])
        self.log.info(payload["message"])
        if status is WaitStatus.REACHED:
            facts: dict[str, Any] = payload["facts"]
            return facts
        if status is WaitStatus.ENDED:
            # It will not come back to life: a retry would only wait for nothing.
            raise AirflowFailException(payload["message"])
        self.on_kill()
        raise AirflowException(payload["message"])
