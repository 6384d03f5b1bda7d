"""The job state machine: facts in, lines of history out. A pure table; no clock, no files.

A *fact* is something a backend knows about one attempt to run a job. What a backend does not know is no fact: a failed
query changes nothing. The table fills in the states that passed unseen between two queries, and ignores whatever comes
late, so that every history is ordered and complete: a final state is the last line, `active` follows `queued`, and a
late `queued` never reopens a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lclstream.jobs.models import JobState, Transition


class Fact(StrEnum):
    """What a backend can know about an attempt."""

    accepted = "accepted"
    rejected = "rejected"
    running = "running"
    succeeded = "succeeded"
    broken = "broken"
    canceled = "canceled"


@dataclass(frozen=True)
class Report:
    """One fact, with what is known beside it.

    Attributes:
        fact: what happened.
        time: when, unix time in seconds.
        jobndx: in which attempt; None means the present one, or the first when there was none.
        info: the id the backend gave, where it runs, the exit code, or the reason in words.
    """

    fact: Fact
    time: float
    jobndx: int | None = None
    info: str = ""


_N, _Q, _A = JobState.new, JobState.queued, JobState.active
_DONE, _FAIL, _STOP = JobState.completed, JobState.failed, JobState.canceled

#: (state, fact) -> the states reached, in order. What is missing changes nothing.
TABLE: dict[tuple[JobState, Fact], tuple[JobState, ...]] = {
    (_N, Fact.accepted): (_Q,),
    (_N, Fact.rejected): (_FAIL,),
    (_N, Fact.running): (_Q, _A),
    (_N, Fact.succeeded): (_Q, _A, _DONE),
    (_N, Fact.broken): (_Q, _FAIL),
    (_N, Fact.canceled): (_STOP,),
    (_Q, Fact.running): (_A,),
    (_Q, Fact.succeeded): (_A, _DONE),
    (_Q, Fact.broken): (_FAIL,),
    (_Q, Fact.canceled): (_STOP,),
    (_A, Fact.succeeded): (_DONE,),
    (_A, Fact.broken): (_FAIL,),
    (_A, Fact.canceled): (_STOP,),
}


def advance(history: Sequence[Transition], report: Report) -> list[Transition]:
    """The lines a report adds to a history; none when it says nothing new or comes too late.

    Args:
        history: all lines so far; the first is `new`.
        report: the fact.

    Returns:
        Lines whose times and attempt numbers never go back: a time before the last line's is set to that.
    """
    last = history[-1]
    if last.state.is_final:
        return []
    # A job that was never given to a backend has no attempt: it is rejected or canceled as number 0.
    first = 0 if report.fact in (Fact.rejected, Fact.canceled) else 1
    present = last.jobndx if last.state is not JobState.new else first
    jobndx = present if report.jobndx is None else report.jobndx
    if jobndx < last.jobndx:
        return []
    state, reached = last.state, []
    if state is not JobState.new and jobndx > last.jobndx:
        # The scheduler put the job back into its queue (a node failed, or its operator asked for it).
        state = JobState.queued
        reached.append(state)
    reached.extend(TABLE.get((state, report.fact), ()))
    time = max(report.time, last.time)
    return [
        Transition(time=time, jobndx=jobndx, state=state, info=report.info if index == len(reached) - 1 else "")
        for index, state in enumerate(reached)
    ]


def table_as_markdown() -> str:
    """The table for the documentation."""
    rows = ["| state | " + " | ".join(f"*{fact}*" for fact in Fact) + " |", "|---" * (len(Fact) + 1) + "|"]
    for state in JobState:
        cells = [" → ".join(TABLE.get((state, fact), ())) or "-" for fact in Fact]
        rows.append(f"| `{state}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)
