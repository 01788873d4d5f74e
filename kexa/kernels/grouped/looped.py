"""The PyTorch path: a loop over the experts that have rows, each product written where it belongs.

    y[rows of e] = x w_e^T        dx[rows of e] = dy w_e        dw_e = dy^T x

Outputs and gradients are allocated once. Left to autograd, the loop would keep a node per expert,
join its pieces in a copy and stack the gradients of the matrices in another. ``F.grouped_mm`` takes
neither fp64 nor broadcast gradients. All three are timed in ``benchmarks``.

Legend: N rows, D input features, F output features, E experts.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

Ranges = list[tuple[int, slice]]  # experts that have rows, each with its rows


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_EFD, ranges):
        ctx.save_for_backward(x_ND, w_EFD)
        ctx.ranges = ranges
        return _products(x_ND, w_EFD, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NF):
        x_ND, w_EFD = ctx.saved_tensors
        dx_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        dw_EFD = torch.zeros_like(w_EFD) if ctx.needs_input_grad[1] else None
        for e, rows in ctx.ranges:
            if dx_ND is not None:
                torch.mm(dy_NF[rows], w_EFD[e], out=dx_ND[rows])
            if dw_EFD is not None:
                torch.mm(dy_NF[rows].T, x_ND[rows], out=dw_EFD[e])
        return dx_ND, dw_EFD, None


def grouped_gemm(x_ND: torch.Tensor, w_EFD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """See :func:`kexa.kernels.grouped_gemm`."""
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    if ends[-1] != len(x_ND) or any(a > b for a, b in zip(starts, ends, strict=True)):
        raise ValueError(
            f"offsets {ends} must not decrease and must end at the {len(x_ND)} rows of x"
        )
    bounds = enumerate(zip(starts, ends, strict=True))
    ranges = [(e, slice(start, end)) for e, (start, end) in bounds if start < end]
    if not torch.is_grad_enabled():
        return _products(x_ND, w_EFD, ranges)
    return _GroupedGemm.apply(x_ND, w_EFD, ranges)


def _products(x_ND: torch.Tensor, w_EFD: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    y_NF = x_ND.new_empty(len(x_ND), w_EFD.shape[1])
    for e, rows in ranges:
        torch.mm(x_ND[rows], w_EFD[e].T, out=y_NF[rows])
    return y_NF
