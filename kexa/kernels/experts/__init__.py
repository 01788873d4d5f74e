"""The two products of the routed experts, from tokens to tokens.

    h[p] = silu(G x[t]) * (U x[t])       of pair p: its token t and its expert, with G, U and W
    y[t] = sum over the pairs p of t of  g[p] W h[p]

Pairs are sorted by expert, tokens are not: each product is a :func:`kexa.kernels.grouped_gemm` with
rows fetched from tokens before it, or brought back to tokens after it. As operations of their own
these copies, SwiGLU and the weighing move more bytes than the rows of the products. So the kernels
read the rows of ``x`` where they lie, apply SwiGLU to sums that are still in registers, weigh a row
as they store it, and store it at its pair: the K rows of a token then lie together and are summed
in a second pass (:mod:`kexa.kernels.experts.triton` counts the bytes).

chosen: no atomic adds. They would move more, and their order, hence the bits of the result, would
change from run to run.

reported: dropless routing, 128 experts, 8 per token, SwiGLU of inner size 2048.

Legend: N tokens, D hidden size, F expert inner size, E experts, K experts per token, P = N * K
pairs of token and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kexa.kernels.dispatch import use_triton
from kexa.kernels.experts import reference
from kexa.kernels.grouped import grouped_gemm
from kexa.kernels.routing import Routing

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expert_up(
    x_ND: torch.Tensor, w_EGD: torch.Tensor, routing: Routing, product: Product = grouped_gemm
) -> torch.Tensor:
    """Gate and up product of every pair and the SwiGLU between them.

    Args:
        x_ND: tokens, floating dtype.
        w_EGD: ``[E, 2F, D]``, same dtype and device; the gate's F rows come first.
        routing: who goes where, see :func:`kexa.kernels.route`.
        product: what multiplies sorted rows by their expert's matrix. Nothing is fused around
            another product than ``grouped_gemm``: it gets gathered rows.

    Returns:
        h_PF in x's dtype, rows sorted by expert. Differentiable once in x and w.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if x_ND.dim() != 2 or w_EGD.dim() != 3 or x_ND.shape[1] != w_EGD.shape[2]:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, w {tuple(w_EGD.shape)}: expected [N, D] and [E, 2F, D]"
        )
    if w_EGD.shape[1] % 2:
        raise ValueError(f"w {tuple(w_EGD.shape)}: expected as many rows of gate as of up")
    if len(routing.chosen_NK) != len(x_ND):
        raise ValueError(f"{len(routing.chosen_NK)} tokens were routed, x has {len(x_ND)}")
    _check_experts(x_ND, w_EGD, routing)
    if product is grouped_gemm and use_triton(x_ND):
        from kexa.kernels.experts.triton import expert_up as kernel

        return kernel(x_ND, w_EGD, routing)
    return reference.expert_up(x_ND, w_EGD, routing, product)


def expert_down(
    h_PF: torch.Tensor, w_EDF: torch.Tensor, routing: Routing, product: Product = grouped_gemm
) -> torch.Tensor:
    """Down product of every pair, weighed by its gate and summed over the pairs of a token.

    Args:
        h_PF: one row per pair, sorted by expert, floating dtype.
        w_EDF: one ``[D, F]`` matrix per expert, same dtype and device.
        routing: where the rows go, with what weight.
        product: as in :func:`expert_up`.

    Returns:
        y_ND in h's dtype. Differentiable once in h, w and ``routing.gates_NK``.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if h_PF.dim() != 2 or w_EDF.dim() != 3 or h_PF.shape[1] != w_EDF.shape[2]:
        raise ValueError(
            f"h {tuple(h_PF.shape)}, w {tuple(w_EDF.shape)}: expected [P, F] and [E, D, F]"
        )
    if routing.gates_NK.numel() != len(h_PF):
        raise ValueError(f"{routing.gates_NK.numel()} pairs were routed, h has {len(h_PF)} rows")
    _check_experts(h_PF, w_EDF, routing)
    if product is grouped_gemm and use_triton(h_PF):
        from kexa.kernels.experts.triton import expert_down as kernel

        return kernel(h_PF, w_EDF, routing)
    return reference.expert_down(h_PF, w_EDF, routing, product)


def _check_experts(x: torch.Tensor, w: torch.Tensor, routing: Routing) -> None:
    if len(routing.offsets_E) != len(w):
        raise ValueError(f"routed among {len(routing.offsets_E)} experts, w has {len(w)}")
    if x.dtype != w.dtype:
        raise ValueError(f"rows are {x.dtype} and w is {w.dtype}; cast them to one dtype")
