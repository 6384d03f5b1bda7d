"""Where a run's data are, how fast they move, and what they wait for: a line for each transfer, job and session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lclstream_airflow.hooks.lclstream import LCLStreamHook, TransferInfo, TransferPhase, transfer_facts
from lclstream_airflow.hooks.patience import PeerError
from lclstream_airflow.hooks.psik import JobState, PsikHook

#: A buffer that is fuller than this waits for its consumers.
_FULL = 0.9
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Row:
    """A transfer or a job as people read it.

    :param what: such as ``transfer 7``
    :param where: address of the service
    :param state: its phase or state
    :param counts: messages in, held, out
    :param speed: rates in and out
    :param waits_for: what has to happen next; empty: nothing
    """

    what: str
    where: str
    state: str
    counts: str
    speed: str
    waits_for: str


def waits_for(info: TransferInfo) -> str:
    """What a transfer waits for, in words; empty when it has ended."""
    facts = transfer_facts(info)
    buffer = info.buffer or {}
    held, consumers = facts["held_messages"] or 0, facts["consumers"]
    phase = info.phase
    if phase.final:
        return ""
    if phase in (TransferPhase.requested, TransferPhase.buffer_starting):
        return "the buffer's job to start"
    if phase is TransferPhase.ready:
        return "the engine's job to start"
    if phase is TransferPhase.draining:
        ending = f"the last {held} messages" if held else "its jobs to end"
        return f"a consumer to take {ending}: nobody pulls" if held and consumers == 0 else ending
    if not facts["received_messages"]:
        return "the first event"
    capacity, bytes_held = buffer.get("capacity_bytes"), (buffer.get("held") or {}).get("bytes")
    full = bool(capacity and bytes_held is not None and bytes_held > _FULL * capacity)
    if consumers == 0:
        return "a consumer: nobody pulls" + (", and the buffer is full" if full else "")
    return "faster consumers: the buffer is full" if full else "the end of the run"


def transfer_row(conn_id: str, transfer_id: int) -> Row:
    """One transfer, as its service sees it now."""
    hook = LCLStreamHook(conn_id)
    try:
        with hook.get_conn() as client:
            info = client.info(transfer_id)
        url = hook.transfer_url(transfer_id)
    except (PeerError, ValueError) as error:
        return Row(f"transfer {transfer_id}", conn_id, "unknown", "", "", f"its service to answer: {error}")
    return _row(info, url)


def transfer_rows(conn_id: str, limit: int) -> list[Row]:
    """The latest transfers of a service, newest first.

    Raises:
        PeerError: the service cannot be asked.
        ValueError: the connection is wrong.
    """
    hook = LCLStreamHook(conn_id)
    with hook.get_conn() as client:
        infos = [client.info(status.id) for status in client.list(limit=limit)]
    return [_row(info, hook.transfer_url(info.id), whose=_whose(info.tags)) for info in infos]


def session_rows(conn_id: str) -> list[Row]:
    """The sessions that hold nodes, or wait for them, at a computing centre; none where no such centre is defined."""
    hook = PsikHook(conn_id)
    try:
        found = [job for job in hook.under_way({}) if "session" in job.tags]
        return [
            Row(
                f"session {job.tags['session']} (job {job.jobid}){_whose(job.tags)}",
                hook.job_url(job.jobid),
                job.state.value,
                "",
                "",
                "streams" if job.state is JobState.active else "its nodes",
            )
            for job in found
        ]
    except PeerError as error:
        return [Row("sessions", conn_id, "unknown", "", "", f"their service to answer: {error}")]
    except ValueError:
        return []


def _whose(tags: Mapping[str, str]) -> str:
    return f" of {tags['dag_id']} / {tags.get('run_id', '')}" if "dag_id" in tags else ""


def job_row(conn_id: str, job_id: str) -> Row:
    """One job, as its service sees it now."""
    hook = PsikHook(conn_id)
    try:
        with hook.get_conn() as client:
            history = client.history(job_id)
        url = hook.job_url(job_id)
    except (PeerError, ValueError) as error:
        return Row(f"job {job_id}", conn_id, "unknown", "", "", f"its service to answer: {error}")
    last = history[-1]
    waiting = {JobState.new: "its start", JobState.queued: "the scheduler", JobState.active: "its end"}
    return Row(f"job {job_id}", url, last.state.value, last.info, "", waiting.get(last.state, ""))


def _row(info: TransferInfo, where: str, whose: str = "") -> Row:
    facts = transfer_facts(info)
    counts = (
        f"{facts['received_messages']} in ({_bytes(facts['received_bytes'])}), "
        f"{facts['held_messages']} held, {facts['sent_messages']} out, {facts['lost_messages'] or 0} lost"
    )
    speed = f"{_bytes(facts['rate_in_bytes_s'])}/s in, {_bytes(facts['rate_out_bytes_s'])}/s out"
    name = f" ({info.name})" if info.name else ""
    why = f": {info.info}" if info.phase.final and info.info else ""
    return Row(f"transfer {info.id}{name}{whose}", where, info.phase.value + why, counts, speed, waits_for(info))


def _bytes(value: Any) -> str:
    if not isinstance(value, int | float):
        return "?"
    amount = float(value)
    for unit in _UNITS[:-1]:
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} {_UNITS[-1]}"
