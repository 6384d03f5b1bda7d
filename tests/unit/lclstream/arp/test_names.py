from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lclstream.arp.names import MAX_LENGTH, dag_run_id
from lclstream.elog.models import Trigger

# Few characters, so that examples collide where a careless function would.
AWKWARD = st.text(alphabet="ab_.-0/ é:", max_size=8)
TEXTS = st.one_of(AWKWARD, st.text(max_size=400))
PARTS = st.tuples(
    TEXTS,
    st.one_of(st.integers(min_value=0, max_value=10**12), TEXTS),
    st.sampled_from(Trigger),
    TEXTS,
    st.one_of(st.none(), AWKWARD),
)


def made(parts: tuple[str, int | str, Trigger, str, str | None]) -> str:
    experiment, run, trigger, definition, job = parts
    return dag_run_id(experiment, run, trigger, definition, job_id=job)


def test_an_ordinary_event_reads_as_what_it_is() -> None:
    assert dag_run_id("tmox42619", 7, Trigger.START_OF_RUN, "stream") == "tmox42619__r0007__start_of_run__stream"
    assert dag_run_id("mfx1", 12345, Trigger.MANUAL, "a-b.c", job_id="6a0f") == "mfx1__r12345__manual__a-b.c__6a0f"


@given(PARTS)
@example(("", "", Trigger.MANUAL, "", ""))
@example(("..", "../../etc", Trigger.MANUAL, "a b", None))
@example(("\ud800", "\ud800", Trigger.MANUAL, "\ud800", None))
def test_only_safe_characters_whatever_comes(parts: tuple[str, int | str, Trigger, str, str | None]) -> None:
    name = made(parts)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", name)
    assert ".." not in name
    assert len(name) <= 250


@given(PARTS, PARTS)
@example(("a", 7, Trigger.MANUAL, "b", None), ("a", "0007", Trigger.MANUAL, "b", None))
@example(("a", 7, Trigger.MANUAL, "b", "c"), ("a", 7, Trigger.MANUAL, "b__c", None))
@example(("a__r0001__manual__b", 1, Trigger.MANUAL, "c", None), ("a", 1, Trigger.MANUAL, "b__r0001__manual__c", None))
@example(("a b", 1, Trigger.MANUAL, "c", None), ("a_b", 1, Trigger.MANUAL, "c", None))
@example(("a_", 1, Trigger.MANUAL, "c", None), ("a", 1, Trigger.MANUAL, "_c", None))
def test_different_events_have_different_ids(
    one: tuple[str, int | str, Trigger, str, str | None], other: tuple[str, int | str, Trigger, str, str | None]
) -> None:
    assert (made(one) == made(other)) == (one == other)


@given(PARTS)
def test_the_same_event_has_the_same_id(parts: tuple[str, int | str, Trigger, str, str | None]) -> None:
    assert made(parts) == made(parts)


@pytest.mark.parametrize("length", [MAX_LENGTH, 1000])
def test_long_names_are_shortened_and_stay_different(length: int) -> None:
    one, other = (dag_run_id("mfx1", 1, Trigger.MANUAL, "x" * length + tail) for tail in "ab")
    assert one != other
    assert len(one) <= MAX_LENGTH
