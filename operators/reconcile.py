"""Find transfers and jobs whose task is gone, and end them.

Everything our operators start carries tags: which Airflow, DAG, run and task it belongs to, and whether a kill of the
task ends it. What Airflow says about those decides:

================================  ==========================  =========================================================
DAG run                           task                        verdict
================================  ==========================  =========================================================
queued or running                 succeeded                   *wanted* when it lasts until the DAG run's end, as a
                                                              stream that others pull; otherwise an *orphan*
queued or running                 failed, skipped, removed,   *orphan*
                                  not there
queued or running                 anything else               *wanted*
ended, or not there (deleted)                                 *orphan*
any                               any, with on_kill="leave"   *left*: somebody wanted it to outlive its task
================================  ==========================  =========================================================

Work that is being cancelled a moment after its task was killed looks like an orphan: only what is one in two looks,
some time apart, is ended. When Airflow cannot be asked, nothing is known, and nothing is ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException

from lclstream_airflow.hooks.lclstream import LCLStreamHook
from lclstream_airflow.hooks.patience import PeerError, insist
from lclstream_airflow.hooks.psik import PsikHook
from lclstream_airflow.hooks.verdict import task_error
from lclstream_airflow.operators.remote import START_PATIENCE_S, installation
from lclstream_airflow.triggers.polling import OnKill

if TYPE_CHECKING:
    from airflow.sdk import Context

#: States in which a task wants nothing any more.
_TASK_OVER = frozenset({"failed", "skipped", "upstream_failed", "removed"})
_LIVE_RUN = ("queued", "running")
_ENDED = "ended"


class Verdict(StrEnum):
    """What is to be done about a transfer or job."""

    WANTED = "wanted"
    LEFT = "left"
    ORPHAN = "orphan"


class Kind(StrEnum):
    """What a piece of remote work is."""

    TRANSFER = "transfer"
    JOB = "job"


@dataclass(frozen=True)
class Work:
    """A transfer or job that has not ended, with the tags our operators put on it.

    :param conn_id: connection of the service that runs it
    """

    kind: Kind
    conn_id: str
    id: str
    tags: Mapping[str, str] = field(compare=False)

    @property
    def owner(self) -> str:
        """The task it belongs to, for people."""
        index = f"[{self.tags['map_index']}]" if "map_index" in self.tags else ""
        return f"{self.tags.get('dag_id')} / {self.tags.get('run_id')} / {self.tags.get('task_id')}{index}"


def verdict(lasts: str, policy: str, run_is_live: bool, task_state: str | None, task_is_there: bool) -> Verdict:
    """See the table in the module's text.

    :param lasts: the tag ``lasts``: ``run`` for what outlives its task
    :param policy: the tag ``on_kill``
    :param run_is_live: whether its DAG run is queued or running
    :param task_state: its task's state; None: it has not begun
    :param task_is_there: whether the DAG run has such a task
    """
    if policy == OnKill.LEAVE:
        return Verdict.LEFT
    if not run_is_live or not task_is_there or task_state in _TASK_OVER:
        return Verdict.ORPHAN
    if task_state == "success" and lasts != "run":
        return Verdict.ORPHAN
    return Verdict.WANTED


class ReconcileOperator(BaseOperator):
    """Ends the transfers and jobs whose task or DAG run is gone or over, and says which they were.

    Looks only at what carries the tags of this Airflow (its ``[api] base_url``), in the name of the connections'
    certificates. The published psik-api keeps no tags: of its jobs nothing is known.

    Returns ``{"checked", "wanted", "left", "orphans": [{"kind", "id", "connection", "owner", "ended"}]}``; in XCom also
    ``ended``, the number of those ended, and ``report``, the table as text, empty when there was nothing to end. Fails
    when an orphan could not be ended or a service could not be asked, after all others were looked at.

    :param lclstream_conn_ids: connections of transfer services, as a list or separated by commas
    :param psik_conn_ids: connections of job services, likewise
    :param report_only: say what would be ended, and end nothing
    :param second_look_s: pause before the second look, in seconds
    """

    template_fields: Sequence[str] = ("lclstream_conn_ids", "psik_conn_ids", "report_only")
    ui_color = "#f6dcd8"

    def __init__(
        self,
        *,
        lclstream_conn_ids: Sequence[str] | str = (LCLStreamHook.default_conn_name,),
        psik_conn_ids: Sequence[str] | str = (PsikHook.default_conn_name,),
        report_only: bool | str = False,
        second_look_s: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.lclstream_conn_ids = lclstream_conn_ids
        self.psik_conn_ids = psik_conn_ids
        self.report_only = report_only
        self.second_look_s = second_look_s

    def execute(self, context: Context) -> dict[str, Any]:
        """Look, look again, end, report.

        Raises:
            AirflowFailException: an argument or connection is wrong.
            AirflowException: something could not be asked or ended.
        """
        ti = context["ti"]
        tags = {"airflow": installation()}
        try:
            work, away = self._under_way(tags)
            verdicts = {one: self._judge(ti, one) for one in work}
            orphans = [one for one, said in verdicts.items() if said is Verdict.ORPHAN]
            if orphans:
                self.log.info("%d look like orphans; looking again in %g s", len(orphans), self.second_look_s)
                time.sleep(self.second_look_s)
                still, away_now = self._under_way(tags)
                away = sorted({*away, *away_now})
                orphans = [one for one in still if one in orphans and self._judge(ti, one) is Verdict.ORPHAN]
        except ValueError as error:
            raise task_error(error) from error
        done = {one: self._end(one) for one in orphans}
        report = _table(done) if done else ""
        self.log.info("%s", report or f"No orphans among {len(work)} transfers and jobs under way")
        ti.xcom_push(key="ended", value=sum(how == _ENDED for how in done.values()))
        ti.xcom_push(key="report", value=report)
        failed = [one.id for one, how in done.items() if how != _ENDED and not self._only_reports()]
        if away or failed:
            raise AirflowException(
                f"connections that could not be asked: {', '.join(away) or 'none'}; orphans that could not be ended: "
                f"{', '.join(failed) or 'none'}; the log above says why"
            )
        counts = Counter(verdicts.values())
        return {
            "checked": len(work),
            "wanted": counts[Verdict.WANTED],
            "left": counts[Verdict.LEFT],
            "orphans": [
                {
                    "kind": one.kind.value,
                    "id": one.id,
                    "connection": one.conn_id,
                    "owner": one.owner,
                    "ended": how == _ENDED,
                }
                for one, how in done.items()
            ],
        }

    def _only_reports(self) -> bool:
        return self.report_only is True or str(self.report_only).strip().lower() in ("true", "1", "yes")

    def _under_way(self, tags: Mapping[str, str]) -> tuple[list[Work], list[str]]:
        """What is under way, and the connections that could not be asked."""
        found: list[Work] = []
        unreachable = []
        for kind, conn_id in self._places():
            try:
                listed = insist(partial(_list, kind, conn_id, tags), limit_s=START_PATIENCE_S)
            except PeerError as error:
                self.log.error("%s: nothing is known about its %ss: %s", conn_id, kind.value, error)
                unreachable.append(conn_id)
                continue
            found += [work for work in listed if "dag_id" in work.tags]
        return found, unreachable

    def _places(self) -> Iterator[tuple[Kind, str]]:
        for kind, conn_ids in ((Kind.TRANSFER, self.lclstream_conn_ids), (Kind.JOB, self.psik_conn_ids)):
            names = conn_ids.split(",") if isinstance(conn_ids, str) else conn_ids
            yield from ((kind, name.strip()) for name in names if name.strip())

    @staticmethod
    def _judge(ti: Any, work: Work) -> Verdict:
        dag_id, run_id = work.tags["dag_id"], work.tags.get("run_id", "")
        task_id, index = work.tags.get("task_id", ""), work.tags.get("map_index")
        states = ti.get_task_states(dag_id, task_ids=[task_id], run_ids=[run_id]).get(run_id) or {}
        task = task_id if index is None else f"{task_id}_{index}"
        return verdict(
            work.tags.get("lasts", ""),
            policy=work.tags.get("on_kill", ""),
            run_is_live=ti.get_dr_count(dag_id, run_ids=[run_id], states=list(_LIVE_RUN)) > 0,
            task_state=states.get(task),
            task_is_there=task in states,
        )

    def _end(self, work: Work) -> str:
        """What became of it, in words."""
        if self._only_reports():
            return "not ended: only a report was wanted"
        try:
            insist(partial(_cancel, work), limit_s=START_PATIENCE_S)
        except (PeerError, ValueError) as error:
            self.log.error("%s %s could not be ended: %s", work.kind.value, work.id, error)
            return "could not be ended"
        return _ENDED


def _list(kind: Kind, conn_id: str, tags: Mapping[str, str]) -> list[Work]:
    if kind is Kind.TRANSFER:
        transfers = LCLStreamHook(conn_id).under_way(tags)
        return [Work(kind, conn_id, str(one.id), one.tags) for one in transfers]
    return [Work(kind, conn_id, one.jobid, one.tags) for one in PsikHook(conn_id).under_way(tags)]


def _cancel(work: Work) -> None:
    if work.kind is Kind.TRANSFER:
        with LCLStreamHook(work.conn_id).get_conn() as transfers:
            transfers.cancel(int(work.id))
    else:
        with PsikHook(work.conn_id).get_conn() as jobs:
            jobs.cancel(work.id)


def _table(ended: Mapping[Work, str]) -> str:
    head = ("what", "connection", "whose", "what was done")
    rows = [(f"{work.kind.value} {work.id}", work.conn_id, work.owner, done) for work, done in ended.items()]
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
