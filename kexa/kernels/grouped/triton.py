"""Grouped GEMM in Triton: forward, gradient of the rows, gradient of the weights.

Rows. ``_rows`` computes y[n] = w[e(n)] x[n] for tiles of TM rows by TN outputs. Expert e owns
ceil(rows_e / TM) tiles; where they start is a prefix sum over the offsets, which every program
computes for itself (E numbers in registers). So the host never reads the offsets, and the grid is
the bound

    tiles <= floor(N / TM) + E        each expert leaves at most one tile partly filled

with programs past the last tile leaving at once. The gradient of the rows, dx[n] = w[e(n)]^T dy[n],
is the same kernel with the weight's two strides swapped.

Weights. ``_weights`` computes dw[e] = sum_n dy[n] x[n]^T over the rows of e for one tile of one
expert: the sum has a fixed order and one owner, so equal inputs give equal bits. An expert without
rows stores zeros.

Addresses are 64-bit: 128 experts of 4096 x 6144 are 3.2e9 numbers.

Legend: N rows, D input features, F output features, E experts; TM, TN, TK tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kexa.kernels.launch import Launch
from kexa.kernels.tiles import product_tiles, tile_of


@triton.jit
def find_tile(offsets, E, tile, BE: tl.constexpr, TM: tl.constexpr):
    """Expert, first row and end of its rows of one tile; past the last tile E or more, end 0."""
    expert = tl.arange(0, BE)
    end = tl.load(offsets + expert, expert < E, other=0)
    begin = tl.load(offsets + expert - 1, (expert > 0) & (expert < E), other=0)
    tiles_end = tl.cumsum(tl.where(expert < E, tl.cdiv(end - begin, TM), 0), 0)
    e = tl.sum((tiles_end <= tile).to(tl.int32), 0)  # experts whose tiles all come before this one
    tiles_before = tl.sum(tl.where(expert == e - 1, tiles_end, 0), 0)
    stop = tl.sum(tl.where(expert == e, end, 0), 0)
    first = tl.sum(tl.where(expert == e, begin, 0), 0) + (tile - tiles_before) * TM
    return e, first, stop


@triton.jit
def _rows(
    x, w, offsets, y,
    x_n, w_e, w_out, w_in, y_n,
    E, OUT, IN,
    BE: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(OUT, TN)
    e, first, stop = find_tile(offsets, E, tl.program_id(0) // columns, BE, TM)
    if e < E:
        row = first + tl.arange(0, TM)
        out = tl.program_id(0) % columns * TN + tl.arange(0, TN)
        inner = tl.arange(0, TK)
        x_rows = x + row.to(tl.int64)[:, None] * x_n
        w_rows = w + e.to(tl.int64) * w_e + out.to(tl.int64)[None, :] * w_out
        total = tl.zeros([TM, TN], ACC)
        for start in range(0, IN, TK):
            k = start + inner
            a = tl.load(x_rows + k[None, :], (row < stop)[:, None] & (k < IN)[None, :], other=0.0)
            b = tl.load(
                w_rows + k.to(tl.int64)[:, None] * w_in,
                (k < IN)[:, None] & (out < OUT)[None, :],
                other=0.0,
            )
            total += tl.dot(a, b, input_precision="ieee")
        inside = (row < stop)[:, None] & (out < OUT)[None, :]
        y_rows = y + row.to(tl.int64)[:, None] * y_n + out[None, :]
        tl.store(y_rows, total.to(y.dtype.element_ty), inside)


@triton.jit
def _weights(
    dy, x, offsets, dw,
    dy_n, x_n, dw_e, dw_f,
    F, D,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    columns = tl.cdiv(D, TN)
    f = tl.program_id(0) // columns * TM + tl.arange(0, TM)
    d = tl.program_id(0) % columns * TN + tl.arange(0, TN)
    stop = tl.load(offsets + e)
    begin = tl.load(offsets + e - 1, e > 0, other=0)
    total = tl.zeros([TM, TN], ACC)
    for start in range(begin, stop, TK):
        row = start + tl.arange(0, TK)
        at = row.to(tl.int64)
        a = tl.load(
            dy + at[None, :] * dy_n + f[:, None],
            (f < F)[:, None] & (row < stop)[None, :],
            other=0.0,
        )
        b = tl.load(
            x + at[:, None] * x_n + d[None, :], (row < stop)[:, None] & (d < D)[None, :], other=0.0
        )
        total += tl.dot(a, b, input_precision="ieee")
    dw_rows = dw + e.to(tl.int64) * dw_e + f.to(tl.int64)[:, None] * dw_f + d[None, :]
    tl.store(dw_rows, total.to(dw.dtype.element_ty), (f < F)[:, None] & (d < D)[None, :])


def rows_launch(x, w, offsets, y, transpose: bool) -> Launch:
    """Launch that fills ``y = x w[e]^T``, or ``y = x w[e]`` if ``transpose`` (rows' gradient)."""
    N, (E, out, inner), tile = len(x), w.shape, tile_of("grouped rows", x)
    w_e, w_out, w_in = w.stride()
    if transpose:
        out, inner, w_out, w_in = inner, out, w_in, w_out
    strides = (x.stride(0), w_e, w_out, w_in, y.stride(0))
    arguments = (x, w, offsets, y, *strides, E, out, inner, triton.next_power_of_2(E))
    arguments += product_tiles(tile, x)
    tiles = (N // tile.TM + E) * triton.cdiv(out, tile.TN) if N else 0
    return Launch(_rows, (tiles,), arguments, tile.warps, tile.stages)


def weights_launch(dy, x, offsets, dw) -> Launch:
    """Launch that fills ``dw[e] = dy^T x`` over the rows of each expert."""
    (E, F, D), tile = dw.shape, tile_of("grouped weights", x)
    strides = (dy.stride(0), x.stride(0), dw.stride(0), dw.stride(1))
    arguments = (dy, x, offsets, dw, *strides, F, D, *product_tiles(tile, x))
    tiles = triton.cdiv(F, tile.TM) * triton.cdiv(D, tile.TN)
    return Launch(_weights, (tiles, E), arguments, tile.warps, tile.stages)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets):
        y = x.new_empty(x.shape[0], w.shape[1])
        rows_launch(x, w, offsets, y, transpose=False).run()
        ctx.save_for_backward(x, w, offsets)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, offsets = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            rows_launch(dy, w, offsets, dx, transpose=True).run()
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(w)
            weights_launch(dy, x, offsets, dw).run()
        return dx, dw, None


def grouped_gemm(x_ND: torch.Tensor, w_EFD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """See :func:`kexa.kernels.grouped_gemm`."""
    return _GroupedGemm.apply(x_ND.contiguous(), w_EFD.contiguous(), offsets_E.to(torch.int32))
