"""Keeps a bounded number of DAG runs under way until all have ended.

One thread owns everything here. What was done is known to Airflow only: a backfill that was stopped, or killed, leaves
its DAG runs to Airflow, and the next one finds them by their ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from lclstream.arp.airflow_rest import AirflowClient, AirflowRefusalError, AirflowUnavailableError
from lclstream.backfill.runs import Reprocess, RunsError, Step, backfill_run_id, step
from lclstream.elog.models import RunNumber

Answer = TypeVar("Answer")

ENDED = ("success", "failed")
_NOT_FOUND = 404


class BackfillAirflow(AirflowClient):
    """Airflow's REST interface with the one call more that a backfill needs."""

    def found(self, dag_id: str, dag_run_id: str) -> dict[str, Any] | None:
        """A DAG run as Airflow knows it; None when there is none.

        Raises:
            AirflowError: Airflow could not be asked, or refuses.
        """
        try:
            return self.dag_run(dag_id, dag_run_id)
        except AirflowRefusalError as error:
            if error.status != _NOT_FOUND:
                raise
            return None

    def clear(self, dag_id: str, dag_run_id: str) -> None:
        """Run all tasks of a DAG run again.

        Raises:
            AirflowError: Airflow could not be asked, or refuses.
        """
        path = f"/api/v2/dags/{quote(dag_id, safe='')}/dagRuns/{quote(dag_run_id, safe='')}/clear"
        response = self._call("POST", path, json={"dry_run": False, "only_failed": False})
        if not response.is_success:
            raise self._refusal(response, f"to run {dag_run_id} of {dag_id} again")


@dataclass
class Progress:
    """One run's part of the backfill.

    Attributes:
        run: its number.
        dag_run_id: its DAG run.
        step: what was or will be done.
        state: the DAG run's state as last seen; None: there is none.
    """

    run: RunNumber
    dag_run_id: str
    step: Step
    state: str | None

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do about it."""
        return self.step is Step.SKIP or (self.step is Step.FOLLOW and self.state in ENDED)


class Backfill:
    """A list of runs, and how far each is.

    Args:
        airflow: Airflow.
        dag_id: the DAG.
        experiment: the experiment.
        name: tells several backfills of the same runs apart; part of the DAG runs' ids.
        parameters: what the DAG gets as ``conf["parameters"]``; None: nothing, and one that is there keeps its own.
        location: data centre where the runs' files are; None: what the DAG has by itself.
        patience_s: how long Airflow may be away, in seconds.
        sleep: for tests.
    """

    def __init__(
        self,
        airflow: BackfillAirflow,
        *,
        dag_id: str,
        experiment: str,
        name: str,
        parameters: dict[str, Any] | None,
        location: str | None = None,
        patience_s: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._airflow = airflow
        self._dag_id = dag_id
        self._experiment = experiment
        self._name = name
        self._given: dict[str, Any] = {} if parameters is None else {"parameters": parameters}
        if location is not None:
            self._given["location"] = location
        self._patience_s = patience_s
        self._sleep = sleep

    def plan(self, runs: Iterable[RunNumber], reprocess: Reprocess) -> list[Progress]:
        """What has to be done about each run. Asks Airflow, changes nothing.

        Raises:
            AirflowError: Airflow could not be asked.
            RunsError: a DAG run's id would be too long, or one that is to run again has other parameters or another
                location, which would stay.
        """
        planned = []
        for run in runs:
            made = backfill_run_id(self._experiment, run, self._name)
            found = self._insist(partial(self._airflow.found, self._dag_id, made))
            state = None if found is None else str(found["state"])
            planned.append(Progress(run, made, step(state, reprocess), state))
            if found is not None and planned[-1].step is Step.CLEAR:
                self._check_same(made, found.get("conf") or {})
        return planned

    def _check_same(self, dag_run_id: str, conf: dict[str, Any]) -> None:
        for key, value in self._given.items():
            # As Airflow has it: JSON knows only text as a key.
            if conf.get(key) != json.loads(json.dumps(value)):
                raise RunsError(
                    f"--{key}: DAG run {dag_run_id} was made with another value, which running it again "
                    f"does not change: leave out --{key}, or choose another --name for new DAG runs"
                )

    def work(
        self, planned: list[Progress], *, max_active: int, poll_s: float, show: Callable[[list[Progress]], None]
    ) -> None:
        """Start what is to be started, never more than `max_active` at a time, and wait until all have ended.

        Args:
            planned: from :meth:`plan`; updated in place.
            max_active: DAG runs under way at a time, those found under way included.
            poll_s: seconds between two looks.
            show: called after every look.

        Raises:
            AirflowError: Airflow was away for too long, or refuses a DAG run.
        """
        while True:
            active = [entry for entry in planned if entry.step is Step.FOLLOW and not entry.ended]
            for entry in active:
                found = self._insist(partial(self._airflow.found, self._dag_id, entry.dag_run_id))
                entry.state = None if found is None else str(found["state"])
                if found is None:
                    # Somebody has deleted it: that is an end, too.
                    entry.step = Step.SKIP
            room = max_active - sum(entry.step is Step.FOLLOW and not entry.ended for entry in planned)
            for entry in [entry for entry in planned if entry.step in (Step.CREATE, Step.CLEAR)][: max(0, room)]:
                self._insist(partial(self._begin, entry))
                entry.step, entry.state = Step.FOLLOW, "queued"
            show(planned)
            if all(entry.ended for entry in planned):
                return
            self._sleep(poll_s)

    def _begin(self, entry: Progress) -> None:
        if entry.step is Step.CLEAR:
            self._airflow.clear(self._dag_id, entry.dag_run_id)
            return
        conf = {
            "experiment": self._experiment,
            "run": entry.run,
            "trigger": "BACKFILL",
            "definition": self._name,
            "parameters": {},
            **self._given,
        }
        # False: an earlier request made it whose answer was lost.
        self._airflow.create_dag_run(self._dag_id, entry.dag_run_id, conf)

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        deadline, pause = time.monotonic() + self._patience_s, 0.5
        while True:
            try:
                return call()
            except AirflowUnavailableError:
                if time.monotonic() + pause > deadline:
                    raise
            self._sleep(pause)
            pause = min(pause * 2, 15.0)
