"""One kill of each kind, of real services, a real buffer and a real engine; the benchmark does them all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chaos_transfers

    yield chaos_transfers
    for name in ("chaos_transfers", "transfer_site"):
        sys.modules.pop(name, None)


def test_whatever_is_killed_a_transfer_comes_to_its_end_and_leaves_nothing(chaos: Any, tmp_path: Path) -> None:
    # Half a minute: each trial starts a buffer and an engine, and most of them a service again.
    result = chaos.run(chaos.quick_trials(), folder=tmp_path, tries=4, verbose=False)
    assert result["bad"] == []
    assert [result[count] for count in ("leaked_ports", "leaked_jobs", "stuck", "wrong_end")] == [0, 0, 0, 0]
    assert set(result["killed"]) == {"both", "api", "jobs", "buffer", "engine", "buffer's runner"}
    assert result["not_reached"] <= 1, "on a slow machine something may end just before it is killed"


def test_every_transition_of_the_table_has_a_trial(chaos: Any) -> None:
    """What the table gains, the trials gain."""
    from lclstream.api.states import LIVING, TABLE, Effect, Event, State

    trials = chaos.trials()
    shown = {trial.point.value for trial in trials if trial.point.what == "state"}
    assert shown == {state.value for state in State}
    assert {trial.point.value for trial in trials if trial.point.what == "effect"} == {
        effect.value for effect in Effect
    }
    for event, story in ((Event.cancel, "cancel"), (Event.lease_expired, "lease")):
        places = {trial.at for trial in trials if trial.story == story}
        # These two are passed, not waited in: nothing can be asked of a transfer just then.
        assert places == {state.value for state, what in TABLE if what is event} - {"emptied", "keeping"}
    assert {trial.at for trial in trials} <= {"", *(state.value for state in LIVING)}
