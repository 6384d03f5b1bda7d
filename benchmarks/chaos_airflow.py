"""Cancel means cancel: a task is ended in every way there is, and its remote work has to be gone.

Starts Airflow's four parts and all services, then DAG runs whose one task waits for a transfer or for a job that would
never end. For each way a task can end: how many of its processes and ports are left after the lease and some grace,
and the seconds until the last of them was gone.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from airflow_site import TRIGGERER, AirflowSite, airflow_site, wait_for

from lclstream.api.models import TransferPhase
from lclstream.security.errors import PeerError

KINDS = ("transfer", "job")
TASK = "work"
DAGS = Path(__file__).resolve().parent / "dags"
#: Seconds beside the lease in which what is not cancelled has to be gone: services look every second, buffers drain.
GRACE_S = 30.0
#: Seconds a task may take on a busy machine until it waits in the triggerer.
PATIENCE_S = 240.0
_ENDED = ("success", "failed", "skipped", "upstream_failed")


@dataclass
class Row:
    """One task, and how it ends.

    Attributes:
        case: the way it ends.
        kind: ``transfer`` or ``job``.
        dag_id, run_id: its DAG run.
        work: the service's id of its remote work.
        folders: where that work's processes run.
        ended: when the task was ended, in Unix seconds.
        gone: when nothing of its work was left, in Unix seconds.
        by: what ended the work: ``cancel``, or ``lease``.
        wrong: what else went wrong.
    """

    case: str
    kind: str
    dag_id: str
    run_id: str
    work: str = ""
    folders: list[Path] = field(default_factory=list)
    ended: float | None = None
    gone: float | None = None
    by: str | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[str, str, str]:
        """DAG, DAG run and task."""
        return self.dag_id, self.run_id, TASK


class Watch(threading.Thread):
    """Notes when the work of each row is gone: nothing runs, nothing listens, and its service says so, too."""

    def __init__(self, site: AirflowSite) -> None:
        super().__init__(name="watch", daemon=True)
        self._site = site
        self._over = threading.Event()
        self.rows: list[Row] = []

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(30)

    def run(self) -> None:
        """Look until told to stop."""
        while not self._over.wait(0.5):
            present = [row for row in list(self.rows) if row.gone is None]
            running = self._site.processes() if present else []
            for row in present:
                # A service that does not answer says nothing.
                with suppress(PeerError):
                    if not self.left(row, running) and (by := self._ended_by(row)):
                        row.by, row.gone = by, time.time()

    def left(self, row: Row, running: list[str]) -> list[str]:
        """Processes and ports of a row's work."""
        mine = [words for words in running if any(str(folder) in words for folder in row.folders)]
        return mine + [f"port {port}" for port in self._site.open_ports(*row.folders)]

    def _ended_by(self, row: Row) -> str | None:
        """What its service says about its end; None: it has not ended."""
        if row.kind == "transfer":
            transfer = self._site.transfer(int(row.work))
            if not transfer.released:
                return None
            return "lease" if transfer.phase is TransferPhase.expired else "cancel"
        last = self._site.job_history(row.work)[-1]
        if not last.state.is_final:
            return None
        return "lease" if "lease" in last.info else "cancel"


Act = Callable[[AirflowSite, list[Row]], None]


@dataclass(frozen=True)
class Ending:
    """A way to end tasks.

    Attributes:
        case: what it is called.
        variant: which of the DAGs in ``dags/endless_work.py``.
        act: does it to all tasks of its rows, and says when each was ended.
        before: what is done before the DAG runs are made.
        deferred: whether the tasks wait in the triggerer (otherwise: in a worker) when `act` is called.
        triggered: whether their triggers have begun then.
    """

    case: str
    variant: str
    act: Act
    before: Callable[[AirflowSite], None] | None = None
    deferred: bool = True
    triggered: bool = True


def _mark(state: str) -> Act:
    def act(site: AirflowSite, rows: list[Row]) -> None:
        for row in rows:
            site.mark_task(*row.place, state)
            row.ended = time.time()

    return act


def _fail_run(site: AirflowSite, rows: list[Row]) -> None:
    for row in rows:
        site.fail_run(row.dag_id, row.run_id)
        row.ended = time.time()


def _clear(site: AirflowSite, rows: list[Row]) -> None:
    """A cleared task finds its work and waits for it again; then its DAG run is marked failed."""
    for row in rows:
        site.clear_task(*row.place)
    for row in rows:
        wait_for(lambda row=row: site.triggers(*row.place) == 2, PATIENCE_S, f"{row.run_id} waits again")  # type: ignore[misc]
        _expect_the_same_work(site, row)
    _fail_run(site, rows)


def _expect_the_same_work(site: AirflowSite, row: Row) -> None:
    now = _work_of(site, row)
    if now != row.work:
        row.wrong.append(f"{row.kind} {now} was started beside {row.work}")
    if row.gone is not None:
        row.wrong.append(f"{row.kind} {row.work} was ended although its task runs again")


def _await_the_end(site: AirflowSite, rows: list[Row]) -> None:
    """Airflow's own timeouts end them."""
    todo = list(rows)

    def all_ended() -> bool:
        for row in list(todo):
            task = site.task(*row.place)
            if task.get("state") in _ENDED:
                # A task that was skipped with its DAG run has no end of its own.
                run = site.airflow.dag_run(row.dag_id, row.run_id) or {}
                ended = task.get("end_date") or run.get("end_date")
                row.ended = time.time() if ended is None else datetime.fromisoformat(ended).timestamp()
                todo.remove(row)
        return not todo

    wait_for(all_ended, PATIENCE_S, "Airflow's timeouts")


def _process_of(site: AirflowSite, row: Row) -> psutil.Process:
    return psutil.Process(int(site.task(*row.place)["pid"]))


def _kill_worker(site: AirflowSite, rows: list[Row]) -> None:
    """The task's process, and the worker that watches over it, as when a machine is lost."""
    for row in rows:
        process = _process_of(site, row)
        worker = process.parent()
        assert worker is not None
        for victim in (worker, process):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        row.ended = time.time()


def _kill_process_and_retry(site: AirflowSite, rows: list[Row]) -> None:
    """Only the task's process, as when memory is short: Airflow tries the task again, which finds its work."""
    from lclstream_airflow.operators.remote import TAKE_OVER_PAUSE_S

    for row in rows:
        _process_of(site, row).kill()
    for row in rows:
        wait_for(lambda row=row: "looking again" in _log(site, row), PATIENCE_S, f"{row.run_id} runs again")  # type: ignore[misc]
    time.sleep(TAKE_OVER_PAUSE_S + 2)
    for row in rows:
        _expect_the_same_work(site, row)
    _mark("failed")(site, rows)


def _log(site: AirflowSite, row: Row) -> str:
    path = site.airflow.task_log(row.run_id, TASK)
    return "" if path is None else path.read_text(errors="replace")


def _pause_triggerer(site: AirflowSite) -> None:
    site.pause(TRIGGERER)


def _fail_before_the_trigger(site: AirflowSite, rows: list[Row]) -> None:
    """The task waits, but its trigger has not begun: Airflow drops it and tells nobody."""
    _mark("failed")(site, rows)
    site.resume(TRIGGERER)


def _restart_triggerer(site: AirflowSite, rows: list[Row]) -> None:
    """A triggerer that is stopped in order and started again ends nothing: that is everyday maintenance."""
    process = site.children.find(TRIGGERER).process
    process.terminate()
    process.wait(60)
    site.children.kill(TRIGGERER)
    site.airflow.start_part(site.children, TRIGGERER)
    for row in rows:
        wait_for(lambda row=row: site.triggers(*row.place) == 2, PATIENCE_S, f"{row.run_id} waits again")  # type: ignore[misc]
        _expect_the_same_work(site, row)
    _mark("failed")(site, rows)
    # The triggerer is killed next.
    _await_gone(rows, 60)


def _fail_without_triggerer(site: AirflowSite, rows: list[Row]) -> None:
    """The triggerer dies, the tasks are marked failed, another triggerer comes."""
    site.children.kill(TRIGGERER)
    _mark("failed")(site, rows)
    site.airflow.start_part(site.children, TRIGGERER)


def _kill_triggerer(site: AirflowSite, rows: list[Row]) -> None:
    site.children.kill(TRIGGERER)
    for row in rows:
        row.ended = time.time()
    _await_gone(rows, GRACE_S + 60)
    site.airflow.start_part(site.children, TRIGGERER)


def _kill_airflow(site: AirflowSite, rows: list[Row]) -> None:
    site.kill_airflow()
    for row in rows:
        row.ended = time.time()


#: In groups whose tasks wait at the same time; each group begins when all tasks of the one before have ended.
GROUPS: list[list[Ending]] = [
    [
        Ending("task marked failed", "waits", _mark("failed")),
        Ending("task marked success", "waits", _mark("success")),
        Ending("task cleared, then its DAG run marked failed", "waits", _clear),
        Ending("DAG run marked failed", "waits", _fail_run),
    ],
    [
        Ending("timeout of the deferral", "defer_timeout", _await_the_end),
        Ending("dagrun_timeout", "dagrun_timeout", _await_the_end),
        Ending("execution_timeout in a worker", "execution_timeout", _await_the_end, deferred=False),
    ],
    [
        Ending("marked failed in a worker", "works", _mark("failed"), deferred=False),
        Ending("worker killed -9", "works", _kill_worker, deferred=False),
        Ending("task killed -9 and retried, then failed", "works_again", _kill_process_and_retry, deferred=False),
    ],
    [
        Ending("marked failed before its trigger began", "waits", _fail_before_the_trigger, _pause_triggerer,
               triggered=False),
    ],
    [
        Ending("triggerer restarted, then marked failed", "waits", _restart_triggerer),
        Ending("triggerer killed, marked failed, triggerer back", "waits", _fail_without_triggerer),
    ],
    [Ending("triggerer killed for good", "waits", _kill_triggerer)],
    [Ending("Airflow killed for good", "waits", _kill_airflow)],
]  # fmt: skip
#: Cases of the short form.
QUICK = ("task marked failed", "task cleared, then its DAG run marked failed")


def _work_of(site: AirflowSite, row: Row) -> str:
    key = "transfer_id" if row.kind == "transfer" else "job_id"
    found = site.airflow.xcom(row.dag_id, row.run_id, TASK, key)
    return "" if found is None else str(found)


def _ready(site: AirflowSite, ending: Ending, row: Row, running: list[str]) -> bool:
    """Whether the task has come to where it is to be ended, and its work runs."""
    task = site.task(*row.place)
    state = task.get("state")
    if state in _ENDED:
        raise RuntimeError(f"{row.run_id} is {state} too early: {_log(site, row)[-3000:]}")
    row.work = row.work or _work_of(site, row)
    if not row.work or state != ("deferred" if ending.deferred else "running"):
        return False
    if ending.deferred and ending.triggered and not site.triggers(*row.place):
        return False
    row.folders = [site.job_folder(row.work)] if row.kind == "job" else site.transfer_folders(int(row.work))
    if row.kind == "transfer" and not site.open_ports(*row.folders):
        return False
    return bool(row.folders) and all(any(str(folder) in words for words in running) for folder in row.folders)


def _await_gone(rows: Collection[Row], limit_s: float) -> None:
    """Until the work of all rows is gone, or has had so many seconds for it."""

    def settled() -> bool:
        return all(row.gone is not None or time.time() > (row.ended or 0) + limit_s for row in rows)

    wait_for(settled, limit_s + 60, "the end of remote work")


def _end_group(site: AirflowSite, watch: Watch, group: list[Ending], say: Callable[[str], None]) -> None:
    todo: list[tuple[Ending, list[Row]]] = []
    for ending in group:
        if ending.before is not None:
            ending.before(site)
        name = re.sub("[^A-Za-z0-9]+", "_", ending.case)
        rows = [Row(ending.case, kind, f"{ending.variant}_{kind}", f"{name}_{kind}") for kind in KINDS]
        for row in rows:
            site.trigger(row.dag_id, row.run_id)
        todo.append((ending, rows))
    waiting = [(ending, row) for ending, rows in todo for row in rows]

    def all_ready() -> bool:
        running = site.processes()
        for ending, row in list(waiting):
            if _ready(site, ending, row, running):
                watch.rows.append(row)
                waiting.remove((ending, row))
        return not waiting

    try:
        wait_for(all_ready, PATIENCE_S, "tasks wait for their work", every=0.5)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {', '.join(row.run_id for _, row in waiting)}") from None
    for ending, rows in todo:
        say(f"{ending.case}: {', '.join(f'{row.kind} {row.work}' for row in rows)}")
        ending.act(site, rows)


def run(
    *, folder: Path, cases: Collection[str] | None = None, lease_s: float = 30.0, limit_s: float = 45.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """End tasks in all ways, or in some.

    Args:
        folder: where all files go.
        cases: which ways; None: all.
        lease_s: lease of transfers and jobs.
        limit_s: what Airflow's own timeouts allow.
        say: is told the course.

    Returns:
        ``{"rows": [{"case", "left_running", "seconds_to_gone", "by", "wrong"}], "left_running", "lease_s"}``; `by` is
        what ended the work, ``cancel`` or ``lease``; `wrong` says what `left_running` counts: processes, ports, and
        second work where there must be none.
    """
    environment = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        # Tasks that wait in a worker keep it.
        "AIRFLOW__CORE__PARALLELISM": "8",
        "CHAOS_LEASE_S": f"{lease_s:g}",
        "CHAOS_LIMIT_S": f"{limit_s:g}",
    }
    with (
        airflow_site(folder, knows="works_again_job", environment=environment, transfers=24) as site,
        Watch(site) as watch,
    ):
        say(f"everything is up; logs: {site.workspace.logs}")
        for group in GROUPS:
            chosen = [ending for ending in group if cases is None or ending.case in cases]
            if chosen:
                _end_group(site, watch, chosen, say)
        _await_gone(watch.rows, lease_s + GRACE_S)
        running = site.processes()
        left = {id(row): watch.left(row, running) for row in watch.rows}
        cases_in_order = [ending.case for group in GROUPS for ending in group]
        rows = sorted(watch.rows, key=lambda row: (cases_in_order.index(row.case), KINDS.index(row.kind)))
    figures = [_figures(row, left[id(row)]) for row in rows]
    return {"lease_s": lease_s, "left_running": sum(row["left_running"] for row in figures), "rows": figures}


def _figures(row: Row, left: list[str]) -> dict[str, Any]:
    assert row.ended is not None
    wrong = [*row.wrong, *left]
    if row.gone is None and not left:
        wrong.append(f"{row.kind} {row.work} goes on, says its service")
    return {
        "case": f"{row.case}: {row.kind}",
        "left_running": len(wrong),
        "seconds_to_gone": None if row.gone is None else round(max(0.0, row.gone - row.ended), 1),
        "by": row.by,
        "wrong": wrong,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--lease", type=float, default=30.0, help="lease of transfers and jobs in s (default 30)")
    parser.add_argument("--quick", action="store_true", help="only two of the ways a task can end")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there and leave the logs")


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run it as the options say."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    cases = QUICK if arguments.quick else None
    with tempfile.TemporaryDirectory(prefix="lclstream-chaos-") as folder:
        return run(folder=arguments.keep or Path(folder), cases=cases, lease_s=arguments.lease, say=say)
