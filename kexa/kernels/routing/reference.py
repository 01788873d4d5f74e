"""Routing with PyTorch's own top-k and stable sort: the specification, and the path CPUs take.

Legend: N tokens, E experts, K experts per token, P = N * K pairs.
"""

from __future__ import annotations

import torch


def select(
    scores_NE: torch.Tensor, keys_NE: torch.Tensor, top_k: int, normalise: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights, both [N, K]: the first half of :func:`route`."""
    chosen_NK = keys_NE.topk(top_k, dim=-1, sorted=False).indices
    gates_NK = scores_NE.gather(1, chosen_NK)
    if normalise:
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return chosen_NK, gates_NK * scale


def route(
    scores_NE: torch.Tensor, keys_NE: torch.Tensor, top_k: int, normalise: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    """The fields of :class:`kexa.kernels.Routing`; see :func:`kexa.kernels.route`."""
    chosen_NK, gates_NK = select(scores_NE, keys_NE, top_k, normalise, scale)
    sorted_P, order_P = chosen_NK.flatten().sort(stable=True)
    inverse_P = torch.empty_like(order_P).scatter_(
        0, order_P, torch.arange(len(order_P), device=order_P.device)
    )
    experts_E = torch.arange(scores_NE.shape[1], device=order_P.device)
    offsets_E = torch.searchsorted(sorted_P, experts_E, right=True, out_int32=True)
    return chosen_NK, gates_NK, order_P, inverse_P, offsets_E
