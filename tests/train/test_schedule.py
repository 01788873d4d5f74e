"""WSD at points computed by hand."""

import functools
from math import ceil, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa.train import branched, build_optimizers, fit, wsd
from tests.train.conftest import OPTIMIZATION, batch_at, loss_fn, tiny_model


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


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0.01, 0.49))
def test_a_branch_at_the_planned_step_is_the_plan(steps, warmup, decay):
    w, d = ceil(warmup * steps), ceil(decay * steps)
    if w + d <= steps:
        for t in range(steps):
            assert branched(t, w, steps - d, d) == wsd(t, steps, warmup, decay)


@given(st.integers(0, 20), st.integers(0, 100), st.integers(1, 50))
def test_a_branch_repeats_the_stable_run_until_it_decays(warmup, stable, decay):
    decay_from = warmup + stable
    for t in range(decay_from):
        assert branched(t, warmup, decay_from, decay) == min(1, (t + 1) / max(warmup, 1))
    assert 0 < branched(decay_from, warmup, decay_from, decay) < 1


def test_a_branch_off_a_checkpoint_equals_a_run_planned_that_way(tmp_path):
    """Bitwise, in weights and losses; the checkpoint is one of a run that would have gone on."""

    def train(steps, schedule, directory=None):
        model = tiny_model()
        optimizers = build_optimizers(model, OPTIMIZATION)
        run = fit(
            model, optimizers, batch_at, loss_fn, steps, schedule,
            checkpoint_dir=directory, checkpoint_every=4,
        )  # fmt: skip
        return model, run

    branch = functools.partial(branched, warmup=2, decay_from=8, decay=4)
    planned, run = train(12, branch)
    expected = list(run)
    plan = functools.partial(wsd, steps=40, warmup_share=0.05, decay_share=0.2)
    _, run = train(40, plan, tmp_path)
    for step in run:
        if step.step == 8:  # the checkpoint after 8 steps is written
            break
    run.close()
    model, run = train(12, branch, tmp_path)
    assert list(run) == expected
    for p, q in zip(model.parameters(), planned.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_branch_within_the_warmup_or_without_steps_is_an_error():
    with pytest.raises(ValueError, match="decay_from=3 lies within a warm-up of 5 steps"):
        branched(0, 5, 3, 2)
    with pytest.raises(ValueError, match="decay=0"):
        branched(0, 1, 3, 0)
    with pytest.raises(ValueError, match=r"step 5 is outside 0..4"):
        branched(5, 1, 3, 2)
