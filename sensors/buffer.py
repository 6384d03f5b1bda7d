"""Wait for what happens in a transfer's buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from lclstream_airflow.hooks.lclstream import LCLStreamHook
from lclstream_airflow.hooks.patience import PeerError, insist
from lclstream_airflow.links import TransferLink
from lclstream_airflow.sensors.polling import PollingSensor
from lclstream_airflow.triggers.lclstream import LCLStreamTransferTrigger
from lclstream_airflow.triggers.polling import KILL_PATIENCE_S, OnKill

if TYPE_CHECKING:
    from airflow.sdk import Context

_TRANSFER_LINK = TransferLink()
_Until = Literal["ready", "flowing", "level", "stalled", "drained", "done"]


class NNGBufferSensor(PollingSensor):
    """Waits until a transfer's buffer is as wanted, and keeps the transfer's lease meanwhile.

    Returns the transfer's facts: ``transfer_id url phase received_messages sent_messages held_messages lost_messages
    received_bytes sent_bytes rate_in_bytes_s …``. Fails when the transfer fails, is cancelled or expires.

    :param transfer_id: the transfer, such as ``XComArg(request_stream, key="transfer_id")``
    :param until: ``"ready"``: consumers can connect; ``"flowing"``: a message has come; ``"level"``: the buffer is as
        full as `level` says; ``"stalled"``: no message has come or gone for `stalled_s`; ``"drained"``: the producers
        have gone and the buffer is empty; ``"done"``: also its jobs have ended and its ports are free
    :param level: how full the buffer has to be for ``"level"``, as a part of its capacity, such as 0.8
    :param stalled_s: for ``"stalled"``, in seconds. A stream that ends without having been full, or stalled, fails the
        task; ``soft_fail=True`` skips it instead
    :param lease_s: each look moves the end of the transfer's lease to that many seconds from then. None: the transfer
        has no lease, or another task keeps it
    :param on_kill_policy: ``"leave"`` (default): the transfer outlives a kill of this sensor (and its lease ends it
        when nobody renews that); ``"cancel"``: it ends, too
    :param lclstream_conn_id: connection of type `lclstream`

    Further arguments: see :class:`.PollingSensor`.
    """

    template_fields: Sequence[str] = ("transfer_id", "level", "stalled_s", "lease_s", "lclstream_conn_id")
    operator_extra_links = (_TRANSFER_LINK,)
    ui_color = "#d8f0f6"

    def __init__(
        self,
        *,
        transfer_id: int | str,
        until: _Until,
        level: float | str = 0.8,
        stalled_s: float | str = 60.0,
        lease_s: float | str | None = 60.0,
        on_kill_policy: OnKill | str = OnKill.LEAVE,
        lclstream_conn_id: str = LCLStreamHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if until not in get_args(_Until):
            raise ValueError(f"until is {until!r}: it may be {', '.join(get_args(_Until))}")
        if until == "stalled" and not self.deferrable and self.reschedule:
            raise ValueError("until='stalled' compares two looks: use deferrable=True or mode='poke'")
        self.transfer_id = transfer_id
        self.until = until
        self.level = level
        self.stalled_s = stalled_s
        self.lease_s = lease_s
        self.on_kill_policy = OnKill(on_kill_policy)
        self.lclstream_conn_id = lclstream_conn_id
        self._hook: LCLStreamHook | None = None

    @property
    def hook(self) -> LCLStreamHook:
        """The connection's hook."""
        if self._hook is None:
            self._hook = LCLStreamHook(self.lclstream_conn_id)
        return self._hook

    def record_link(self, context: Context) -> None:
        """See :meth:`PollingSensor.record_link`."""
        _TRANSFER_LINK.record(context, self.hook.transfer_url(self._transfer()))

    def on_kill(self) -> None:
        """The worker is being killed, or the time is over: end the transfer, when that is wanted."""
        if self.on_kill_policy is OnKill.LEAVE:
            return

        def cancel() -> None:
            with self.hook.get_conn() as client:
                client.cancel(self._transfer())

        try:
            insist(cancel, limit_s=KILL_PATIENCE_S)
        except (PeerError, ValueError) as error:
            self.log.error("transfer %s could not be ended: %s", self.transfer_id, error)

    def trigger(self, deadline: float) -> LCLStreamTransferTrigger:
        """See :meth:`PollingSensor.trigger`."""
        return LCLStreamTransferTrigger(
            conn_id=self.lclstream_conn_id,
            remote_id=self._transfer(),
            deadline=deadline,
            until=self.until,
            lease_s=self._lease(),
            level=self._number("level", self.level, most=1.0),
            stalled_s=self._number("stalled_s", self.stalled_s),
            poll_interval=self.poke_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
        )

    def _transfer(self) -> int:
        try:
            return int(self.transfer_id)
        except (TypeError, ValueError):
            raise ValueError(
                f"transfer_id is {self.transfer_id!r}: it must be the number of a transfer "
                "(`XComArg(request_stream, key='transfer_id')`)"
            ) from None

    @staticmethod
    def _number(name: str, value: Any, most: float = math.inf) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number <= most:
            raise ValueError(f"{name} is {value!r}: it must be a number above 0" + (f", at most {most:g}" * (most < 2)))
        return number

    def _lease(self) -> float | None:
        return None if self.lease_s in (None, "", "None") else float(self.lease_s or 0)
