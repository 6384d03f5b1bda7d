"""The documents of the service's answers, made from rows. No I/O here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lclstream.api import launch, plan
from lclstream.api.config import ApiConfig
from lclstream.api.models import (
    CacheMetrics,
    ClientName,
    JobState,
    PortTransition,
    TransferInfo,
    TransferPlan,
    TransferStatus,
)
from lclstream.api.states import State
from lclstream.api.status import messages
from lclstream.api.store import Order
from lclstream.api.tables import LogRow, TransferRow
from lclstreamer.config import Parameters


def plan_of(order: Order, parameters: Parameters, notes: list[str], leased: int, config: ApiConfig) -> TransferPlan:
    """What an order would start.

    Args:
        order: the order.
        parameters: its engine's configuration.
        notes: what is accepted and could be written better.
        leased: ports that are leased now.
        config: the service's configuration.
    """
    names = [f"INPUT-{number}" for number in range(order.buffers)]
    endpoints = [{"input": name, "output": "OUTPUT", "status": "STATUS"} for name in names]
    row = TransferRow(id=0, ranks=order.ranks, producers=order.producers, endpoints=endpoints, spill=order.spill)
    row.sentinel, row.created = order.sentinel, 0.0
    row.access = None if order.access is None else dict(order.access)
    jobs = {"buffer": launch.buffer_job(row, 0, config), "engine": launch.engine_job(row, config)}
    expected = plan.estimate(parameters, order.producers)
    return TransferPlan(
        ranks=order.ranks,
        producers=order.producers,
        buffers=order.buffers,
        ports=3 * order.buffers,
        ports_free=config.ports.last - config.ports.first + 1 - leased,
        config=order.config(names),
        scripts={name: job.script for name, job in jobs.items()},
        backends={name: job.backend for name, job in jobs.items()},
        events=expected.events,
        messages=expected.messages,
        bytes=expected.bytes,
        notes=notes,
    )


def status(row: TransferRow) -> TransferStatus:
    """A transfer in short."""
    phase = State(row.state).phase
    return TransferStatus(
        time=row.changed,
        jobndx=row.jobndx,
        state=phase.job_state,
        info=row.info,
        id=row.id,
        url=_urls(row)[0],
        urls=_urls(row),
        user=row.owner,
        phase=phase,
        lease_expires=row.lease_expires,
        name=row.name,
        tags=row.tags,
    )


def info(row: TransferRow, log: Sequence[LogRow], documents: Sequence[dict[str, Any] | None]) -> TransferInfo:
    """A transfer with its log and figures.

    Args:
        row: the transfer.
        log: its log, oldest first.
        documents: the last status document of each of its buffers.
    """
    known = [document for document in documents if document]
    return TransferInfo(
        user=row.owner,
        log=[
            PortTransition(
                time=entry.time,
                client=ClientName(entry.client),
                state=JobState(entry.state),
                info=entry.info,
                jobndx=entry.jobndx,
            )
            for entry in log
        ],
        metrics=_metrics(row, known),
        id=row.id,
        url=_urls(row)[0],
        urls=_urls(row),
        state=State(row.state).phase.job_state,
        phase=State(row.state).phase,
        info=row.info,
        lease_expires=row.lease_expires,
        name=row.name,
        tags=row.tags,
        buffer=known[0] if known else None,
        buffers=list(documents) if len(row.endpoints) > 1 else [],
        released=row.released,
        readers=_readers(row),
    )


def _readers(row: TransferRow) -> list[str] | None:
    persons = (row.access or {}).get("consumers")
    return None if persons is None else [f"{each['login']}@{each['issuer']}" for each in persons]


def _urls(row: TransferRow) -> list[str]:
    return [endpoint["output"] for endpoint in row.endpoints]


def _metrics(row: TransferRow, documents: list[dict[str, Any]]) -> CacheMetrics:
    times = [document["time"] for document in documents if isinstance(document.get("time"), int | float)]
    return CacheMetrics(
        time=max(times, default=row.changed),
        producers=sum(int(document.get("producers", 0)) for document in documents),
        recvd=sum(messages(document, "received") for document in documents),
        sent=sum(messages(document, "sent") for document in documents),
        buffered=sum(messages(document, "held") for document in documents),
    )
