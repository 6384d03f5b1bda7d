"""The id of a DAG run, made from what it is for and nothing else.

The same event gives the same id whenever and wherever it is processed, and Airflow refuses a second DAG run with an id
it has. That is what makes one DAG run out of an event that is delivered twice.
"""

from __future__ import annotations

import hashlib
import json
import re

from lclstream.elog.models import RunNumber, Trigger

#: Airflow's database column takes 250 characters.
MAX_LENGTH = 200
_HASH_DIGITS = 12
_CLEAN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_SLUG_LENGTH = 48


def _is_clean(part: str) -> bool:
    # Airflow refuses ids with "..", and "__" is what separates the parts.
    return _CLEAN.fullmatch(part) is not None and "__" not in part and ".." not in part


def _slug(part: str) -> str:
    """Something readable that reminds of the part; not unique."""
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", part).strip("_-")[:_SLUG_LENGTH].strip("_-")
    return plain or "x"


def dag_run_id(experiment: str, run: RunNumber, trigger: Trigger, definition: str, *, job_id: str | None = None) -> str:
    """The DAG run's id, such as ``tmox42619__r0007__start_of_run__stream``.

    It has only letters, digits, ``_``, ``-`` and ``.``, never ``..``, and at most :data:`MAX_LENGTH` characters. Parts
    that had to be changed for that get a hash of everything behind them, so that different parts give different ids.

    Args:
        experiment: the experiment's name.
        run: its run number, or name.
        trigger: what happened.
        definition: the workflow definition's name.
        job_id: the logbook's job, for one asked for by hand: asking again means another DAG run.
    """
    number = f"{run:04d}" if isinstance(run, int) else run
    parts = [experiment, number, definition] + ([] if job_id is None else [job_id])
    # A run called "0007" must not be taken for run number 7.
    clean = all(_is_clean(part) for part in parts) and (isinstance(run, int) or not run.isdigit())
    words = [experiment, "r" + number, trigger.value.lower(), definition] + ([] if job_id is None else [job_id])
    readable = "__".join(words)
    if clean and len(readable) <= MAX_LENGTH:
        return readable
    everything = json.dumps([experiment, run, trigger.value, definition, job_id])
    digest = hashlib.sha256(everything.encode()).hexdigest()[:_HASH_DIGITS]
    slugs = [_slug(experiment), "r" + _slug(number), trigger.value.lower(), _slug(definition)]
    slugs += [] if job_id is None else [_slug(job_id)]
    return "__".join([*slugs, digest])
