"""The life of a transfer as a table: state and event give the next state and what must be done. No I/O here.

``python -m lclstream.api.states`` prints the tables as Markdown; with the name of a file it rewrites them there,
between the marks, as in ``python -m lclstream.api.states docs/transfers.md``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lclstream.api.models import TransferPhase


class State(StrEnum):
    """Where a transfer is: the public phases, and `keeping` and `emptied`, which others see as `draining`.

    `keeping` exists because a buffer that is told to keep the rest in files has not done so yet: its disk may be full,
    and it may be killed while it writes.

    `emptied` exists because the news of two jobs come in any order: a buffer that has ended well says nothing about the
    engine, whose last rank may have been killed after its last message.
    """

    requested = "requested"
    buffer_starting = "buffer_starting"
    ready = "ready"
    producing = "producing"
    draining = "draining"
    keeping = "keeping"
    emptied = "emptied"
    done = "done"
    failed = "failed"
    canceled = "canceled"
    expired = "expired"

    @property
    def phase(self) -> TransferPhase:
        """What others see."""
        return TransferPhase.draining if self in (State.keeping, State.emptied) else TransferPhase(self.value)

    @property
    def final(self) -> bool:
        """Whether it never changes again."""
        return self in FINAL


class Event(StrEnum):
    """What can happen to a transfer."""

    buffer_submitted = "buffer_submitted"
    buffer_answers = "buffer_answers"
    buffer_completed = "buffer_completed"
    buffer_failed = "buffer_failed"
    buffer_drained = "buffer_drained"
    set_aside = "set_aside"
    kept = "kept"
    not_kept = "not_kept"
    engine_active = "engine_active"
    engine_completed = "engine_completed"
    engine_failed = "engine_failed"
    cancel = "cancel"
    lease_expired = "lease_expired"
    time_limit = "time_limit"


class Effect(StrEnum):
    """What the supervisor must do; each may be repeated without harm, because a crash may come after it was done."""

    start_buffer = "start_buffer"
    start_engine = "start_engine"
    stop_engine = "stop_engine"
    stop_buffer = "stop_buffer"
    collect = "collect"
    free_ports = "free_ports"


@dataclass(frozen=True)
class Step:
    """The answer to an event: the next state, and what must be done, in this order."""

    state: State
    effects: tuple[Effect, ...] = ()


FINAL = frozenset((State.done, State.failed, State.canceled, State.expired))
#: States in which something may still happen, in the order of a good transfer.
LIVING = tuple(state for state in State if state not in FINAL)

#: What starts a transfer.
INITIAL = Step(State.requested, (Effect.start_buffer,))
#: What every end does. The engine first: a buffer that is stopped first makes the engine's ranks fail on the way.
#: Ports are the last, because a port is free only when the job that listens there has ended.
END = (Effect.stop_engine, Effect.stop_buffer, Effect.collect, Effect.free_ports)


def _end(state: State) -> Step:
    return Step(state, END)


TABLE: dict[tuple[State, Event], Step] = {
    (State.requested, Event.buffer_submitted): Step(State.buffer_starting),
    (State.requested, Event.buffer_completed): _end(State.failed),
    (State.requested, Event.buffer_failed): _end(State.failed),
    # Never before the buffer answers: a producer that dials a port where nobody listens may lose what it sends.
    (State.buffer_starting, Event.buffer_answers): Step(State.ready, (Effect.start_engine,)),
    (State.buffer_starting, Event.buffer_completed): _end(State.failed),
    (State.buffer_starting, Event.buffer_failed): _end(State.failed),
    (State.ready, Event.engine_active): Step(State.producing),
    (State.ready, Event.engine_completed): Step(State.draining),
    (State.ready, Event.engine_failed): _end(State.failed),
    (State.ready, Event.buffer_completed): Step(State.emptied),
    (State.ready, Event.buffer_failed): _end(State.failed),
    (State.producing, Event.engine_completed): Step(State.draining),
    (State.producing, Event.engine_failed): _end(State.failed),
    (State.producing, Event.buffer_completed): Step(State.emptied),
    (State.producing, Event.buffer_failed): _end(State.failed),
    (State.draining, Event.buffer_completed): _end(State.done),
    (State.draining, Event.buffer_drained): _end(State.done),
    (State.draining, Event.set_aside): Step(State.keeping, (Effect.stop_buffer,)),
    (State.draining, Event.buffer_failed): _end(State.failed),
    # How the cancelled job ended tells nothing: what counts is the account the buffer wrote last.
    (State.keeping, Event.kept): _end(State.done),
    (State.keeping, Event.not_kept): _end(State.failed),
    (State.emptied, Event.engine_completed): _end(State.done),
    (State.emptied, Event.engine_failed): _end(State.failed),
    **{(state, Event.cancel): _end(State.canceled) for state in LIVING},
    **{(state, Event.lease_expired): _end(State.expired) for state in LIVING},
    **{(state, Event.time_limit): _end(State.failed) for state in LIVING},
}


def step(state: State, event: Event) -> Step | None:
    """What follows; None when the event means nothing in that state (late, repeated or out of order)."""
    return TABLE.get((state, event))


#: How long a transfer may stay in a state before `time_limit` happens, in seconds; the configuration may change each.
TIME_LIMITS_S: dict[State, float] = {
    State.requested: 300.0,
    State.buffer_starting: 600.0,
    State.ready: 3600.0,
    State.producing: 86400.0,
    State.draining: 600.0,
    State.keeping: 900.0,
    State.emptied: 120.0,
}

_MEANING = {
    State.requested: "stored, its ports leased; the buffer job is being submitted",
    State.buffer_starting: "the buffer job waits in its queue or starts",
    State.ready: "the buffer answers: consumers may pull; the engine job waits in its queue or starts",
    State.producing: "the engine runs",
    State.draining: "the engine has completed; the buffer gives out what it still holds",
    State.keeping: "the buffer was told to end, and keeps in files what nobody pulled (shown as `draining`)",
    State.emptied: "the buffer has ended well; the engine's own end is not known yet (shown as `draining`)",
    State.done: "everything was given out, or kept in files where that was asked for",
    State.failed: "something failed, or a time limit passed; `info` and the log say what",
    State.canceled: "its owner cancelled it",
    State.expired: "its lease was not renewed",
}
_EVENTS = {
    Event.buffer_submitted: "the job service has taken the buffer job",
    Event.buffer_answers: "the buffer's status answers over mutual TLS, with this transfer's name",
    Event.buffer_completed: "the buffer job has completed",
    Event.buffer_failed: "the buffer job failed, was refused, was cancelled by others, or is unknown to its service",
    Event.buffer_drained: "the buffer holds nothing and has no producer for the settling time",
    Event.set_aside: "the limit passed, and what nobody pulled shall be kept in files (`on_no_consumer=spill`)",
    Event.kept: "the buffers have ended, and by their last figures nothing is lost",
    Event.not_kept: "the buffers have ended, and messages are lost, or last figures are missing",
    Event.engine_active: "the engine job runs",
    Event.engine_completed: "the engine job has completed",
    Event.engine_failed: "the engine job failed, was refused, was cancelled by others, or is unknown to its service",
    Event.cancel: "`DELETE /transfers/{id}`",
    Event.lease_expired: "the lease was not renewed in time",
    Event.time_limit: "the state lasted longer than its limit",
}
_EFFECTS = {
    Effect.start_buffer: "submit the buffer job",
    Effect.start_engine: "submit the engine job, with its configuration",
    Effect.stop_engine: "cancel the engine job",
    Effect.stop_buffer: "cancel the buffer job",
    Effect.collect: "wait until the jobs have ended, then keep the buffer's last figures",
    Effect.free_ports: "give the ports back",
}

BEGIN_MARK = "<!-- states: made by `python -m lclstream.api.states docs/transfers.md` -->"
END_MARK = "<!-- states: end -->"


def markdown() -> str:
    """The tables, as they stand in the documentation."""
    lines = ["| state | meaning | limit |", "| --- | --- | --- |"]
    for state in State:
        limit = TIME_LIMITS_S.get(state)
        lines.append(f"| `{state}` | {_MEANING[state]} | {'' if limit is None else f'{limit:g} s'} |")
    lines += ["", "| event | meaning |", "| --- | --- |"]
    lines += [f"| `{event}` | {_EVENTS[event]} |" for event in Event]
    lines += ["", "| state | event | next state | what is done |", "| --- | --- | --- | --- |"]
    lines.append(f"|  | `POST /transfers` | `{INITIAL.state}` | {_names(INITIAL.effects)} |")
    for (state, event), answer in TABLE.items():
        if event not in (Event.cancel, Event.lease_expired, Event.time_limit):
            lines.append(f"| `{state}` | `{event}` | `{answer.state}` | {_names(answer.effects)} |")
    for event in (Event.cancel, Event.lease_expired, Event.time_limit):
        answer = TABLE[State.requested, event]
        lines.append(f"| any of these | `{event}` | `{answer.state}` | {_names(answer.effects)} |")
    lines += ["", "Any other event is without effect in that state.", "", "| what is done | meaning |", "| --- | --- |"]
    lines += [f"| `{effect}` | {_EFFECTS[effect]} |" for effect in Effect]
    return "\n".join(lines)


def _names(effects: tuple[Effect, ...]) -> str:
    return ", ".join(f"`{effect}`" for effect in effects)


def rewritten(text: str) -> str:
    """A page with the tables between its marks replaced by today's.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    before, begin, rest = text.partition(BEGIN_MARK)
    _, end, after = rest.partition(END_MARK)
    if not begin or not end:
        raise ValueError(f"the page lacks the line {BEGIN_MARK!r} or {END_MARK!r}, between which the tables stand")
    return f"{before}{BEGIN_MARK}\n\n{markdown()}\n\n{END_MARK}{after}"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(markdown())
    else:
        page = Path(sys.argv[1])
        page.write_text(rewritten(page.read_text()))
