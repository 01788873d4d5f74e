"""Grouped GEMM: every expert's matrix times the rows routed to it, whatever their number.

    y[n] = w[e(n)] @ x[n]          e(n): the expert whose row range holds n

Rows are sorted by expert; ``offsets_E[e]`` is the end of expert e's rows, so ranges may be empty,
ragged or hold every row, and no row is dropped or padded. reported: dropless routing, 128 experts,
8 per token.

Legend: N rows (token-expert pairs), D input features, F output features, E experts.
"""

from __future__ import annotations

import torch

from kexa.kernels.dispatch import use_triton
from kexa.kernels.grouped import looped


def grouped_gemm(x_ND: torch.Tensor, w_EFD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Rows of ``x_ND`` times the transposed matrix of their expert.

    Args:
        x_ND: rows sorted by expert, floating dtype.
        w_EFD: one ``[F, D]`` matrix per expert, same dtype and device.
        offsets_E: int32 cumulative ends, non-decreasing; the last must be N. It stays on the
        device: on a GPU it is
            never read by the host, so a wrong value is not noticed there.

    Returns:
        y_NF in x's dtype, accumulated in fp32 or better. Differentiable in x and w; an expert
        without rows gets a zero gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit together; on a CPU also offsets that do not end
        at N.
    """
    if x_ND.dim() != 2 or w_EFD.dim() != 3 or x_ND.shape[1] != w_EFD.shape[2]:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, w {tuple(w_EFD.shape)}: expected [N, D] and [E, F, D]"
        )
    if offsets_E.shape != w_EFD.shape[:1]:
        raise ValueError(
            f"offsets {tuple(offsets_E.shape)}: expected one end per expert, [{w_EFD.shape[0]}]"
        )
    if x_ND.dtype != w_EFD.dtype:
        raise ValueError(f"x is {x_ND.dtype} and w is {w_EFD.dtype}; cast them to one dtype")
    if use_triton(x_ND):
        from kexa.kernels.grouped.triton import grouped_gemm as kernel

        return kernel(x_ND, w_EFD, offsets_E)
    return looped.grouped_gemm(x_ND, w_EFD, offsets_E)
