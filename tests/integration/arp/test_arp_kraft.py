from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chaos_arp
    import kraft_broker

    try:
        kraft_broker.jars()
    except kraft_broker.NoBrokerError as error:
        pytest.skip(f"no real Kafka broker: {error}")
    yield chaos_arp
    for name in ("chaos_arp", "kraft_broker", "fake_airflow"):
        sys.modules.pop(name, None)


@pytest.mark.timeout(600)
def test_on_a_real_broker_no_event_is_lost_or_done_twice_while_processors_broker_and_airflow_are_killed(
    chaos: Any, tmp_path: Path
) -> None:
    plan = [chaos.KILL_PROCESSOR, chaos.AWAY, chaos.KILL_BROKER, chaos.FAILS, chaos.KILL_PROCESSOR]
    result = chaos.run(events=40, kills=3, plan=plan, folder=tmp_path, limit_s=300, verbose=False)
    assert (result["lost"], result["duplicated"]) == (0, 0), result
    assert result["kills"] == 3
    assert result["dead_letters"] == result["unreadable_messages"]
