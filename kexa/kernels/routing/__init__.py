"""From router scores to sorted pairs: who goes where, with what weight, in which order.

    chosen_n = the K experts with the largest keys of token n
    g_nk     = scale * s_nk / (sum over k of s_nk + 1e-20)        s: the scores of the chosen
    order    = the pairs (n, k), numbered n K + k, sorted by expert; equal experts by number

reported: sigmoid scores, 8 of 128 experts; the correction bias decides selection only. So keys are
scores plus bias, weights are made of scores alone, and no gradient reaches the keys. An expert that
may not be chosen, because its group is not among the best, has the key -inf.
chosen: of equal keys the kernel takes the lowest expert; PyTorch's own choice is not specified.
Experts of one token come in no specified order; their gates and pairs follow it.

Legend: N tokens, E experts, K experts per token, P = N * K pairs of token and expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kexa.kernels.dispatch import use_triton
from kexa.kernels.routing import reference


class Routing(NamedTuple):
    """What the experts need. All but ``gates_NK`` are integers without a gradient."""

    chosen_NK: torch.Tensor  # int64, the experts of each token, all different
    gates_NK: torch.Tensor  # their weights, in the scores' dtype
    order_P: torch.Tensor  # int64, sorted place -> pair; pair // K is its token
    inverse_P: torch.Tensor  # int64, pair -> sorted place
    offsets_E: torch.Tensor  # int32, where each expert's pairs end


def route(
    scores_NE: torch.Tensor, keys_NE: torch.Tensor, top_k: int, normalise: bool, scale: float
) -> Routing:
    """Select, weigh and sort; on a GPU the host waits for nothing.

    Args:
        scores_NE: positive, floating dtype.
        keys_NE: floating dtype, what selection goes by.
        top_k: experts per token, 1 to E.
        normalise: whether a token's gates sum to ``scale``; if not, a gate is ``scale`` * score.

    Returns:
        :class:`Routing`; its gates are differentiable in the scores.

    Raises:
        ValueError: shapes that differ, ``top_k`` outside 1..E.
    """
    if scores_NE.dim() != 2 or keys_NE.shape != scores_NE.shape:
        raise ValueError(
            f"scores {tuple(scores_NE.shape)}, keys {tuple(keys_NE.shape)}: expected both [N, E]"
        )
    if not 1 <= top_k <= scores_NE.shape[1]:
        raise ValueError(f"top_k={top_k}: choose 1 to {scores_NE.shape[1]} of the experts")
    if use_triton(scores_NE, keys_NE):
        from kexa.kernels.routing.triton import route as kernel

        return Routing(*kernel(scores_NE, keys_NE, top_k, normalise, scale))
    return Routing(*reference.route(scores_NE, keys_NE, top_k, normalise, scale))
