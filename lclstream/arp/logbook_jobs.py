"""DAG runs shown as jobs in the logbook: an entry for each, its status and counters while it runs, and killing it.

Airflow is what remembers: a DAG run's `conf` names the logbook's job. So nothing is kept here that a crash could lose.

====================  ==============  ======================================
DAG run               job's status
====================  ==============  ======================================
queued                SUBMITTED
running               RUNNING
success               DONE
failed                FAILED          EXITED when it was killed from the logbook
====================  ==============  ======================================
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from lclstream.arp.airflow_rest import AirflowClient, AirflowError, AirflowRefusalError
from lclstream.arp.decisions import SCHEME, DagRun, Scope
from lclstream.arp.names import dag_run_id
from lclstream.config_file import ConfigError
from lclstream.elog.client import ElogClient, ElogError
from lclstream.elog.models import Trigger, WorkflowJob
from lclstream.security.errors import PeerError

log = logging.getLogger("lclstream.arp.jobs")

#: Begin of the note that a DAG run gets when somebody kills its job in the logbook.
KILLED = "Killed from the logbook"
#: The counter we write; all others belong to the DAG.
TASKS = "Airflow tasks"
_STATUS = {"queued": "SUBMITTED", "running": "RUNNING", "success": "DONE", "failed": "FAILED"}
_KILLED_STATUS = "EXITED"
_FINAL = frozenset({"DONE", "FAILED", _KILLED_STATUS})
#: How far a run processor that has just started looks back for DAG runs that ended meanwhile.
LOOK_BACK = timedelta(days=1)
#: Clocks of Airflow's machine and ours may differ by so much.
_OVERLAP = timedelta(seconds=60)
_REMEMBERED = 10_000


@dataclass(frozen=True)
class Report:
    """What the logbook should show of a job; `tasks` is None where Airflow was not asked about them."""

    status: str
    tasks: str | None


def report(dag_run: Mapping[str, Any], task_states: Iterable[str | None] | None) -> Report | None:
    """What a DAG run means for its job; None for a state that we do not know.

    Args:
        dag_run: Airflow's document, with `state` and `note`.
        task_states: the states of its tasks, None for one that has not begun.
    """
    status = _STATUS.get(str(dag_run.get("state")))
    if status is None:
        return None
    if status == "FAILED" and str(dag_run.get("note") or "").startswith(KILLED):
        status = _KILLED_STATUS
    if task_states is None:
        return Report(status, None)
    counts = Counter("waiting" if state is None else state for state in task_states)
    done = counts.pop("success", 0)
    others = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in sorted(counts.items()))
    return Report(status, f"{done} of {done + counts.total()} done" + (f", {others}" if others else ""))


class JobEntries:
    """Finds or makes the logbook's job for a DAG run that a trigger asks for. Consumer's thread only.

    Args:
        elog: the logbook's client.
        logins: our own login and those of the others in our group, whose jobs these are.
    """

    def __init__(self, elog: ElogClient, logins: Collection[str]) -> None:
        self._elog = elog
        self._logins = logins

    def entry_for(self, dag_run: DagRun) -> tuple[str | None, bool]:
        """The job's id, and whether it was made now. Without a logbook there is none: showing must not stop a run."""
        def_id = dag_run.definition.id
        if dag_run.job_id is not None or def_id is None:
            return dag_run.job_id, False
        try:
            for job in self._elog.workflow_jobs(dag_run.experiment):
                if (job.run_num, job.def_id) == (dag_run.run, def_id) and job.user in self._logins:
                    return job.id, False
            made = self._elog.create_workflow_job(dag_run.experiment, dag_run.definition.name, dag_run.run)
            return made.id, True
        except PeerError as error:
            log.warning("%s: the logbook shows no job for it: %s", dag_run.dag_run_id, error)
            return None, False

    def withdraw(self, dag_run: DagRun, job_id: str) -> None:
        """Remove a job that was made for a DAG run which another run processor had made already."""
        try:
            self._elog.delete_workflow_job(dag_run.experiment, job_id)
        except PeerError as error:
            log.warning(
                "job %s of %s belongs to no DAG run and could not be removed: %s", job_id, dag_run.experiment, error
            )


class Follower:
    """Shows in the logbook how DAG runs go. One thread calls :meth:`follow` again and again.

    Args:
        airflow, elog: clients of its own.
        scope: whose DAG runs are followed.
        clock: the time, aware.
    """

    def __init__(
        self,
        airflow: AirflowClient,
        elog: ElogClient,
        scope: Scope,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._airflow = airflow
        self._elog = elog
        self._scope = scope
        self._clock = clock
        self._since = clock() - LOOK_BACK
        self._shown: OrderedDict[str, Report] = OrderedDict()
        self._experiments: set[str] = set()

    def follow(self) -> int:
        """Bring the logbook up to date; how many jobs were changed there.

        Raises:
            AirflowError: Airflow could not be asked; the next call begins where this one did.
            PeerError: the logbook could not be told; likewise.
        """
        began = self._clock()
        changed = 0
        for dag_run in self._airflow.changed_dag_runs(self._since):
            conf = dag_run.get("conf") or {}
            if conf.get("job_id") and conf.get("location") == self._scope.location and conf.get("experiment"):
                changed += self._show(dag_run, str(conf["experiment"]), str(conf["job_id"]))
        self._since = began - _OVERLAP
        return changed

    def _learn(self, experiment: str) -> None:
        """What the logbook shows already, so that a restart does not tell everything again."""
        if experiment in self._experiments:
            return
        for job in self._elog.workflow_jobs(experiment):
            self._remember(job.id, Report(job.status, _tasks_shown(job)))
        self._experiments.add(experiment)

    def _remember(self, job_id: str, shown: Report) -> None:
        self._shown[job_id] = shown
        self._shown.move_to_end(job_id)
        if len(self._shown) > _REMEMBERED:
            self._shown.popitem(last=False)

    def _show(self, dag_run: Mapping[str, Any], experiment: str, job_id: str) -> int:
        self._learn(experiment)
        known = self._shown.get(job_id)
        preliminary = report(dag_run, None)
        if preliminary is None:
            return 0
        if known is not None and known.status in _FINAL and known.status == preliminary.status:
            return 0
        dag_id, run_id = str(dag_run["dag_id"]), str(dag_run["dag_run_id"])
        wanted = report(dag_run, self._airflow.task_states(dag_id, run_id))
        if wanted is None or wanted == known:
            return 0
        try:
            job = self._elog.update_workflow_job(
                experiment,
                job_id,
                status=wanted.status,
                tool_id=run_id,
                log_file_path=self._airflow.page(dag_id, run_id),
            )
            # The DAG writes counters as well: the answer has them as they are now, and they stay.
            others = [counter.document() for counter in job.counters if counter.key != TASKS]
            if _tasks_shown(job) != wanted.tasks:
                counters = [{"key": TASKS, "value": wanted.tasks}, *others]
                self._elog.update_workflow_job(experiment, job_id, counters=counters)
        except ElogError as error:
            if not error.errormsg:
                raise
            log.warning("job %s of %s can no longer be shown: %s", job_id, experiment, error.errormsg)
        self._remember(job_id, wanted)
        return 1


def _tasks_shown(job: WorkflowJob) -> str | None:
    return next((str(counter.value) for counter in job.counters if counter.key == TASKS), None)


def keep_following(follower: Follower, *, leads: Callable[[], bool], stop: threading.Event, every_s: float) -> None:
    """Follow until `stop` is set; runs in a thread of its own, which owns the follower's clients.

    Args:
        follower: does the work.
        leads: whether it is for us: of several run processors in a group one follows.
        stop: ends it.
        every_s: seconds between two looks.
    """
    trouble: str | None = None
    while not stop.wait(every_s):
        if not leads():
            continue
        try:
            follower.follow()
        except (AirflowError, ConfigError, PeerError) as error:
            # Said once, not at every look.
            if str(error) != trouble:
                log.warning("the logbook's jobs are not up to date: %s", error)
            trouble = str(error)
        except Exception:
            log.exception("the logbook's jobs are not up to date: an error in the run processor itself")
        else:
            if trouble is not None:
                log.info("the logbook's jobs are up to date again")
            trouble = None


class KillError(Exception):
    """The job was not killed; the message says why."""


def kill(airflow: AirflowClient, scope: Scope, experiment: str, job: WorkflowJob, by: str) -> dict[str, Any]:
    """End the DAG run of a logbook's job; its tasks stop and cancel what they started elsewhere.

    Args:
        airflow: Airflow's client.
        scope: whose jobs may be killed here.
        experiment: the job's experiment.
        job: the job, with its definition.
        by: who asked, for the DAG run's note.

    Returns:
        The job as the logbook should show it.

    Raises:
        KillError: it is none of ours, has no DAG run, or Airflow did not do it.
    """
    definition = job.definition
    if definition is None or not definition.executable.startswith(SCHEME) or definition.location != scope.location:
        raise KillError(f"job {job.id} is no Airflow DAG at {scope.location}")
    dag_id = definition.executable.removeprefix(SCHEME)
    ours = job.user in scope.logins
    try:
        trigger = Trigger(definition.trigger) if ours else Trigger.MANUAL
    except ValueError as error:
        raise KillError(f"job {job.id}: {error}") from error
    name = dag_run_id(experiment, job.run_num, trigger, definition.name, job_id=None if ours else job.id)
    try:
        state = airflow.dag_run(dag_id, name)["state"]
        if state in ("success", "failed"):
            return job.document() | {"status": _STATUS[state]}
        airflow.fail_dag_run(dag_id, name, note=f"{KILLED} by {by}")
    except AirflowRefusalError as error:
        raise KillError(f"job {job.id}: {error}") from error
    except (AirflowError, ConfigError) as error:
        raise KillError(f"Airflow could not be asked to end {name}: {error}") from error
    log.info("%s ended: killed from the logbook by %s", name, by)
    return job.document() | {"status": _KILLED_STATUS}
