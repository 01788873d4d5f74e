"""Intervals against printed tables, and against their own promise: coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.statistics import mean_band, mean_interval, paired_interval, t_quantile, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_newcombe(successes, n, low, high):
    estimate, got_low, got_high = wilson(successes, n)
    assert estimate == successes / n
    assert (got_low, got_high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case):
    successes, n = case
    interval, mirrored = wilson(successes, n), wilson(n - successes, n)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)


@pytest.mark.parametrize(
    ("degrees", "value"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (9, 2.2622),
        (30, 2.0423),
        (1000, 1.9623),
    ],
)
def test_t_quantile_matches_the_table(degrees, value):
    assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-5)


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    covered = sum(i.low <= 3.0 <= i.high for i in map(mean_interval, samples))
    low, high = wilson(covered, 4000, level=0.999)[1:]
    assert low <= 0.95 <= high


def test_paired_interval_is_the_interval_of_the_differences():
    before, after = np.array([1.0, 5.0, 9.0]), np.array([2.0, 6.5, 9.5])
    assert paired_interval(before, after) == mean_interval([1.0, 1.5, 0.5])
    assert paired_interval(before, after).low < 0 < paired_interval(before, after).estimate == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(3, 2), "3 successes in 2 trials"),
        (lambda: wilson(0, 0), "0 successes in 0 trials"),
        (lambda: mean_interval([1.0]), "1 value"),
        (lambda: mean_interval([1.0, float("nan")]), "1 of 2 values are not finite"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "equal shapes"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_band_is_an_interval_at_every_point():
    curves = [[1.0, 5.0], [2.0, 5.0], [3.0, 8.0]]
    mean, low, high = mean_band(curves)
    for i, column in enumerate([[1, 2, 3], [5, 5, 8]]):
        assert (mean[i], low[i], high[i]) == mean_interval(column)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        mean_band([[1.0, 2.0], [1.0]])
