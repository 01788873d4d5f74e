"""The experts' products one operation at a time: the specification, and the path CPUs take.

Any product of sorted rows fits in, so a numerics policy with products of its own takes this path on
every device.

Legend: N tokens, D hidden size, F expert inner size, E experts, K experts per token, P = N * K
pairs of token and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from kexa.kernels.glu import swiglu
from kexa.kernels.routing import Routing


class _Gather(torch.autograd.Function):
    """Rows of tokens to sorted rows of pairs. Backward a sum: indexing's would add atomically."""

    @staticmethod
    def forward(ctx, x_ND, order_P, inverse_P, top_k):
        ctx.save_for_backward(inverse_P)
        ctx.pairs = len(x_ND), top_k
        return x_ND.index_select(0, order_P // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_PD):
        d_NKD = d_PD.index_select(0, *ctx.saved_tensors).unflatten(0, ctx.pairs)
        return d_NKD.sum(1), None, None, None


class _Return(torch.autograd.Function):
    """Sorted rows of pairs to pairs in their own order; the backward pass sorts them again."""

    @staticmethod
    def forward(ctx, rows_PD, order_P, inverse_P):
        ctx.save_for_backward(order_P)
        return rows_PD.index_select(0, inverse_P)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_PD):
        return d_PD.index_select(0, *ctx.saved_tensors), None, None


def rows_of_pairs(x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The token's row for every pair, sorted by expert: [P, D]."""
    top_k = routing.chosen_NK.shape[1]
    return _Gather.apply(x_ND, routing.order_P, routing.inverse_P, top_k)


def weighed_sum(rows_PD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sorted rows of pairs, weighed by their gates and summed for every token: [N, D]."""
    out_PD = _Return.apply(rows_PD, routing.order_P, routing.inverse_P)
    out_NKD = out_PD.unflatten(0, routing.gates_NK.shape)
    return (routing.gates_NK[..., None] * out_NKD).sum(1).to(rows_PD.dtype)


def expert_up(
    x_ND: torch.Tensor, w_EGD: torch.Tensor, routing: Routing, product: Callable
) -> torch.Tensor:
    """See :func:`kexa.kernels.expert_up`."""
    pairs_PD = rows_of_pairs(x_ND, routing)
    gate_PF, up_PF = product(pairs_PD, w_EGD, routing.offsets_E).chunk(2, dim=-1)
    return swiglu(gate_PF, up_PF)


def expert_down(
    h_PF: torch.Tensor, w_EDF: torch.Tensor, routing: Routing, product: Callable
) -> torch.Tensor:
    """See :func:`kexa.kernels.expert_down`."""
    return weighed_sum(product(h_PF, w_EDF, routing.offsets_E), routing)
