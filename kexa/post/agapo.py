"""AGAPO: off-policy policy gradient with truncated importance sampling (equations 1 and 2).

    A_group,i  = r_i - mean of the other rewards of the group                                   (2)
    A_global,i = (A_group,i - mean_k A_group,k) / std_k A_group,k     k over the whole batch    (2)
    rho_i,t    = pi_theta(o_i,t | ...) / pi_rollout(o_i,t | ...)
    J = E[ 1/G sum_i 1/|o_i| sum_t sg(min(rho_i,t, epsilon)) A_global,i log pi_theta(o_i,t) ]   (1)

reported: off-policy, weights truncated from above only and without gradient, groups of zero
variance dropped, group then global normalisation, no KL term, router frozen, several verifiable
tasks mixed.
inferred: groups are dropped before the global statistics are taken (kept, they would add zeros and
shrink the std). The leave-one-out advantage is G/(G-1) (r_i - mean), so it sums to zero in each
group: the global mean is zero and the factor cancels in the division.
chosen: the population standard deviation and no epsilon under it (a kept group never has std 0);
the value of epsilon, the group size and the optimizer are in the profiles.

Q prompts   G responses of a prompt   N rows (responses)   T positions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from kexa.config import RLConfig
from kexa.model import KexaForCausalLM
from kexa.post.rewards import Verdict
from kexa.post.rollout import (
    Group,
    attempt,
    collate,
    freeze_router,
    response_logprobs,
    rewards,
)
from kexa.post.tasks import Task
from kexa.runtime import generator


def informative_groups(rewards_QG: Tensor) -> Tensor:
    """Which groups have two different rewards, bool [Q]. The others say nothing and are dropped."""
    return rewards_QG.amax(1) > rewards_QG.amin(1)


def agapo_advantages(rewards_QG: Tensor) -> Tensor:
    """Equation (2). Zero-variance groups get advantage 0 and take no part in the statistics.

    By hand, G = 4: rewards ``[1, 0, 0, 1]`` have leave-one-out advantages ``[2, -2, -2, 2] / 3``,
    ``[1, 1, 1, 0]`` have ``[1, 1, 1, -3] / 3``, ``[0, 0, 0, 0]`` is dropped. Over the eight that
    are left the mean is 0 and the variance (4 * 4/9 + 3 * 1/9 + 9/9) / 8 = 7/18, so the first group
    ends at 2/3 / sqrt(7/18) = 1.0690 in size and the second at 0.5345 and -1.6036.

    Args:
        rewards_QG: rewards in [0, 1], floating point, G >= 2 responses for each of Q prompts.

    Returns:
        Advantages [Q, G] in the dtype of the rewards.

    Raises:
        ValueError: not a [Q, G] tensor with G >= 2 (nothing is left to compare a response with).
    """
    if rewards_QG.ndim != 2 or rewards_QG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards_QG.shape)}; want [prompts, at least 2 responses]"
        )
    size = rewards_QG.shape[1]
    others_QG = (rewards_QG.sum(1, keepdim=True) - rewards_QG) / (size - 1)
    kept_Q = informative_groups(rewards_QG)
    group_QG = (rewards_QG - others_QG)[kept_Q]
    advantages_QG = torch.zeros_like(rewards_QG)
    if kept_Q.any():
        advantages_QG[kept_Q] = (group_QG - group_QG.mean()) / group_QG.std(correction=0)
    return advantages_QG


def importance_ratios(logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """rho of equation (1): probability now over that at sampling time. Carries no gradient."""
    return (logprobs.detach() - rollout_logprobs.detach()).exp()


def agapo_loss(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon: float
) -> Tensor:
    """Minus the objective of equation (1), averaged over all responses given.

    By hand: two tokens with probabilities 1/2 and 1/4 now, 1/2 and 1/20 at rollout, epsilon = 2 and
    A = 1.5. The ratios are 1 and 5, the weights 1 and 2, the loss -1/2 * 1.5 * (ln 1/2 + 2 ln 1/4)
    = 3.75 ln 2.

    Args:
        logprobs: log-probability of each response token under the policy being trained, [..., T].
        rollout_logprobs: the same under the policy that sampled it, [..., T].
        advantages: one per response, [...].
        mask: true on response tokens, [..., T]; what stands elsewhere is never read.
        epsilon: the upper truncation of the importance ratios.

    Raises:
        ValueError: a response without tokens, which has no length to divide by.
    """
    lengths = mask.sum(-1)
    if not lengths.all():
        raise ValueError("a response has no tokens under the mask; drop it before the loss")
    logprobs = logprobs.masked_fill(~mask, 0.0)
    ratios = importance_ratios(logprobs, rollout_logprobs.masked_fill(~mask, 0.0))
    weighted = ratios.clamp(max=epsilon) * advantages.unsqueeze(-1) * logprobs
    return -(weighted.sum(-1) / lengths).mean()


@dataclass(frozen=True)
class Iteration:
    """One rollout batch and the updates made on it.

    ``rewards_QG`` fp32; ``kept_Q`` marks the informative groups; ``ratios`` holds, for each update,
    the importance ratio of every token in it; ``grad_norms`` one per update, before clipping.
    """

    step: int
    tasks: Sequence[Task]
    groups: Sequence[Group]
    verdicts: Sequence[Sequence[Verdict]]
    rewards_QG: Tensor
    kept_Q: Tensor
    ratios: Sequence[Tensor]
    grad_norms: Sequence[float]


def train(
    model: KexaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    draw: Callable[[int], Sequence[Task]],
    config: RLConfig,
    seed: int,
) -> Iterator[Iteration]:
    """Reinforcement learning in reasoning mode; yields after every rollout batch.

        for each iteration:  G responses to each of ``draw(iteration)``, their rewards, advantages
            drop groups without information
            for each of ``updates`` parts of the rest:  one optimizer step on equation (1)

    Only the first part sees the policy that sampled; the others are off-policy by one to
    ``updates - 1`` steps, which the importance weights make up for. An update's gradient is summed
    over passes of ``groups_per_pass`` groups, which bounds memory. The router stays as it is. The
    forward pass runs in evaluation mode: there is no dropout, and no expert load to count.
    """
    freeze_router(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in tqdm(range(config.iterations), desc="AGAPO"):
        tasks = draw(step)
        groups, verdicts = attempt(
            model,
            tokenizer,
            tasks,
            config.group_size,
            thinking=True,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=generator(seed, "agapo rollout", step),
        )
        rewards_QG = rewards(verdicts)
        advantages_QG, kept_Q = agapo_advantages(rewards_QG), informative_groups(rewards_QG)
        ratios, norms = [], []
        for part in kept_Q.nonzero()[:, 0].tensor_split(config.updates):
            if len(part) == 0:
                continue
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            moved = []
            for rows in part.split(config.groups_per_pass):
                batch = collate([groups[q] for q in rows], model.config.pad_token_id)
                batch = {k: v.to(parameters[0].device) for k, v in batch.items()}
                logprobs = response_logprobs(model, batch, config.temperature)
                loss = agapo_loss(
                    logprobs,
                    batch["rollout_logprobs"],
                    advantages_QG[rows].flatten().to(logprobs.device),
                    batch["mask"],
                    config.epsilon,
                )
                (loss * len(rows) / len(part)).backward()
                ratio_NT = importance_ratios(logprobs, batch["rollout_logprobs"])
                moved.append(ratio_NT[batch["mask"]].cpu())
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
            for optimizer in optimizers:
                optimizer.step()
            ratios.append(torch.cat(moved))
        yield Iteration(step, tasks, groups, verdicts, rewards_QG, kept_Q, ratios, norms)
