"""The table of states: pure, complete, and the one in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lclstream.api import states
from lclstream.api.models import TransferPhase
from lclstream.api.states import END, FINAL, INITIAL, LIVING, TABLE, TIME_LIMITS_S, Effect, Event, State

PAGE = Path(__file__).parents[4] / "docs" / "transfers.md"


@pytest.mark.parametrize("state", LIVING)
def test_every_living_state_has_a_time_limit_and_can_be_cancelled(state: State) -> None:
    assert TIME_LIMITS_S[state] > 0
    assert TABLE[state, Event.time_limit].state is State.failed
    assert TABLE[state, Event.cancel].state is State.canceled
    assert TABLE[state, Event.lease_expired].state is State.expired


@pytest.mark.parametrize("state", sorted(FINAL))
def test_nothing_happens_to_a_transfer_that_has_ended(state: State) -> None:
    assert all(states.step(state, event) is None for event in Event)


def test_every_end_stops_both_jobs_and_frees_the_ports_last() -> None:
    for answer in TABLE.values():
        if answer.state in FINAL:
            assert answer.effects == END
    assert END.index(Effect.stop_engine) < END.index(Effect.stop_buffer) < END.index(Effect.free_ports)
    assert END[-1] is Effect.free_ports


def test_the_engine_starts_only_when_the_buffer_answers() -> None:
    starts = {key for key, answer in TABLE.items() if Effect.start_engine in answer.effects}
    assert starts == {(State.buffer_starting, Event.buffer_answers)}


def test_every_state_can_be_reached_and_every_phase_is_shown_by_one() -> None:
    reached = {INITIAL.state} | {answer.state for answer in TABLE.values()}
    assert reached == set(State)
    assert {state.phase for state in State} == set(TransferPhase)


def test_done_needs_the_good_end_of_both_jobs() -> None:
    """Whatever the order of news, `done` is never reached while one of the two has failed or is unknown."""
    for first, second in (
        (Event.engine_completed, Event.buffer_completed),
        (Event.buffer_completed, Event.engine_completed),
    ):
        middle = states.step(State.producing, first)
        assert middle is not None
        assert middle.state not in FINAL
        end = states.step(middle.state, second)
        assert end is not None
        assert end.state is State.done
    after_buffer = states.step(State.producing, Event.buffer_completed)
    assert after_buffer is not None
    failed = states.step(after_buffer.state, Event.engine_failed)
    assert failed is not None
    assert failed.state is State.failed


def test_what_was_set_aside_is_done_only_when_it_is_kept() -> None:
    set_aside = states.step(State.draining, Event.set_aside)
    assert set_aside is not None
    assert (set_aside.state, set_aside.effects) == (State.keeping, (Effect.stop_buffer,))
    ends = {event: answer.state for (state, event), answer in TABLE.items() if state is State.keeping}
    assert [event for event, end in ends.items() if end is State.done] == [Event.kept]
    assert ends[Event.not_kept] is State.failed
    assert ends[Event.time_limit] is State.failed, "and not for ever"


class Life(RuleBasedStateMachine):
    """Any events in any order: what was started is stopped, once, and nothing is started after the end."""

    def __init__(self) -> None:
        super().__init__()
        self.state = INITIAL.state
        self.effects = list(INITIAL.effects)
        self.steps = 0

    @rule(event=st.sampled_from(sorted(Event)))
    def happen(self, event: Event) -> None:
        answer = states.step(self.state, event)
        if answer is not None:
            self.state = answer.state
            self.effects += answer.effects
            self.steps += 1

    @invariant()
    def ends_once(self) -> None:
        assert self.effects.count(Effect.free_ports) == (1 if self.state in FINAL else 0)

    @invariant()
    def starts_at_most_once(self) -> None:
        assert self.effects.count(Effect.start_buffer) == 1
        assert self.effects.count(Effect.start_engine) <= 1

    @invariant()
    def always_forward(self) -> None:
        assert self.steps <= len(LIVING), "a transfer went round in a circle"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, deadline=None)


def test_the_documentation_shows_this_table() -> None:
    assert states.rewritten(PAGE.read_text()) == PAGE.read_text(), (
        "run `python -m lclstream.api.states docs/transfers.md`"
    )


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the line"):
        states.rewritten("# nothing here\n")
