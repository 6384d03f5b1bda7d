"""An event from message to DAG runs: reads it, asks the logbook where it must, decides, and tells Airflow.

No Kafka here: a message comes in, an :class:`Outcome` goes out, or :class:`RetryError` says that it must come again.
Doing the same message twice does the same thing once, because Airflow refuses an id it has.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from lclstream.arp.airflow_rest import AirflowClient, AirflowRefusalError, AirflowUnavailableError
from lclstream.arp.decisions import Catalogue, DagRun, Decision, Scope, decide, needs_catalogue, ours, precheck
from lclstream.arp.definitions import DefinitionSource
from lclstream.arp.events import Crud, Event, Irrelevant, JobEvent, RunEvent, UnreadableError, read
from lclstream.arp.logbook_jobs import JobEntries
from lclstream.config_file import ConfigError
from lclstream.elog.client import ElogClient, ElogError
from lclstream.security.errors import PeerError, ServiceError

log = logging.getLogger("lclstream.arp")

_OWN_FAILURE = 500
_REMEMBERED = 10_000
# A service in front of the logbook that has no valid session, or too much to do, says so with these.
_PASSING_STATUSES = (401, 403, 408, 429)


class Kind(StrEnum):
    """What became of an event."""

    MADE = "made"
    EXISTED = "existed"
    NOT_FOR_US = "not_for_us"
    DEAD_LETTER = "dead_letter"


class RetryError(Exception):
    """The event cannot be decided or done now; it must come again.

    Attributes:
        suspicious: the event itself may be the reason (Airflow failed on it).
    """

    def __init__(self, reason: str, *, suspicious: bool = False) -> None:
        super().__init__(reason)
        self.suspicious = suspicious


@dataclass
class Outcome:
    """What became of an event.

    Attributes:
        subject: experiment and run, for the log.
        made, existed: ids of DAG runs made now, and found.
        rejected: why something was not done that should have been; each goes to the dead-letter topic.
        not_for_us: why there was nothing to do.
    """

    subject: str = "?"
    made: list[str] = field(default_factory=list)
    existed: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    not_for_us: str | None = None

    @property
    def kind(self) -> Kind:
        """The outcome in one word; the gravest where there are several."""
        if self.rejected:
            return Kind.DEAD_LETTER
        if self.made:
            return Kind.MADE
        return Kind.EXISTED if self.existed else Kind.NOT_FOR_US

    def __str__(self) -> str:
        parts = [f"made {name}" for name in self.made] + [f"{name} was there" for name in self.existed]
        parts += [f"dead letter: {reason}" for reason in self.rejected]
        if self.not_for_us is not None:
            parts.append(f"not for us: {self.not_for_us}")
        return f"{self.subject}: {'; '.join(parts)}"


class Actions:
    """What the run processor does with a message. Used by the consumer's thread only.

    Args:
        scope: what we are for.
        definitions: where workflow definitions come from.
        airflow: Airflow's client.
        elog: the logbook's client; None when there is none.
        jobs: makes the logbook's job for a DAG run; None when DAG runs are not shown there.
    """

    def __init__(
        self,
        scope: Scope,
        definitions: DefinitionSource,
        airflow: AirflowClient,
        elog: ElogClient | None,
        jobs: JobEntries | None = None,
    ) -> None:
        self._scope = scope
        self._definitions = definitions
        self._airflow = airflow
        self._elog = elog
        self._jobs = jobs
        self._known: OrderedDict[str, None] = OrderedDict()

    def handle(self, topic: str, payload: bytes | None, sent: datetime | None = None) -> Outcome:
        """Do what a message asks for; `sent` is the message's own time, None where the broker keeps none.

        Raises:
            RetryError: the logbook or Airflow cannot be asked now.
        """
        try:
            event = read(topic, payload, sent)
        except UnreadableError as error:
            return Outcome(rejected=[str(error)])
        if isinstance(event, Irrelevant):
            return Outcome(subject=event.experiment, not_for_us=event.reason)
        outcome = Outcome(subject=f"{event.experiment} run {event.number}")
        refused = precheck(event, self._scope)
        if refused is not None:
            outcome.not_for_us = refused.reason
            return outcome
        try:
            decision = self._decide(event)
        except PeerError as error:
            if _is_final(error):
                outcome.rejected.append(f"the logbook refuses: {error}")
                return outcome
            raise RetryError(f"the logbook cannot be asked: {error}") from error
        if decision.not_for_us is not None:
            outcome.not_for_us = decision.not_for_us.reason
        outcome.rejected += [f"workflow {entry.definition!r}: {entry.reason}" for entry in decision.invalid]
        for dag_run in decision.dag_runs:
            self._make(dag_run, outcome)
        return outcome

    def _decide(self, event: Event) -> Decision:
        if isinstance(event, JobEvent):
            definitions = []
        else:
            # A definition written a moment before the run starts must count; updates come in bursts.
            fresh = isinstance(event, RunEvent) and event.crud == Crud.CREATE
            definitions = self._definitions.of(event.experiment, fresh=fresh)
        catalogue = None
        if self._elog is not None and needs_catalogue(event, ours(definitions, self._scope)):
            catalogue = Catalogue(
                self._elog.run(event.experiment, event.number), self._elog.files(event.experiment, event.number)
            )
        return decide(event, definitions, self._scope, catalogue)

    def _make(self, dag_run: DagRun, outcome: Outcome) -> None:
        if dag_run.dag_run_id in self._known:
            # A run's end is told again with every parameter that is added soon after.
            outcome.existed.append(dag_run.dag_run_id)
            return
        try:
            made = self._tell_airflow(dag_run)
        except AirflowRefusalError as error:
            outcome.rejected.append(f"workflow {dag_run.definition.name!r}: {error}")
        except AirflowUnavailableError as error:
            raise RetryError(str(error), suspicious=error.answered_with == _OWN_FAILURE) from error
        except ConfigError as error:
            raise RetryError(str(error)) from error
        else:
            (outcome.made if made else outcome.existed).append(dag_run.dag_run_id)
            self._known[dag_run.dag_run_id] = None
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)

    def _tell_airflow(self, dag_run: DagRun) -> bool:
        job_id, new = (dag_run.job_id, False) if self._jobs is None else self._jobs.entry_for(dag_run)
        made = self._airflow.create_dag_run(dag_run.dag_id, dag_run.dag_run_id, dag_run.conf(job_id))
        if self._jobs is not None and new and not made and job_id is not None:
            # Whoever made it has shown it in the logbook with a job of his own, or without one.
            there = self._airflow.dag_run(dag_run.dag_id, dag_run.dag_run_id).get("conf") or {}
            if there.get("job_id") != job_id:
                self._jobs.withdraw(dag_run, job_id)
        return made


def _is_final(error: PeerError) -> bool:
    """Whether the logbook said no, rather than nothing; a query that failed means that we do not know."""
    if isinstance(error, ElogError):
        return bool(error.errormsg)
    if isinstance(error, ServiceError):
        return 400 <= error.status < 500 and error.status not in _PASSING_STATUSES
    return False
