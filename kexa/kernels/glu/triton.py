"""SwiGLU in Triton, forward and backward: every number is read once, nothing kept in between.

With s = sigmoid(gate),

    y = gate s up        dgate = dy up s (1 + gate (1 - s))        dup = dy gate s

The backward pass computes s again from the gate: that is cheaper than reading it.

Departure from PyTorch in 16-bit types: silu(gate) is not rounded before the product.

Legend: N rows, F features; R rows and BF features per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kexa.kernels.launch import Launch


@triton.jit
def _tile(columns, R: tl.constexpr, BF: tl.constexpr):
    """Rows and features of this program's tile."""
    row = tl.program_id(0) // columns * R + tl.arange(0, R)
    feature = tl.program_id(0) % columns * BF + tl.arange(0, BF)
    return row.to(tl.int64)[:, None], feature[None, :]


@triton.jit
def _swiglu(
    gate, up, y,
    gate_n, up_n,
    N, F,
    R: tl.constexpr, BF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row, feature = _tile(tl.cdiv(F, BF), R, BF)
    inside = (row < N) & (feature < F)
    a = tl.load(gate + row * gate_n + feature, inside, other=0.0).to(ACC)
    b = tl.load(up + row * up_n + feature, inside, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-a))
    tl.store(y + row * F + feature, (a * s * b).to(y.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    gate, up, dy, dgate, dup,
    gate_n, up_n, d_n,
    N, F,
    R: tl.constexpr, BF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row, feature = _tile(tl.cdiv(F, BF), R, BF)
    inside = (row < N) & (feature < F)
    a = tl.load(gate + row * gate_n + feature, inside, other=0.0).to(ACC)
    b = tl.load(up + row * up_n + feature, inside, other=0.0).to(ACC)
    d = tl.load(dy + row * F + feature, inside, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-a))
    d_a, d_b = d * b * s * (1.0 + a * (1.0 - s)), d * a * s
    tl.store(dgate + row * d_n + feature, d_a.to(dgate.dtype.element_ty), inside)
    tl.store(dup + row * d_n + feature, d_b.to(dup.dtype.element_ty), inside)


def forward_launch(gate, up, y) -> Launch:
    """Launch that fills ``y [N, F]``."""
    return _launch(_swiglu, (gate, up, y), (gate.stride(0), up.stride(0)))


def backward_launch(gate, up, dy, dgate, dup) -> Launch:
    """Launch that fills ``dgate`` and ``dup``, whose rows are equally far apart."""
    strides = (gate.stride(0), up.stride(0), dgate.stride(0))
    return _launch(_swiglu_backward, (gate, up, dy, dgate, dup), strides)


def _launch(kernel, tensors: tuple[torch.Tensor, ...], strides: tuple[int, ...]) -> Launch:
    gate = tensors[0]
    (N, F), tile = gate.shape, _tiles(gate)
    arguments = (*tensors, *strides, N, F, *tile)
    tiles = triton.cdiv(N, tile.R) * triton.cdiv(F, tile.BF)
    return Launch(kernel, (tiles,), arguments, warps=4, stages=1)


class _Tiles(NamedTuple):
    R: int
    BF: int
    ACC: object


def _tiles(gate: torch.Tensor) -> _Tiles:
    """2048 numbers, of as few rows as give them: the published inner size is one row."""
    width = min(2048, triton.next_power_of_2(gate.shape[1]))
    return _Tiles(2048 // width, width, tl.float64 if gate.dtype == torch.float64 else tl.float32)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        y = gate.new_empty(gate.shape)
        forward_launch(gate, up, y).run()
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = dy.new_empty(dy.shape), dy.new_empty(dy.shape)
        backward_launch(gate, up, dy.contiguous(), dgate, dup).run()
        return dgate, dup


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See :func:`kexa.kernels.swiglu`."""
    gate_NF, up_NF = (_features_contiguous(x.reshape(-1, x.shape[-1])) for x in (gate, up))
    return _SwiGLU.apply(gate_NF, up_NF).view(gate.shape)


def _features_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
