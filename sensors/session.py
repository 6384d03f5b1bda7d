"""Wait for the end of a session, and keep its nodes until then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lclstream_airflow.hooks.elog import ElogHook
from lclstream_airflow.hooks.patience import PeerError, insist
from lclstream_airflow.hooks.psik import PsikHook
from lclstream_airflow.links import JobLink
from lclstream_airflow.sensors.polling import PollingSensor
from lclstream_airflow.triggers.polling import KILL_PATIENCE_S, OnKill
from lclstream_airflow.triggers.session import SessionEndTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

_JOB_LINK = JobLink()
_EMPTY = (None, "", "None")


class SessionEndSensor(PollingSensor):
    """Waits until a session is to end, and keeps its job's lease meanwhile.

    It ends by time, by an entry with a tag in the logbook, or because its job has ended. To end it by hand, mark this
    task as success. Returns the job's facts and ``ended_by``: ``time``, ``the logbook`` or ``its job``.

    :param job_id: the session's job
    :param hours: how long it lasts from this task's begin; None or empty: until something else ends it
    :param ends_at: when it ends, an ISO 8601 time; the earlier of both counts
    :param experiment: whose logbook is read
    :param tag: an entry with this tag ends it; empty: none does. While the logbook is away the session goes on
    :param lease_s: each look moves the end of the job's lease to that many seconds from then
    :param on_kill_policy: ``"leave"`` (default): a later task ends the job; ``"cancel"``: a kill cancels it. Marking
        the task as success is a kill, too
    :param psik_conn_id: connection of type `psik`
    :param elog_conn_id: connection of type `elog`

    Further arguments: see :class:`.PollingSensor`.
    """

    template_fields: Sequence[str] = (
        "job_id",
        "hours",
        "ends_at",
        "experiment",
        "tag",
        "lease_s",
        "psik_conn_id",
        "elog_conn_id",
    )
    operator_extra_links = (_JOB_LINK,)
    ui_color = "#e3f2d9"

    def __init__(
        self,
        *,
        job_id: str,
        hours: float | str | None = None,
        ends_at: str | None = None,
        experiment: str = "",
        tag: str = "",
        lease_s: float | str = 300.0,
        on_kill_policy: OnKill | str = OnKill.LEAVE,
        psik_conn_id: str = PsikHook.default_conn_name,
        elog_conn_id: str = ElogHook.default_conn_name,
        timeout: float = 7 * 24 * 3600.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        self.job_id = job_id
        self.hours = hours
        self.ends_at = ends_at
        self.experiment = experiment
        self.tag = tag
        self.lease_s = lease_s
        self.on_kill_policy = OnKill(on_kill_policy)
        self.psik_conn_id = psik_conn_id
        self.elog_conn_id = elog_conn_id
        self._since = time.time()

    def record_link(self, context: Context) -> None:
        """See :meth:`PollingSensor.record_link`."""
        if self.job_id in _EMPTY:
            raise ValueError("job_id is empty: it says which session to keep")
        if self.tag and not self.experiment:
            raise ValueError("experiment is empty: it says in whose logbook the tag is looked for")
        if self.tag:
            # While it waits no problem of the logbook ends the session: a wrong connection must show now.
            ElogHook(self.elog_conn_id).endpoint()
        # A try that begins anew must not forget the entries since the session's begin.
        started = getattr(context.get("dag_run"), "start_date", None)
        self._since = started.timestamp() if started is not None else time.time()
        _JOB_LINK.record(context, PsikHook(self.psik_conn_id).job_url(self.job_id))

    def trigger(self, deadline: float) -> SessionEndTrigger:
        """See :meth:`PollingSensor.trigger`."""
        return SessionEndTrigger(
            conn_id=self.psik_conn_id,
            remote_id=self.job_id,
            deadline=deadline,
            ends_at=self._ends_at(),
            elog_conn_id=self.elog_conn_id,
            experiment=self.experiment,
            tag=self.tag,
            since=self._since,
            lease_s=float(self.lease_s),
            poll_interval=self.poke_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
        )

    def on_kill(self) -> None:
        """The worker is being killed, or the time is over: cancel the job, when that is wanted."""
        if self.on_kill_policy is OnKill.LEAVE:
            return

        def cancel() -> None:
            with PsikHook(self.psik_conn_id).get_conn() as client:
                client.cancel(self.job_id)

        try:
            insist(cancel, limit_s=KILL_PATIENCE_S)
        except (PeerError, ValueError) as error:
            self.log.error("job %s could not be cancelled: %s", self.job_id, error)

    def _ends_at(self) -> float | None:
        times = []
        if self.hours not in _EMPTY:
            times.append(self._since + 3600 * float(self.hours or 0))
        if self.ends_at not in _EMPTY:
            try:
                given = datetime.fromisoformat(str(self.ends_at))
            except ValueError as error:
                raise ValueError(f"ends_at is {self.ends_at!r}: write a time such as 2026-03-01T18:00-08:00") from error
            times.append((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp())
        return min(times, default=None)
