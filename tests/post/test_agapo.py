"""AGAPO against hand-computed numbers, a loop in fp64, finite differences and its invariances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa.post.agapo import agapo_advantages, agapo_loss, importance_ratios, informative_groups

REWARDS = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)
groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=size, max_size=size),
        min_size=1,
        max_size=6,
    )
)


def loop_advantages(rewards):
    """Equation (2), term by term."""
    kept, sizes = [], [len(group) for group in rewards]
    for group in rewards:
        for i, reward in enumerate(group):
            if len(set(group)) > 1:
                others = group[:i] + group[i + 1 :]
                kept.append(reward - sum(others) / len(others))
    if not kept:
        return [[0.0] * size for size in sizes]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((a - mean) ** 2 for a in kept) / len(kept))
    values = iter(kept)
    return [
        [(next(values) - mean) / std if len(set(group)) > 1 else 0.0 for _ in group]
        for group in rewards
    ]


def loop_loss(logprobs, rollout, advantages, mask, epsilon, weights=None):
    """Equation (1), token by token. ``weights`` freezes the importance weights, as sg() does."""
    total, rows = 0.0, len(logprobs)
    for i in range(rows):
        positions = [t for t in range(len(mask[i])) if mask[i][t]]
        for t in positions:
            weight = weights[i][t] if weights else math.exp(logprobs[i][t] - rollout[i][t])
            total += min(weight, epsilon) * advantages[i] * logprobs[i][t] / len(positions)
    return -total / rows


def random_batch(seed=0, rows=6, width=7):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    rollout = logprobs + torch.randn(rows, width, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    return logprobs, rollout, advantages, mask


def test_advantages_by_hand():
    expected = (
        torch.tensor([[2, -2, -2, 2], [0, 0, 0, 0], [1, 1, 1, -3]], dtype=torch.float64)
        / 3
        / math.sqrt(7 / 18)
    )
    torch.testing.assert_close(agapo_advantages(REWARDS), expected)
    assert informative_groups(REWARDS).tolist() == [True, False, True]


@given(groups)
def test_advantages_equal_the_loop(rewards):
    got = agapo_advantages(torch.tensor(rewards, dtype=torch.float64))
    expected = torch.tensor(loop_advantages(rewards), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(groups)
def test_advantages_are_centred_in_each_group_and_of_unit_spread_in_the_batch(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages, kept = agapo_advantages(rewards), informative_groups(rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(rewards), dtype=torch.float64))
    if kept.any():
        assert advantages[kept].square().mean().item() == pytest.approx(1, abs=1e-10)


@given(groups, st.integers(1, 5), st.integers(-3, 3))
def test_advantages_ignore_scale_offset_and_uninformative_groups(rewards, scale, offset):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = agapo_advantages(rewards)
    torch.testing.assert_close(agapo_advantages(rewards * scale + offset), advantages)
    flat = torch.full((2, rewards.shape[1]), 0.7, dtype=torch.float64)
    torch.testing.assert_close(agapo_advantages(torch.cat([rewards, flat]))[:-2], advantages)


def test_a_batch_without_information_has_no_advantage():
    assert agapo_advantages(torch.full((3, 4), 0.1)).eq(0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_rewards_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="at least 2 responses"):
        agapo_advantages(torch.zeros(shape))


def test_loss_by_hand():
    now, rollout = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.05]]).log()
    loss = agapo_loss(now, rollout, torch.tensor([1.5]), torch.ones(1, 2, dtype=torch.bool), 2.0)
    assert loss.item() == pytest.approx(3.75 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, math.inf])
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_loop(seed, epsilon):
    logprobs, rollout, advantages, mask = random_batch(seed)
    expected = loop_loss(*(x.tolist() for x in (logprobs, rollout, advantages, mask)), epsilon)
    got = agapo_loss(logprobs, rollout, advantages, mask, epsilon).item()
    assert got == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences_with_the_weights_held_fixed():
    logprobs, rollout, advantages, mask = random_batch(1)
    logprobs.requires_grad_()
    agapo_loss(logprobs, rollout, advantages, mask, 2.0).backward()
    weights = importance_ratios(logprobs, rollout).tolist()
    base, step = logprobs.tolist(), 1e-6
    fixed = rollout.tolist(), advantages.tolist(), mask.tolist(), 2.0, weights
    for i in range(len(base)):
        for t in range(len(base[i])):
            ends = []
            for sign in (1, -1):
                moved = [row.copy() for row in base]
                moved[i][t] += sign * step
                ends.append(loop_loss(moved, *fixed))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert logprobs.grad[i, t].item() == pytest.approx(slope, abs=1e-8)


def test_importance_weights_carry_no_gradient():
    """d loss / d logprob is -weight * A / (length * rows); through the ratio it would be more."""
    logprobs, rollout, advantages, mask = random_batch(2)
    logprobs.requires_grad_()
    rollout.requires_grad_()
    agapo_loss(logprobs, rollout, advantages, mask, 2.0).backward()
    weights = (logprobs.detach() - rollout.detach()).exp().clamp(max=2.0)
    scale = mask / (mask.sum(1, keepdim=True) * len(logprobs))
    torch.testing.assert_close(logprobs.grad, -weights * advantages[:, None] * scale)
    assert rollout.grad is None
    assert not importance_ratios(logprobs, rollout).requires_grad


def test_truncation_is_from_above_only():
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([[-9.0, -1.0, 4.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    agapo_loss(logprobs, rollout, torch.ones(1, dtype=torch.float64), mask, 2.0).backward()
    expected = torch.tensor([[2.0, 1.0, math.exp(-5)]], dtype=torch.float64) / -3
    torch.testing.assert_close(logprobs.grad, expected)


def test_every_response_weighs_the_same_whatever_its_length():
    logprobs = torch.full((2, 8), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(8) < torch.tensor([[2], [8]])
    agapo_loss(
        logprobs, logprobs.detach(), torch.ones(2, dtype=torch.float64), mask, 2.0
    ).backward()
    torch.testing.assert_close(logprobs.grad.sum(1), torch.full((2,), -0.5, dtype=torch.float64))


def test_padding_is_never_read():
    logprobs, rollout, advantages, mask = random_batch(3)
    expected = agapo_loss(logprobs, rollout, advantages, mask, 2.0)
    poisoned = logprobs.masked_fill(~mask, math.nan).requires_grad_()
    rollout = rollout.masked_fill(~mask, math.inf)
    loss = agapo_loss(poisoned, rollout, advantages, mask, 2.0)
    loss.backward()
    assert loss.item() == expected.item()
    assert poisoned.grad[~mask].eq(0).all()


def test_a_response_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        agapo_loss(*[torch.zeros(1, 2)] * 2, torch.zeros(1), torch.zeros(1, 2).bool(), 2.0)
