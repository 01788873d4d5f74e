"""From logits to tokens: temperature, top-p, one uniform number per choice, rejection sampling.

A token is drawn by inverting the cumulative distribution in whole numbers (probability * 2^40).
Integer sums do not depend on the order of summation, so equal uniform numbers give equal tokens on
any device with the same logits. Temperature 0 is the argmax.

A draft x from the distribution q stands for a token of the target distribution p (Leviathan et al.
2023) if it is

    accepted with probability min(1, p(x) / q(x));
    else replaced by a draw from max(p - q, 0), normalised

At temperature 0 it stands if it is the argmax of p.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNIT = float(2**40)


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the last axis in fp32; temperature 0, which has none, counts as 1."""
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    return logits.log_softmax(-1)


def nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Each row cut to its smallest set of most probable tokens that holds ``top_p``."""
    if top_p == 1:
        return p_BV
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    units_BV = (sorted_BV * _UNIT).long()
    before_BV = units_BV.cumsum(-1) - units_BV
    kept_BV = torch.where(before_BV < top_p * _UNIT, sorted_BV, 0.0)
    p_BV = torch.zeros_like(p_BV).scatter_(1, order_BV, kept_BV)
    return p_BV / p_BV.sum(-1, keepdim=True)


def probabilities(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """The sampling distribution [B, V]: softmax at ``temperature > 0``, cut to the nucleus."""
    return nucleus(log_probabilities(logits_BV, temperature).exp(), top_p)


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per row, proportional to ``weights_BV``, from fp64 numbers in [0, 1)."""
    cumulative_BV = (weights_BV * _UNIT).long().cumsum(-1)
    target_B1 = (uniform_B[:, None] * cumulative_BV[:, -1:]).long()
    index_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return index_B1[:, 0].clamp(max=weights_BV.shape[1] - 1)


def choose(logp_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor) -> Tensor:
    """Next token of each row from :func:`log_probabilities` at the same temperature."""
    if temperature == 0:
        return logp_BV.argmax(-1)
    return draw(nucleus(logp_BV.exp(), top_p), uniform_B)


def verify(
    draft_B: Tensor,
    draft_logp_BV: Tensor,
    logp_BV: Tensor,
    temperature: float,
    top_p: float,
    accept_B: Tensor,
    replace_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rejection sampling: whether each draft stands [B], and the token [B] that does.

    The token is distributed as the target's own if ``draft_B`` was chosen from ``draft_logp_BV`` at
    the same temperature and top-p. ``accept_B`` and ``replace_B`` are uniform numbers.
    """
    if temperature == 0:
        token_B = logp_BV.argmax(-1)
        return token_B == draft_B, token_B
    p_BV, q_BV = nucleus(logp_BV.exp(), top_p), nucleus(draft_logp_BV.exp(), top_p)
    p_B, q_B = (x.gather(1, draft_B[:, None])[:, 0] for x in (p_BV, q_BV))
    accepted_B = accept_B * q_B < p_B
    residual_BV = (p_BV - q_BV).clamp(min=0.0)
    return accepted_B, torch.where(accepted_B, draft_B, draw(residual_BV, replace_B))


def uniform(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """fp64 numbers in [0, 1) from a generator on the CPU, whatever the device."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
