"""RMSNorm in Triton: each row is read once forward, and x and dy once backward.

Forward. A program holds R whole rows; beside y it leaves r = 1 / sqrt(mean(x^2) + eps), one number
per row. Backward, with n = x r and g = dy w,

    dx = r (g - n mean(g n))        dw = sum over rows of dy round(n)

``_rms_norm_backward`` starts at most PROGRAMS programs. Each walks every PROGRAMS-th tile of rows
and keeps its share of dw in registers; the shares are summed afterwards in a fixed order. So there
are no atomics, and equal inputs give equal bits.

Departure from PyTorch in 16-bit types: dy w is not rounded before dx is computed from it.

Legend: N rows, D features; BD = D rounded up to a power of two; R rows per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kexa.kernels.launch import Launch

PROGRAMS = 256  # about two for each multiprocessor of an H100, whose sums cost 4% of the bytes


@triton.jit
def _rms_norm(
    x, w, y, scales, eps,
    N, D,
    R: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row, feature = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BD)
    at = row.to(tl.int64)[:, None] * D + feature[None, :]
    inside = (row < N)[:, None] & (feature < D)[None, :]
    values = tl.load(x + at, inside, other=0.0).to(ACC)
    weight = tl.load(w + feature, feature < D, other=0.0).to(ACC)
    r = 1.0 / tl.sqrt(tl.sum(values * values, 1) / D + eps)
    normed = (values * r[:, None]).to(y.dtype.element_ty).to(ACC)
    tl.store(y + at, (normed * weight[None, :]).to(y.dtype.element_ty), inside)
    tl.store(scales + row, r, row < N)


@triton.jit
def _rms_norm_backward(
    x, w, scales, dy, dx, dw,
    N, D,
    R: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, BD)
    weight = tl.load(w + feature, feature < D, other=0.0).to(ACC)
    total = tl.zeros([BD], ACC)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * D + feature[None, :]
        inside = (row < N)[:, None] & (feature < D)[None, :]
        r = tl.load(scales + row, row < N, other=0.0)[:, None]
        normed = tl.load(x + at, inside, other=0.0).to(ACC) * r
        d = tl.load(dy + at, inside, other=0.0).to(ACC)
        g = d * weight[None, :]
        mean = tl.sum(g * normed, 1) / D
        tl.store(dx + at, (r * (g - normed * mean[:, None])).to(dx.dtype.element_ty), inside)
        total += tl.sum(d * normed.to(x.dtype.element_ty).to(ACC), 0)
    tl.store(dw + tl.program_id(0).to(tl.int64) * D + feature, total, feature < D)


def forward_launch(x, w, y, scales, eps: float) -> Launch:
    """Launch that fills ``y [N, D]`` and ``scales [N]``, which the backward pass reads."""
    (N, D), tile = x.shape, _tiles(x)
    arguments = (x, w, y, scales, eps, N, D, *tile)
    return Launch(_rms_norm, (triton.cdiv(N, tile.R),), arguments, warps=8, stages=1)


def backward_launch(x, w, scales, dy, dx, dw) -> Launch:
    """Launch that fills ``dx`` and ``dw [shares(x), D]``, whose sum is the weight's gradient."""
    (N, D), tile = x.shape, _tiles(x)
    arguments = (x, w, scales, dy, dx, dw, N, D, *tile)
    return Launch(_rms_norm_backward, (shares(x),), arguments, warps=16, stages=1)


def shares(x: torch.Tensor) -> int:
    """Programs of the backward pass over ``x [N, D]``."""
    return min(PROGRAMS, triton.cdiv(len(x), _tiles(x).R))


class _Tiles(NamedTuple):
    R: int
    BD: int
    ACC: object


def _tiles(x: torch.Tensor) -> _Tiles:
    """Whole rows, as many as make 2048 numbers: a sum never leaves its program."""
    width = triton.next_power_of_2(x.shape[1])
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return _Tiles(max(1, 2048 // width), width, acc)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y, scales = torch.empty_like(x), x.new_empty(len(x), dtype=wide)
        forward_launch(x, w, y, scales, eps).run()
        ctx.save_for_backward(x, w, scales)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, scales = ctx.saved_tensors
        dx, dw = torch.empty_like(x), scales.new_empty(shares(x), x.shape[1])
        backward_launch(x, w, scales, dy.contiguous(), dx, dw).run()
        return dx, dw.sum(0).to(w.dtype), None


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`kexa.kernels.rms_norm`."""
    outer = sorted(range(x.dim() - 1), key=lambda axis: -x.stride(axis))  # as the rows lie
    placed = x.permute(*outer, -1)
    rows_ND = placed.reshape(-1, x.shape[-1]).contiguous()  # no copy where rows lie densely
    y_ND = _RMSNorm.apply(rows_ND, weight_D.contiguous(), eps)
    back = sorted(range(len(outer)), key=outer.__getitem__)
    return y_ND.view(placed.shape).permute(*back, -1)
