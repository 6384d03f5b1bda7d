"""The job state machine keeps histories ordered and complete, whatever a backend says and in whichever order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lclstream.jobs.machine import TABLE, Fact, Report, advance, table_as_markdown
from lclstream.jobs.models import JobState, Transition

NEW = Transition(time=100.0, jobndx=0, state=JobState.new, info='{"backend":{}}')


def run(*reports: Report) -> list[Transition]:
    history = [NEW]
    for report in reports:
        history += advance(history, report)
    return history


def states(history: list[Transition]) -> list[str]:
    return [f"{line.jobndx}:{line.state}" for line in history]


def test_a_good_job_is_new_queued_active_completed() -> None:
    history = run(
        Report(Fact.accepted, 101, info="4711"),
        Report(Fact.running, 102, 1, "node7"),
        Report(Fact.succeeded, 103, 1, "0"),
    )
    assert states(history) == ["0:new", "1:queued", "1:active", "1:completed"]
    assert [line.info for line in history[1:]] == ["4711", "node7", "0"]


def test_states_that_passed_between_two_queries_are_filled_in() -> None:
    history = run(Report(Fact.accepted, 101), Report(Fact.succeeded, 103, 1, "0"))
    assert states(history) == ["0:new", "1:queued", "1:active", "1:completed"]
    assert history[2].info == ""


def test_a_late_queued_never_reopens_a_job() -> None:
    history = run(Report(Fact.running, 102, 1), Report(Fact.accepted, 101), Report(Fact.broken, 103, 1, "3"))
    assert states(history) == ["0:new", "1:queued", "1:active", "1:failed"]
    assert advance(history, Report(Fact.accepted, 104)) == []
    assert advance(history, Report(Fact.running, 104, 2)) == []


def test_cancelling_a_finished_job_changes_nothing() -> None:
    history = run(Report(Fact.accepted, 101), Report(Fact.succeeded, 102, 1))
    assert advance(history, Report(Fact.canceled, 103)) == []


def test_a_job_cancelled_before_its_start_has_no_attempt() -> None:
    assert states(run(Report(Fact.canceled, 101))) == ["0:new", "0:canceled"]


def test_a_rejected_submission_is_failed_with_the_schedulers_words() -> None:
    history = run(Report(Fact.rejected, 101, info="sbatch: error: invalid partition specified: x"))
    assert states(history) == ["0:new", "0:failed"]
    assert "invalid partition" in history[-1].info


def test_a_requeued_job_begins_another_attempt() -> None:
    history = run(Report(Fact.accepted, 101), Report(Fact.running, 102, 1), Report(Fact.running, 110, 2, "node8"))
    assert states(history) == ["0:new", "1:queued", "1:active", "2:queued", "2:active"]
    assert advance(history, Report(Fact.broken, 111, 1, "node failed")) == []


def test_times_never_go_back() -> None:
    history = run(Report(Fact.accepted, 105), Report(Fact.running, 101, 1), Report(Fact.succeeded, 90, 1))
    times = [line.time for line in history]
    assert times == sorted(times)


def test_final_states_have_no_way_out() -> None:
    assert not [state for state, _ in TABLE if state.is_final]


def test_the_table_prints_for_the_documentation() -> None:
    text = table_as_markdown()
    assert all(f"`{state}`" in text for state in JobState)
    assert "queued → active → completed" in text


class AnyBackend(RuleBasedStateMachine):
    """A backend that says anything at any time, also nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.history = [NEW]
        self.before: list[Transition] = []

    @rule(
        fact=st.sampled_from(list(Fact)),
        time=st.floats(0, 1000),
        jobndx=st.none() | st.integers(0, 4),
        info=st.text(max_size=5),
    )
    def say(self, fact: Fact, time: float, jobndx: int | None, info: str) -> None:
        self.before = list(self.history)
        self.history += advance(self.history, Report(fact, time, jobndx, info))

    @invariant()
    def only_added_to(self) -> None:
        assert self.history[: len(self.before)] == self.before

    @invariant()
    def ordered(self) -> None:
        times = [line.time for line in self.history]
        attempts = [line.jobndx for line in self.history]
        assert times == sorted(times)
        assert attempts == sorted(attempts)

    @invariant()
    def at_most_one_end_and_nothing_after_it(self) -> None:
        assert not [line for line in self.history[:-1] if line.state.is_final]

    @invariant()
    def each_state_once_an_attempt_and_in_order(self) -> None:
        rank = {JobState.new: 0, JobState.queued: 1, JobState.active: 2}
        seen = [(line.jobndx, rank.get(line.state, 3)) for line in self.history]
        assert seen == sorted(set(seen))

    @invariant()
    def nothing_runs_before_it_was_queued(self) -> None:
        queued = {line.jobndx for line in self.history if line.state is JobState.queued}
        assert all(line.jobndx in queued for line in self.history if line.state is JobState.active)
        assert all(
            line.jobndx in {one.jobndx for one in self.history if one.state is JobState.active}
            for line in self.history
            if line.state is JobState.completed
        )


TestAnyBackend = AnyBackend.TestCase
TestAnyBackend.settings = settings(max_examples=200, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("state", [state for state in JobState if not state.is_final])
def test_every_unfinished_state_can_end(state: JobState) -> None:
    ends = {reached[-1] for (from_state, _), reached in TABLE.items() if from_state is state}
    assert {JobState.failed, JobState.canceled} <= ends
