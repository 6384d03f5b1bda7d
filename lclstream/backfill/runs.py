"""Which runs, and what is to be done with each: pure functions, no I/O."""

from __future__ import annotations

from enum import StrEnum

from lclstream.arp.names import MAX_LENGTH
from lclstream.elog.models import RunNumber

#: More runs than an experiment ever has; a slip in a range would ask for more.
MOST_RUNS = 10_000


class RunsError(ValueError):
    """The list of runs cannot be read; the message says which part."""


def parse_runs(text: str) -> list[int]:
    """The run numbers in ``100..150,160``, ascending, each once.

    Raises:
        RunsError: a part is no number and no range.
    """
    runs: set[int] = set()
    for part in text.split(","):
        first, dots, last = (word.strip() for word in part.partition(".."))
        if not first.isdecimal() or (dots and not last.isdecimal()):
            raise RunsError(f"{part.strip()!r} in {text!r} is neither a run number nor a range such as 100..150")
        begin, end = int(first), int(last) if dots else int(first)
        if end < begin:
            raise RunsError(f"the range {part.strip()!r} ends before it begins")
        if end - begin >= MOST_RUNS:
            raise RunsError(f"the range {part.strip()!r} has more than {MOST_RUNS} runs")
        runs.update(range(begin, end + 1))
    return sorted(runs)


def backfill_run_id(experiment: str, run: RunNumber, name: str) -> str:
    """The DAG run's id, such as ``mfx100__r0007__backfill__stream``.

    Raises:
        RunsError: it would be longer than Airflow takes.
    """
    number = f"{run:04d}" if isinstance(run, int) else run
    made = f"{experiment}__r{number}__backfill__{name}"
    if len(made) > MAX_LENGTH:
        raise RunsError(f"the DAG run's id {made!r} has more than {MAX_LENGTH} characters: choose a shorter --name")
    return made


class Reprocess(StrEnum):
    """Which runs that were processed before are processed again."""

    NONE = "none"
    FAILED = "failed"
    COMPLETED = "completed"


class Step(StrEnum):
    """What is done about one run."""

    CREATE = "create"
    CLEAR = "run again"
    FOLLOW = "follow"
    SKIP = "skip"


def step(state: str | None, reprocess: Reprocess) -> Step:
    """What to do about a run whose DAG run is in `state`; None: there is none.

    ============  ==========  ========  ============
    state         none        failed    completed
    ============  ==========  ========  ============
    none yet      create      create    create
    under way     follow      follow    follow
    failed        skip        again     again
    success       skip        skip      again
    ============  ==========  ========  ============
    """
    if state is None:
        return Step.CREATE
    if state not in ("success", "failed"):
        return Step.FOLLOW
    again = reprocess is Reprocess.COMPLETED or (reprocess is Reprocess.FAILED and state == "failed")
    return Step.CLEAR if again else Step.SKIP
