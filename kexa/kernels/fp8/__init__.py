"""FP8 quantisation and the products of quantised operands, dense and grouped.

A linear layer of E experts has three products. Along the axis that a product contracts, every 128
numbers share a scale:

    y  = x w^T      x: quantize_rows      w: quantize_blocks             scaled_gemm
    dx = dy w       dy: quantize_rows     w: the same codes, transposed  scaled_gemm
    dw = dy^T x     dy: quantize_tokens   x: quantize_tokens             scaled_weight_gemm

    scale = max(amax(tile), 2^-100) / 448,   code = E4M3(x / scale),   value = code * scale

A product runs over blocks of 128. Each block's product of codes is multiplied by the scales of both
operands and added to a sum in fp32 (the tensor core's own sum keeps fewer bits). A dense product is
the grouped one of a single expert.

reported: native FP8 training. not reported: which. chosen: DeepSeek-V3's tiles (arXiv 2412.19437).
chosen: the smallest amax, 2^-100, only keeps a tile of zeros from a division by zero; a floor of
1e-4, as others have, would give most gradients of a mean loss one constant scale.
chosen: tokens of different experts never share a tile. For the gradient of the weights each
expert's tokens therefore start a new tile, and codes lie feature by feature with gaps of zeros up
to whole tiles: the product then reads whole, aligned tiles only. chosen: scales lie tile by tile,
so that a product reads those of its rows from neighbouring addresses.

Legend: N tokens (rows), D inputs, F outputs, E experts, T tiles of 128 tokens, P = 128 T padded
tokens, B and C blocks of 128 features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kexa.kernels.dispatch import interpreting, use_triton
from kexa.kernels.fp8 import reference
from kexa.runtime import has_fp8


class Scaled(NamedTuple):
    """A matrix in FP8: ``codes`` in ``torch.float8_e4m3fn``, ``scales`` in fp32."""

    codes: Tensor
    scales: Tensor


def quantize_rows(x_ND: Tensor) -> Scaled:
    """One scale per row and 128 columns.

    Args:
        x_ND: floating dtype; computed in fp32.

    Returns:
        codes_ND and scales_BN, B = ceil(D / 128). A code of zero is +0.

    Raises:
        ValueError: not a matrix.
    """
    _check_matrix(x_ND)
    return Scaled(*_implementation(x_ND).quantize_rows(x_ND))


def quantize_tokens(x_ND: Tensor, offsets_E: Tensor) -> Scaled:
    """One scale per column and 128 tokens; tiles start anew at every expert's first row.

    Args:
        x_ND: rows sorted by expert, floating dtype; computed in fp32. offsets_E: int32 cumulative
        ends as :func:`kexa.kernels.grouped_gemm` takes them.

    Returns:
        codes_DP and scales_TD, transposed: expert e has the next ceil(rows_e / 128) tiles, what a
        tile does not fill is zero. T = floor(N / 128) + E bounds their number whatever the offsets;
        unused tiles come last and are zero.

    Raises:
        ValueError: not a matrix.
    """
    _check_matrix(x_ND)
    return Scaled(*_implementation(x_ND).quantize_tokens(x_ND, offsets_E))


def quantize_blocks(w_EFD: Tensor) -> Scaled:
    """One scale per block of 128 x 128.

    Args:
        w_EFD: one matrix per expert, floating dtype; computed in fp32.

    Returns:
        codes_EFD and scales_EBC, B = ceil(F / 128), C = ceil(D / 128).

    Raises:
        ValueError: not a stack of matrices.
    """
    if w_EFD.dim() != 3:
        raise ValueError(f"w {tuple(w_EFD.shape)}: expected [E, F, D]; use w[None] for one matrix")
    return Scaled(*_implementation(w_EFD).quantize_blocks(w_EFD))


def transposed(w: Scaled) -> Scaled:
    """The codes of every block, transposed: exact, because a block's scale belongs to all of it."""
    return Scaled(*_implementation(w.scales).transposed(*w))


def scaled_gemm(
    x: Scaled, w: Scaled, offsets_E: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows of ``x`` times the transposed matrix of their expert.

    Args:
        x: of :func:`quantize_rows`, sorted by expert. w: of :func:`quantize_blocks`.
        offsets_E: int32 cumulative ends; ``[N]`` for a dense product. dtype: of the result.

    Returns:
        y_NF, summed in fp32.

    Raises:
        ValueError: codes that do not fit together.
    """
    if x.codes.shape[1] != w.codes.shape[2] or offsets_E.shape != w.codes.shape[:1]:
        raise ValueError(
            f"codes of x {tuple(x.codes.shape)}, of w {tuple(w.codes.shape)}, offsets "
            f"{tuple(offsets_E.shape)}: expected [N, D], [E, F, D] and [E]"
        )
    return _implementation(x.scales, dtype).scaled_gemm(x, w, offsets_E, dtype)


def scaled_weight_gemm(
    dy: Scaled, x: Scaled, offsets_E: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Gradient of every expert's matrix: ``dy^T x`` over its tokens.

    Args:
        dy, x: of :func:`quantize_tokens`, with these offsets. dtype: of the result.

    Returns:
        dw_EFD, summed in fp32; zero for an expert without rows.

    Raises:
        ValueError: codes that do not fit together.
    """
    if dy.codes.shape[1] != x.codes.shape[1]:
        raise ValueError(
            f"codes of dy {tuple(dy.codes.shape)} and x {tuple(x.codes.shape)}: expected [F, P] "
            "and [D, P]; quantise both with the same offsets"
        )
    return _implementation(x.scales, dtype).scaled_weight_gemm(dy, x, offsets_E, dtype)


def _implementation(tensor: Tensor, dtype: torch.dtype = torch.float32):
    """The Triton kernels on a chip with FP8 (and when interpreting), else the reference."""
    if use_triton(tensor.new_empty(0, dtype=dtype)) and (interpreting() or has_fp8(tensor.device)):
        from kexa.kernels.fp8 import triton

        return triton
    return reference


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x {tuple(x.shape)}: expected [N, D]; flatten the leading axes")
