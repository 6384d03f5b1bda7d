"""The pools that our DAGs' tasks run in, made when Airflow starts.

A task whose pool does not exist is never started, so a missing pool would look like a hanging DAG run. What is there
is never changed: the number of slots is the operators' decision (Admin, Pools).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from airflow.listeners import hookimpl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolDefinition:
    """A pool as it is made. Deferred tasks count: a stream holds its slot while nobody's worker waits for it."""

    name: str
    slots: int
    description: str


POOLS = (
    PoolDefinition("lclstream_streams", 8, "Streams at a time: ports and network of the data transfer nodes"),
    PoolDefinition("lclstream_nodes", 16, "Jobs at a time: nodes at the computing centres"),
    PoolDefinition("lclstream_archive", 4, "Archived runs at a time: what reprocessing may take beside live runs"),
)


@hookimpl
def on_starting(component: Any) -> None:
    """Make the pools that are missing, when a scheduler, triggerer or DAG processor starts.

    Which of them it is cannot be told here: Airflow asks before the component has its name. All of them have the
    database.
    """
    del component
    make_pools()


def make_pools() -> list[str]:
    """Make the pools that are missing; returns the names of those made."""
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    made = []
    for wanted in POOLS:
        try:
            with create_session() as session:
                if Pool.get_pool(wanted.name, session=session) is None:
                    Pool.create_or_update_pool(
                        wanted.name,
                        slots=wanted.slots,
                        description=wanted.description,
                        include_deferred=True,
                        session=session,
                    )
                    made.append(wanted.name)
        except Exception as error:
            # Another part of Airflow that starts at the same time was quicker; or the database is away, which the part
            # that starts will notice itself.
            log.warning("pool %s was not made here: %s", wanted.name, error)
            made = [name for name in made if name != wanted.name]
    if made:
        log.info("made the pools %s", ", ".join(made))
    return made
