"""WSD at points computed by hand."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.train import wsd


def test_hand_computed_points():
    factors = [wsd(t, 10, warmup_share=0.2, decay_share=0.3) for t in range(10)]
    by_hand = [0.5, 1, 1, 1, 1, 1, 1, 1 - sqrt(1 / 4), 1 - sqrt(2 / 4), 1 - sqrt(3 / 4)]
    assert factors == pytest.approx(by_hand, abs=1e-15)


def test_no_warmup_and_no_decay_is_constant():
    assert [wsd(t, 5, 0, 0) for t in range(5)] == [1.0] * 5


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5))
def test_rises_then_stays_then_falls_and_never_stops_learning(steps, warmup, decay):
    factors = [wsd(t, steps, warmup, decay) for t in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("step", [-1, 10])
def test_step_outside_the_run_is_an_error(step):
    with pytest.raises(ValueError, match=f"step {step} is outside 0..9"):
        wsd(step, 10, 0.1, 0.1)


def test_shares_above_one_are_an_error():
    with pytest.raises(ValueError, match=r"warmup_share=0.6 and decay_share=0.5"):
        wsd(0, 10, 0.6, 0.5)
