"""Bins that grow, and the count of different times."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lclstream.consumers.bins import ExpandingBins, TimestampLedger

values = st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), min_size=1, max_size=10)


@given(values)
@settings(max_examples=150, deadline=None)
def test_no_value_is_lost_or_outside_however_the_range_grows(parts):
    bins = ExpandingBins(16, sums=("weight",))
    for part in parts:
        bins.add(np.array(part), weight=np.array(part))
    edges, entries, sums = bins.shown(16)
    flat = np.concatenate([np.array(part) for part in parts])
    assert entries.sum() == len(flat)
    tolerance = 1e-6 * (edges[1] - edges[0]) + 1e-9 * np.abs(flat).max()
    assert edges[0] <= flat.min() + tolerance
    assert flat.max() <= edges[-1] + tolerance
    np.testing.assert_allclose(sums["weight"].sum(), flat.sum(), rtol=1e-9, atol=1e-3)


def test_counts_are_in_the_bin_of_their_value_after_widening():
    bins = ExpandingBins(8, width=1.0, origin=0.0)
    bins.add(np.array([0.5, 1.5, 7.5]))
    bins.add(np.array([100.0]))
    edges, entries, _ = bins.shown(8)
    assert edges[1] - edges[0] == 16.0
    assert entries[0] == 3
    assert entries[(100 // 16)] == 1


def test_values_that_are_not_finite_are_skipped_with_their_weights():
    bins = ExpandingBins(8, width=1.0, origin=0.0, sums=("w",))
    bins.add(np.array([1.0, np.nan, np.inf]), w=np.array([5.0, 7.0, 9.0]))
    assert bins.entries.sum() == 1
    assert bins.sums["w"].sum() == 5.0


def test_few_bins_are_shown_of_many_without_losing_any():
    bins = ExpandingBins(1024, width=1.0, origin=0.0)
    bins.add(np.arange(1000.0))
    edges, entries, _ = bins.shown(60)
    assert len(entries) <= 60
    assert len(edges) == len(entries) + 1
    assert entries.sum() == 1000


def test_times_that_come_twice_are_counted_once_to_the_nanosecond():
    ledger = TimestampLedger()
    start = 1_700_000_000_000_000_000
    for first in range(0, 200_000, 1000):
        ledger.add(start + np.arange(first, first + 1000))
    ledger.add(np.array([start + 5, start + 199_999, start + 200_000]))
    assert ledger.unique == 200_001


def test_beyond_its_bound_the_count_is_unknown_not_wrong():
    ledger = TimestampLedger(most=1000)
    ledger.add(np.arange(2000))
    assert ledger.unique is None
