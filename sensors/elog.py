"""Wait for what the logbook says about a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lclstream_airflow.hooks.elog import ElogHook
from lclstream_airflow.links import RunLink
from lclstream_airflow.sensors.polling import PollingSensor
from lclstream_airflow.triggers.elog import ElogFilesTrigger, ElogRunClosedTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

_RUN_LINK = RunLink()


class _RunSensor(PollingSensor):
    """Waits for something about one run of an experiment."""

    template_fields: Sequence[str] = ("experiment", "run", "elog_conn_id")
    operator_extra_links = (_RUN_LINK,)
    ui_color = "#f6efd8"

    def __init__(
        self,
        *,
        experiment: str,
        run: int | str,
        elog_conn_id: str = ElogHook.default_conn_name,
        poke_interval: Any = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, **kwargs)
        self.experiment = experiment
        self.run = run
        self.elog_conn_id = elog_conn_id

    def record_link(self, context: Context) -> None:
        """See :meth:`PollingSensor.record_link`."""
        for name, value in {"experiment": self.experiment, "run": self.run}.items():
            if value in (None, "", "None"):
                raise ValueError(f"{name} is empty: it says which run to wait for")
        _RUN_LINK.record(context, ElogHook(self.elog_conn_id).run_url(self.experiment, self.run))


class RunClosedSensor(_RunSensor):
    """Waits until a run has ended.

    Returns ``{"experiment", "run", "type", "begin_time", "end_time", "duration_s"}``. Fails for good when the logbook
    knows no such run.

    :param experiment: the experiment's name
    :param run: the run's number
    :param elog_conn_id: connection of type `elog`

    Further arguments: see :class:`.PollingSensor`; `poke_interval` is 10 s here.
    """

    def trigger(self, deadline: float) -> ElogRunClosedTrigger:
        """See :meth:`PollingSensor.trigger`."""
        return ElogRunClosedTrigger(
            conn_id=self.elog_conn_id,
            experiment=self.experiment,
            run=self.run,
            deadline=deadline,
            poll_interval=self.poke_interval,
            patience_s=self.patience_s,
        )


class FilesAtLocationSensor(_RunSensor):
    """Waits until a run has ended and its registered files are at a location.

    Returns what :class:`RunClosedSensor` does, and ``location``, ``files`` (their number), ``bytes`` and ``paths`` (the
    first 500).

    :param experiment: the experiment's name
    :param run: the run's number
    :param location: the logbook's name of the place, such as ``SLAC``; empty: wherever they are
    :param pattern: which files count, such as ``*.xtc2``
    :param least: how many there must be at least; a run whose files are not registered yet has none
    :param elog_conn_id: connection of type `elog`

    Further arguments: see :class:`.PollingSensor`; `poke_interval` is 10 s here.
    """

    template_fields: Sequence[str] = (*_RunSensor.template_fields, "location", "pattern", "least")

    def __init__(self, *, location: str, pattern: str = "*", least: int | str = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.location = location
        self.pattern = pattern
        self.least = least

    def trigger(self, deadline: float) -> ElogFilesTrigger:
        """See :meth:`PollingSensor.trigger`."""
        return ElogFilesTrigger(
            conn_id=self.elog_conn_id,
            experiment=self.experiment,
            run=self.run,
            location=self.location,
            pattern=self.pattern,
            least=int(self.least),
            deadline=deadline,
            poll_interval=self.poke_interval,
            patience_s=self.patience_s,
        )
