"""The experts' products in Triton: rows gathered as they are read, scattered as they are stored.

Tiles are those of :mod:`kexa.kernels.grouped.triton`: TM rows of one expert, found by a prefix sum
over the offsets in every program, so the host reads nothing. ``order[p]`` is the pair of the sorted
row p, and ``order[p] // K`` its token.

    up        h[p] = silu(gate) * up          rows of x gathered; gate and up in registers
    scatter   pairs[order[p]] = g W h[p]      row order[p] is written by one program only
              y[t] = sum of pairs[t K ... t K + K - 1], a sum along an axis

Backward, with e the expert and t the token of row p:

    back      s[p] = W_e^T dy[t]              rows of dy gathered
              dh[p] = g s[p]
              dg = <h[p], s[p]>               equal to <W h[p], dy[t]>, of which nothing was kept;
                                              one part per tile of F, stored at the pair, summed
    weights   dW_e = sum of (g dy[t]) h[p]^T, dW_up_e = sum of d_gate_up[p] x[t]^T
    scatter   dx = sum over the pairs of t of W_up_e^T d_gate_up[p]

Nothing depends on the order in which programs run: no atomics, equal inputs give equal bits.

Bytes beside weights, in 16-bit numbers per pair, forward in training, with fp32 gates:

    up      3D + 5F            gather 2D, product D + 2F, SwiGLU 3F
            D + 3F             fused (``costs.expert_up``)
    down    F + 8D + 5D / K    product F + D, back to pairs 2D, weigh 3D, sum 2D + 2D / K,
                               round 3D / K
            F + 2D + D / K     fused (``costs.expert_down``)

At the published shapes and 8,192 tokens, weights included: up 8.1 GB instead of 10.2, down 5.2
instead of 10.4. Then arithmetic sets the least time of an H100 in both; of the separate down
operations memory would. Measured on an H200, forward and backward: 40.1 ms fused, 38.8 separate
(benchmarks/results/nvidia-h200): what the copies save, the gathers lose inside the products. Fused,
2D per pair less is kept.

For the backward pass gate, up and h are kept, 3F per pair; the gathered rows and the products
before they are weighed, 2D per pair, are not. Atomic adds into y would need fp32: 4D read and
written per pair where ``pairs`` takes 2D. Weighing on the reading side, by way of the inverse
order, moves as much as this; stored at the pair, the rows of a token lie together.

Departure from the separate operations in 16-bit types: a row is weighed before it is rounded.
Gate and up are rounded before SwiGLU as they are there, for they are kept so and the backward pass
must differentiate what the forward pass computed.

Legend: N tokens, D hidden size, F expert inner size, E experts, K experts per token, P = N * K
pairs; TM, TN, TK tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kexa.kernels.glu.triton import backward_launch as swiglu_backward_launch
from kexa.kernels.grouped.triton import find_tile
from kexa.kernels.launch import Launch
from kexa.kernels.routing import Routing
from kexa.kernels.tiles import product_tiles, tile_of


@triton.jit
def _up(
    x, gate_w, up_w, order, offsets, gate_up, h,
    w_e, E, F, D, K,
    BE: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, TN)
    e, first, stop = find_tile(offsets, E, tl.program_id(0) // columns, BE, TM)
    if e < E:
        row = (first + tl.arange(0, TM)).to(tl.int64)
        f = tl.program_id(0) % columns * TN + tl.arange(0, TN)
        token = tl.load(order + row, row < stop, other=0) // K
        column = e.to(tl.int64) * w_e + f.to(tl.int64)[None, :] * D
        gate = tl.zeros([TM, TN], ACC)
        up = tl.zeros([TM, TN], ACC)
        for start in range(0, D, TK):
            k = start + tl.arange(0, TK)
            a = tl.load(
                x + token[:, None] * D + k[None, :],
                (row < stop)[:, None] & (k < D)[None, :],
                other=0.0,
            )
            inside = (k < D)[:, None] & (f < F)[None, :]
            gate_b = tl.load(gate_w + column + k[:, None], inside, other=0.0)
            up_b = tl.load(up_w + column + k[:, None], inside, other=0.0)
            gate += tl.dot(a, gate_b, input_precision="ieee")
            up += tl.dot(a, up_b, input_precision="ieee")
        inside = (row < stop)[:, None] & (f < F)[None, :]
        rounded_gate, rounded_up = gate.to(h.dtype.element_ty), up.to(h.dtype.element_ty)
        if gate_up is not None:
            kept = gate_up + row[:, None] * (2 * F) + f[None, :]
            tl.store(kept, rounded_gate, inside)
            tl.store(kept + F, rounded_up, inside)
        a, b = rounded_gate.to(ACC), rounded_up.to(ACC)
        y = a / (1.0 + tl.exp(-a)) * b
        tl.store(h + row[:, None] * F + f[None, :], y.to(h.dtype.element_ty), inside)


@triton.jit
def _product(
    rows, row_inside, columns, column_inside, w_in, IN,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows, pointers [TM, 1], times columns of a weight, pointers [1, TN], over IN numbers."""
    total = tl.zeros([TM, TN], ACC)
    for start in range(0, IN, TK):
        k = start + tl.arange(0, TK)
        a = tl.load(rows + k[None, :], row_inside[:, None] & (k < IN)[None, :], other=0.0)
        b = tl.load(
            columns + k.to(tl.int64)[:, None] * w_in,
            (k < IN)[:, None] & column_inside[None, :],
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee")
    return total


@triton.jit
def _scatter(
    rows, w, gates, order, offsets, pairs,
    w_e, w_out, w_in, E, OUT, IN,
    BE: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(OUT, TN)
    e, first, stop = find_tile(offsets, E, tl.program_id(0) // columns, BE, TM)
    if e < E:
        row = (first + tl.arange(0, TM)).to(tl.int64)
        out = tl.program_id(0) % columns * TN + tl.arange(0, TN)
        w_columns = w + e.to(tl.int64) * w_e + out.to(tl.int64)[None, :] * w_out
        total = _product(
            rows + row[:, None] * IN, row < stop, w_columns, out < OUT, w_in, IN, TM, TN, TK, ACC
        )
        pair = tl.load(order + row, row < stop, other=0)
        if gates is not None:
            total *= tl.load(gates + pair, row < stop, other=0.0).to(ACC)[:, None]
        inside = (row < stop)[:, None] & (out < OUT)[None, :]
        at = pairs + pair[:, None] * OUT + out[None, :]
        tl.store(at, total.to(pairs.dtype.element_ty), inside)


@triton.jit
def _back(
    dy, w, h, gates, order, offsets, dh, parts,
    w_e, E, F, D, K, P,
    BE: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, TN)
    e, first, stop = find_tile(offsets, E, tl.program_id(0) // columns, BE, TM)
    if e < E:
        row = (first + tl.arange(0, TM)).to(tl.int64)
        column = tl.program_id(0) % columns
        f = column * TN + tl.arange(0, TN)
        pair = tl.load(order + row, row < stop, other=0)
        dy_rows = dy + (pair // K)[:, None] * D
        w_columns = w + e.to(tl.int64) * w_e + f[None, :]
        total = _product(dy_rows, row < stop, w_columns, f < F, F, D, TM, TN, TK, ACC)
        inside = (row < stop)[:, None] & (f < F)[None, :]
        at = row[:, None] * F + f[None, :]
        values = tl.load(h + at, inside, other=0.0).to(ACC)
        part = parts + column.to(tl.int64) * P + pair
        tl.store(part, tl.sum(total * values, 1), row < stop)
        weight = tl.load(gates + pair, row < stop, other=0.0).to(ACC)
        tl.store(dh + at, (total * weight[:, None]).to(dh.dtype.element_ty), inside)


@triton.jit
def _weights(
    rows, tokens, gates, order, offsets, dw,
    dw_e, dw_r, dw_t, R, T, K,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one expert, the sum of row times token, R numbers by T: one tile of it."""
    e = tl.program_id(1)
    columns = tl.cdiv(T, TN)
    r = tl.program_id(0) // columns * TM + tl.arange(0, TM)
    t = tl.program_id(0) % columns * TN + tl.arange(0, TN)
    stop = tl.load(offsets + e)
    begin = tl.load(offsets + e - 1, e > 0, other=0)
    total = tl.zeros([TM, TN], ACC)
    for start in range(begin, stop, TK):
        row = (start + tl.arange(0, TK)).to(tl.int64)
        pair = tl.load(order + row, row < stop, other=0)
        a = tl.load(
            rows + row[None, :] * R + r[:, None],
            (r < R)[:, None] & (row < stop)[None, :],
            other=0.0,
        )
        if gates is not None:
            weight = tl.load(gates + pair, row < stop, other=0.0)
            a = (a * weight[None, :]).to(rows.dtype.element_ty)
        b = tl.load(
            tokens + (pair // K)[:, None] * T + t[None, :],
            (row < stop)[:, None] & (t < T)[None, :],
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee")
    at = (
        dw + e.to(tl.int64) * dw_e + r.to(tl.int64)[:, None] * dw_r + t.to(tl.int64)[None, :] * dw_t
    )
    tl.store(at, total.to(dw.dtype.element_ty), (r < R)[:, None] & (t < T)[None, :])


def up_launch(x, w, order, offsets, gate_up, h, top_k: int) -> Launch:
    """Launch that fills ``h [P, F]`` and, unless it is None, ``gate_up [P, 2F]``."""
    (P, F), E, D, tile = h.shape, len(w), x.shape[1], tile_of("experts up", x)
    sizes = (w.stride(0), E, F, D, top_k, triton.next_power_of_2(E))
    arguments = (x, *w.chunk(2, dim=1), order, offsets, gate_up, h, *sizes)
    arguments += product_tiles(tile, x)
    return Launch(_up, (_count(P, E, F, tile),), arguments, tile.warps, tile.stages)


def scatter_launch(rows, w, gates, order, offsets, pairs, transpose: bool) -> Launch:
    """Launch that fills ``pairs [P, OUT]`` with ``rows w[e]^T``, or ``rows w[e]`` if ``transpose``.

    Row p goes to ``order[p]``, times its gate unless ``gates`` is None.
    """
    (E, out, inner), tile = w.shape, tile_of("experts scatter", rows)
    w_e, w_out, w_in = w.stride()
    if transpose:
        out, inner, w_out, w_in = inner, out, w_in, w_out
    sizes = (w_e, w_out, w_in, E, out, inner, triton.next_power_of_2(E))
    arguments = (rows, w, gates, order, offsets, pairs, *sizes, *product_tiles(tile, rows))
    grid = (_count(len(rows), E, out, tile),)
    return Launch(_scatter, grid, arguments, tile.warps, tile.stages)


def back_launch(dy, w, h, gates, order, offsets, dh, parts) -> Launch:
    """Launch that fills ``dh [P, F]`` and ``parts [tiles of F, P]``, gradients of the gates."""
    (P, F), E, D, tile = h.shape, len(w), dy.shape[1], tile_of("experts back", dy)
    sizes = (w.stride(0), E, F, D, gates.shape[1], P, triton.next_power_of_2(E))
    arguments = (dy, w, h, gates, order, offsets, dh, parts, *sizes, *product_tiles(tile, dy))
    return Launch(_back, (_count(P, E, F, tile),), arguments, tile.warps, tile.stages)


def weights_launch(rows, tokens, gates, order, offsets, dw, top_k: int, transpose: bool) -> Launch:
    """Launch that fills ``dw[e] = rows^T tokens``, or its transpose, over the pairs of each expert.

    ``rows [P, R]`` are weighed by ``gates`` unless that is None; ``tokens [N, T]`` are gathered.
    """
    R, T, tile = rows.shape[1], tokens.shape[1], tile_of("experts weights", rows)
    dw_e, dw_r, dw_t = dw.stride()
    if transpose:
        dw_r, dw_t = dw_t, dw_r
    arguments = (rows, tokens, gates, order, offsets, dw, dw_e, dw_r, dw_t, R, T, top_k)
    arguments += product_tiles(tile, rows)
    tiles = triton.cdiv(R, tile.TM) * triton.cdiv(T, tile.TN)
    return Launch(_weights, (tiles, len(dw)), arguments, tile.warps, tile.stages)


def _count(P: int, E: int, out: int, tile) -> int:
    """Programs of a kernel over all rows: each expert leaves at most one tile partly filled."""
    return (P // tile.TM + E) * triton.cdiv(out, tile.TN) if P else 0


def _sum_of_pairs(pairs: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[P, D]`` to ``[N, D]``; PyTorch sums 16-bit numbers in fp32."""
    return pairs.unflatten(0, (len(pairs) // top_k, top_k)).sum(1)


class _ExpertUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, order, offsets, top_k, keep):
        F = w.shape[1] // 2
        h = x.new_empty(len(order), F)
        gate_up = x.new_empty(len(order), 2 * F) if keep else None
        up_launch(x, w, order, offsets, gate_up, h, top_k).run()
        ctx.save_for_backward(x, w, order, offsets, gate_up)
        ctx.top_k = top_k
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        x, w, order, offsets, gate_up = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        halves = (*gate_up.chunk(2, dim=-1), dh.contiguous(), *d_gate_up.chunk(2, dim=-1))
        swiglu_backward_launch(*halves).run()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            pairs = x.new_empty(len(order), x.shape[1])
            scatter_launch(d_gate_up, w, None, order, offsets, pairs, transpose=True).run()
            dx = _sum_of_pairs(pairs, ctx.top_k)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(w)
            weights_launch(d_gate_up, x, None, order, offsets, dw, ctx.top_k, transpose=False).run()
        return dx, dw, None, None, None, None


class _ExpertDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, gates, order, offsets):
        pairs = h.new_empty(len(h), w.shape[1])
        scatter_launch(h, w, gates, order, offsets, pairs, transpose=False).run()
        ctx.save_for_backward(h, w, gates, order, offsets)
        return _sum_of_pairs(pairs, gates.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, w, gates, order, offsets = ctx.saved_tensors
        needs_h, needs_w, needs_gates = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        dh = dw = dgates = None
        if needs_h or needs_gates:
            wide = torch.float64 if h.dtype == torch.float64 else torch.float32
            dh = torch.empty_like(h)
            tiles = triton.cdiv(h.shape[1], tile_of("experts back", h).TN)
            parts = h.new_empty(tiles, len(h), dtype=wide)
            back_launch(dy, w, h, gates, order, offsets, dh, parts).run()
            dgates = parts.sum(0).to(gates.dtype).view_as(gates)
        if needs_w:
            dw = torch.empty_like(w)
            weights_launch(h, dy, gates, order, offsets, dw, gates.shape[1], transpose=True).run()
        return dh, dw, dgates, None, None


def expert_up(x_ND: torch.Tensor, w_EGD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """See :func:`kexa.kernels.expert_up`."""
    keep = torch.is_grad_enabled() and (x_ND.requires_grad or w_EGD.requires_grad)
    places = (routing.order_P, routing.offsets_E, routing.chosen_NK.shape[1])
    return _ExpertUp.apply(x_ND.contiguous(), w_EGD.contiguous(), *places, keep)


def expert_down(h_PF: torch.Tensor, w_EDF: torch.Tensor, routing: Routing) -> torch.Tensor:
    """See :func:`kexa.kernels.expert_down`."""
    gates_NK, places = routing.gates_NK.contiguous(), (routing.order_P, routing.offsets_E)
    return _ExpertDown.apply(h_PF.contiguous(), w_EDF.contiguous(), gates_NK, *places)
