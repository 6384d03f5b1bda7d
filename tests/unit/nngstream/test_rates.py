"""Rates: bytes a second, over the last few seconds only."""

from __future__ import annotations

import pytest

from nngstream.rates import Rate


def test_a_rate_is_that_of_the_last_seconds_and_forgets_what_was_before():
    rate = Rate()
    assert rate.per_second == 0
    for second in range(10):
        rate.sample(float(second), 1000 * second)
    assert rate.per_second == pytest.approx(1000)
    for second in range(10, 20):
        rate.sample(float(second), 9000)
    assert rate.per_second == 0


def test_one_look_is_no_rate():
    rate = Rate()
    rate.sample(5.0, 10**9)
    assert rate.per_second == 0
