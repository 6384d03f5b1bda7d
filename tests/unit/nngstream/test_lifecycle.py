"""The states, as the module's table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nngstream import lifecycle
from nngstream.lifecycle import Lifecycle, State


def observe(life: Lifecycle, now: float, connected: int, seen: int, empty: bool = True) -> State:
    return life.observe(now, connected=connected, seen=seen, empty=empty)


def test_a_stream_from_its_first_producer_to_its_last_message():
    life = Lifecycle(producers=2, grace=5)
    assert observe(life, 0, 0, 0) == "waiting"
    assert observe(life, 1, 1, 1) == "streaming"
    assert observe(life, 2, 0, 1) == "streaming"
    assert observe(life, 100, 0, 1) == "streaming", "the second producer has not come yet"
    assert observe(life, 101, 1, 2) == "streaming"
    assert observe(life, 102, 0, 2, empty=False) == "streaming"
    assert observe(life, 106, 0, 2, empty=False) == "streaming"
    assert observe(life, 107, 0, 2, empty=False) == "draining"
    assert observe(life, 1000, 0, 2, empty=False) == "draining"
    assert observe(life, 1001, 0, 2) == "done"


def test_a_producer_that_comes_back_within_the_grace_starts_it_anew():
    life = Lifecycle(producers=1, grace=5)
    observe(life, 0, 1, 1)
    observe(life, 1, 0, 1)
    observe(life, 5, 1, 2)
    observe(life, 6, 0, 2)
    assert observe(life, 10.9, 0, 2) == "streaming"
    assert observe(life, 11, 0, 2) == "draining"


def test_draining_waits_for_the_last_connection():
    life = Lifecycle(producers=1, grace=0)
    observe(life, 0, 1, 1)
    assert observe(life, 1, 0, 1) == "draining"
    assert observe(life, 2, 1, 1) == "draining"
    assert observe(life, 3, 0, 1) == "done"


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("producers", [0, 1])
def test_a_stop_signal_drains_for_a_bounded_time(producers, empty):
    life = Lifecycle(producers=1, grace=0)
    observe(life, 0, producers, producers)
    life.stop(1, 10)
    assert life.state == "draining"
    assert observe(life, 2, 0, producers, empty) == ("done" if empty else "draining")
    assert observe(life, 11, 0, producers, empty) == ("done" if empty else "failed")


def test_a_second_stop_signal_gives_up_at_once():
    life = Lifecycle(producers=1, grace=0)
    life.stop(1, 10)
    life.stop(2, 0)
    assert observe(life, 2, 0, 0, empty=False) == "failed"


def test_the_documentation_shows_the_table_of_the_code():
    rows = [re.split(r" {2,}| (?=[a-z]+$)", line.strip()) for line in (lifecycle.__doc__ or "").splitlines()]
    rows = [row for row in rows if row[0].split(" ")[0] in list(State)]
    page = (Path(__file__).parents[3] / "docs" / "buffer.md").read_text()
    assert len(rows) == 6
    for row in rows:
        state, _, event = " ".join(row[:-1]).partition(" ")
        assert f"| {state} | {event.strip()} | {row[-1]} |" in page
