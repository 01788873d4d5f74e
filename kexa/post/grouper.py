"""GROUPER: group-wise SimPER preference learning, equations (3) and (4) of the report.

    L   = -E[ 1/G sum_i A_i exp(1/|o_i| log pi_theta(o_i | x)) ]                            (3)
    z_i = (r_i - mean r) / std r      A_i = 2 (z_i - min z) / (max z - min z) - 1           (4)

reported: groups are sampled once from the initial (post-RL) policy; the reward combines rules and
rubric scores over several dimensions; no reference model, no beta, no margin. The exponential is
the inverse perplexity of a response, so the loss is bounded and a response's pull fades as it
becomes unlikely.
inferred: min-max scaling cancels the z-score (both are affine), so equation (4) is the min-max of
the raw rewards; that is what is computed, without a division by a small std. With two responses A =
(1, -1) and the loss is half of SimPER's.
chosen: a group of equal rewards, 0/0 in equation (4), gets advantage 0.

Q prompts   G responses of a prompt   T positions
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kexa.config import PreferenceConfig
from kexa.model import KexaForCausalLM
from kexa.post.rollout import Group, collate, freeze_router, response_logprobs
from kexa.train import Step, fit


def grouper_advantages(rewards_QG: Tensor) -> Tensor:
    """Equation (4): each group stretched to [-1, 1]; 0 where all rewards of a group are equal.

    By hand: rewards ``[0, 1, 4, 3]`` become ``2 r / 4 - 1 = [-1, -0.5, 1, 0.5]``.

    Args:
        rewards_QG: preference rewards on any scale, floating point, G responses for each of Q
            prompts.

    Returns:
        Advantages [Q, G] in the dtype of the rewards.

    Raises:
        ValueError: not a [Q, G] tensor with G >= 2.
    """
    if rewards_QG.ndim != 2 or rewards_QG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards_QG.shape)}; want [prompts, at least 2 responses]"
        )
    low_Q1, high_Q1 = rewards_QG.amin(1, keepdim=True), rewards_QG.amax(1, keepdim=True)
    tied_Q1 = high_Q1 == low_Q1
    spread_Q1 = torch.where(tied_Q1, 1.0, high_Q1 - low_Q1)
    return torch.where(tied_Q1, 0.0, 2 * (rewards_QG - low_Q1) / spread_Q1 - 1)


def inverse_perplexity(logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp of the mean log-probability of a response's tokens: [..., T] -> [...], in (0, 1].

    Raises:
        ValueError: a response without tokens.
    """
    lengths = mask.sum(-1)
    if not lengths.all():
        raise ValueError("a response has no tokens under the mask; drop it before the loss")
    return (logprobs.masked_fill(~mask, 0.0).sum(-1) / lengths).exp()


def grouper_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Equation (3), averaged over all responses given.

    By hand: token probabilities (1/2, 1/2) have inverse perplexity 0.5, (0.2, 0.8) have 0.4; with A
    = (1, -1) the loss is -(0.5 - 0.4) / 2 = -0.05.

    Args:
        logprobs: log-probability of each response token under the policy being trained, [..., T].
        advantages: one per response, [...].
        mask: true on response tokens, [..., T]; what stands elsewhere is never read.
    """
    return -(advantages * inverse_perplexity(logprobs, mask)).mean()


class PreferenceLoss(NamedTuple):
    """``total`` is equation (3); the other two show what it moves: mean inverse perplexity of the
    responses with positive and with negative advantage."""

    total: Tensor
    preferred: Tensor
    rejected: Tensor


def train(
    model: KexaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    groups: Sequence[Group],
    rewards_QG: Tensor,
    config: PreferenceConfig,
    seed: int,
) -> Iterator[Step]:
    """Preference learning on groups sampled beforehand: ``epochs`` passes in a seeded order.

    Groups of equal rewards pull nowhere and are left out. The learning rate falls linearly to zero.
    chosen: the router stays frozen, as in reinforcement learning.
    """
    freeze_router(model)
    advantages_QG = grouper_advantages(rewards_QG)
    telling = (advantages_QG != 0).any(1).nonzero()[:, 0].tolist()
    per_epoch = max(1, len(telling) // config.batch_prompts)
    steps = per_epoch * config.epochs

    def batch_at(step: int) -> dict[str, Tensor]:
        epoch, within = divmod(step, per_epoch)
        order = random.Random(f"{seed} {epoch}").sample(telling, len(telling))
        chosen = order[within * config.batch_prompts : (within + 1) * config.batch_prompts]
        batch = collate([groups[q] for q in chosen], model.config.pad_token_id)
        return batch | {"advantages": advantages_QG[chosen].flatten()}

    def loss_fn(model: KexaForCausalLM, batch: dict[str, Tensor]) -> PreferenceLoss:
        logprobs, advantages = response_logprobs(model, batch), batch["advantages"]
        inverse = inverse_perplexity(logprobs.detach(), batch["mask"])
        return PreferenceLoss(
            grouper_loss(logprobs, advantages, batch["mask"]),
            inverse[advantages > 0].mean(),
            inverse[advantages < 0].mean(),
        )

    return fit(
        model,
        optimizers,
        batch_at,
        loss_fn,
        steps,
        lambda step: 1 - step / steps,
        balance_step=0.0,
        description="GROUPER",
    )
