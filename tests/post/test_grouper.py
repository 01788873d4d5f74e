"""GROUPER against hand-computed numbers, fp64 loops, SimPER, finite differences, invariances."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa.post.grouper import grouper_advantages, grouper_loss, inverse_perplexity

groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=size, max_size=size),
        min_size=1,
        max_size=5,
    )
)


def loop_advantages(group):
    """Equation (4) as printed: z-score first, then min-max."""
    spread = statistics.pstdev(group)
    if spread == 0:
        return [0.0] * len(group)
    z = [(r - statistics.fmean(group)) / spread for r in group]
    return [2 * (v - min(z)) / (max(z) - min(z)) - 1 for v in z]


def loop_loss(logprobs, advantages, mask):
    """Equation (3), token by token."""
    total = 0.0
    for i, row in enumerate(logprobs):
        chosen = [row[t] for t in range(len(row)) if mask[i][t]]
        total += advantages[i] * math.exp(sum(chosen) / len(chosen))
    return -total / len(logprobs)


def random_batch(seed=0, rows=5, width=6):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    advantages = 2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return logprobs, advantages, torch.arange(width) < lengths[:, None]


def test_advantages_by_hand():
    got = grouper_advantages(torch.tensor([[0.0, 1, 4, 3], [0.2, 0.2, 0.2, 0.2]]))
    assert got.tolist() == [[-1, -0.5, 1, 0.5], [0, 0, 0, 0]]


@given(groups)
def test_advantages_equal_the_loop(rewards):
    expected = torch.tensor([loop_advantages(g) for g in rewards], dtype=torch.float64)
    got = grouper_advantages(torch.tensor(rewards, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@given(groups, st.integers(1, 9), st.integers(-5, 5))
def test_advantages_span_the_interval_and_ignore_scale_and_offset(rewards, scale, offset):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = grouper_advantages(rewards)
    tied = rewards.amax(1) == rewards.amin(1)
    assert advantages[tied].eq(0).all()
    assert advantages[~tied].amax(1).eq(1).all()
    assert advantages[~tied].amin(1).eq(-1).all()
    torch.testing.assert_close(grouper_advantages(rewards * scale + offset), advantages)


@given(groups)
def test_advantages_follow_a_permutation_of_the_responses(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    flipped = grouper_advantages(rewards.flip(1))
    assert flipped.equal(grouper_advantages(rewards).flip(1))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_rewards_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="at least 2 responses"):
        grouper_advantages(torch.zeros(shape))


def test_loss_by_hand():
    logprobs = torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = grouper_loss(logprobs, advantages, torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(-0.05)


@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_loop(seed):
    batch = random_batch(seed)
    expected = loop_loss(*(x.tolist() for x in batch))
    assert grouper_loss(*batch).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("winner_first", [True, False])
def test_two_responses_give_half_of_simper(winner_first):
    logprobs, _, mask = random_batch(4, rows=2)
    rewards = torch.tensor([[0.9, 0.3] if winner_first else [0.3, 0.9]], dtype=torch.float64)
    winner, loser = (0, 1) if winner_first else (1, 0)
    inverse = inverse_perplexity(logprobs, mask)
    simper = -inverse[winner] + inverse[loser]
    loss = grouper_loss(logprobs, grouper_advantages(rewards)[0], mask)
    assert loss.item() == pytest.approx(simper.item() / 2, rel=1e-12)


def test_gradient_equals_finite_differences():
    logprobs, advantages, mask = random_batch(6)
    assert torch.autograd.gradcheck(
        lambda x: grouper_loss(x, advantages, mask), logprobs.requires_grad_()
    )


def test_gradient_fades_with_the_likelihood_of_the_response():
    """The pull on a token is A * inverse perplexity / length: gone for unlikely text."""
    logprobs = torch.tensor([[-0.1, -0.1], [-9.0, -9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    grouper_loss(logprobs, -torch.ones(2, dtype=torch.float64), mask).backward()
    expected = torch.exp(logprobs.detach()) / 4
    torch.testing.assert_close(logprobs.grad, expected)


def test_padding_is_never_read():
    logprobs, advantages, mask = random_batch(7)
    poisoned = logprobs.masked_fill(~mask, math.nan).requires_grad_()
    loss = grouper_loss(poisoned, advantages, mask)
    loss.backward()
    assert loss.item() == grouper_loss(logprobs, advantages, mask).item()
    assert poisoned.grad[~mask].eq(0).all()


def test_a_response_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        grouper_loss(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2).bool())
