"""Waiting for a transfer: until it can be pulled from, data flow, fill the buffer, stand still, are gone; for its end.

Each look renews the transfer's lease: as long as somebody waits the transfer lives, and when Airflow is gone for good
the transfer service ends it by itself.
"""

from __future__ import annotations

import contextlib
import time
from enum import StrEnum
from typing import Any

from lclstream_airflow.hooks.lclstream import (
    AsyncTransferClient,
    LCLStreamHook,
    TransferInfo,
    TransferPhase,
    transfer_facts,
)
from lclstream_airflow.hooks.patience import ServiceError
from lclstream_airflow.triggers.polling import PATIENCE_S, OnKill, PollingTrigger, WaitStatus, event


class Until(StrEnum):
    """What is waited for.

    ==========  ==================================================================================
    `ready`     the buffer listens: a consumer that connects now misses nothing
    `flowing`   at least one message has reached the buffer
    `level`     the buffer is as full as was said: its consumers are too slow
    `stalled`   no message has come or gone for as long as was said, though the transfer has not ended
    `drained`   the producers have gone and the buffer holds nothing any more
    `done`      everything was delivered, the transfer's jobs have ended and its ports are free
    ==========  ==================================================================================
    """

    READY = "ready"
    FLOWING = "flowing"
    LEVEL = "level"
    STALLED = "stalled"
    DRAINED = "drained"
    DONE = "done"


def judge(
    info: TransferInfo, until: Until, *, level: float = 1.0, still_s: float = 0.0, stalled_s: float = 60.0
) -> dict[str, Any] | None:
    """Whether a transfer is as wanted, will never be, or (None) has to be looked at again.

    :param level: how full the buffer has to be, as a part of its capacity
    :param still_s: for how long no message has come or gone, in seconds
    :param stalled_s: how long that has to be
    """
    facts = transfer_facts(info)
    phase = info.phase
    if phase.final and phase is not TransferPhase.done:
        why = f": {info.info}" if info.info else ""
        return event(WaitStatus.ENDED, info.id, f"transfer {info.id} is {phase.value}{why}{_last_words(info)}", facts)
    if until is Until.READY:
        reached = phase.pullable or phase is TransferPhase.done
    elif until is Until.FLOWING:
        reached = bool(facts["received_messages"])
        if phase is TransferPhase.done and not reached:
            return event(WaitStatus.ENDED, info.id, f"transfer {info.id} is done, but no message ever came", facts)
    elif until in (Until.LEVEL, Until.STALLED):
        if phase is TransferPhase.done:
            return event(
                WaitStatus.ENDED, info.id, f"transfer {info.id} is done, and was never {_WANTED[until]}", facts
            )
        if until is Until.STALLED:
            reached = phase.pullable and still_s >= stalled_s
        else:
            reached = (full := fullness(info)) is not None and full >= level
        if reached:
            return event(WaitStatus.REACHED, info.id, f"transfer {info.id} is {_WANTED[until]}", facts)
    elif until is Until.DRAINED:
        emptied = phase is TransferPhase.draining and (info.buffer or {}).get("producers") == 0
        reached = phase is TransferPhase.done or (emptied and facts["held_messages"] == 0)
    else:
        reached = phase is TransferPhase.done
    return event(WaitStatus.REACHED, info.id, f"transfer {info.id} is {phase.value}", facts) if reached else None


_WANTED = {Until.LEVEL: "as full as was waited for", Until.STALLED: "stalled"}


def fullness(info: TransferInfo) -> float | None:
    """Which part of its capacity a transfer's buffers hold, from 0 to 1; of several, the fullest; None: not known."""
    parts = []
    for document in info.buffers or [info.buffer]:
        capacity, held = (document or {}).get("capacity_bytes"), ((document or {}).get("held") or {}).get("bytes")
        if capacity and held is not None:
            parts.append(held / capacity)
    return max(parts, default=None)


def _last_words(info: TransferInfo) -> str:
    lines = [f"\n  {entry.client.value} {entry.state.value}: {entry.info}" for entry in info.log[-5:] if entry.info]
    return "".join(lines)


class LCLStreamTransferTrigger(PollingTrigger):
    """Waits for a transfer and keeps its lease.

    :param until: what is waited for, see :class:`Until`
    :param lease_s: each look moves the end of the lease to that many seconds from then; None: the transfer has no
        lease, or somebody else keeps it
    :param level: for ``level``: how full the buffer has to be, as a part of its capacity
    :param stalled_s: for ``stalled``: how long nothing has to move, in seconds
    """

    what = "transfer"

    def __init__(
        self,
        *,
        conn_id: str,
        remote_id: int,
        deadline: float,
        until: str,
        lease_s: float | None,
        level: float = 0.8,
        stalled_s: float = 60.0,
        poll_interval: float = 2.0,
        patience_s: float = PATIENCE_S,
        on_kill_policy: str = OnKill.CANCEL,
    ) -> None:
        super().__init__(
            conn_id=conn_id,
            remote_id=remote_id,
            deadline=deadline,
            poll_interval=poll_interval,
            patience_s=patience_s,
            on_kill_policy=on_kill_policy,
        )
        self.until = Until(until)
        self.lease_s = lease_s
        self.level = level
        self.stalled_s = stalled_s
        self._phase: TransferPhase | None = None
        self._counts: tuple[Any, ...] = ()
        self._moved = time.monotonic()

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PollingTrigger.arguments`."""
        return {
            **super().arguments(),
            "until": self.until.value,
            "lease_s": self.lease_s,
            "level": self.level,
            "stalled_s": self.stalled_s,
        }

    async def connect(self) -> contextlib.AbstractAsyncContextManager[AsyncTransferClient]:
        """A client of the transfer service."""
        return await LCLStreamHook(self.conn_id).get_async_conn()

    async def look(self, client: AsyncTransferClient) -> dict[str, Any] | None:
        """Renew the lease, then judge what the service says."""
        transfer = int(self.remote_id)
        if self.lease_s is not None:
            try:
                await client.renew(transfer, self.lease_s)
            except ServiceError as error:
                if error.status != 409:
                    raise
                # It has ended; how, the next call tells.
        info = await client.info(transfer)
        self._facts = transfer_facts(info)
        if info.phase is not self._phase:
            self._phase = info.phase
            self.log.info("transfer %s is %s: %s", transfer, info.phase.value, info.info)
        counts = (info.phase.pullable, self._facts["received_messages"], self._facts["sent_messages"])
        if counts != self._counts:
            self._counts, self._moved = counts, time.monotonic()
        still_s = time.monotonic() - self._moved
        return judge(info, self.until, level=self.level, still_s=still_s, stalled_s=self.stalled_s)

    async def cancel(self, client: AsyncTransferClient) -> None:
        """Cancel the transfer."""
        await client.cancel(int(self.remote_id))
