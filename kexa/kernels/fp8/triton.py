"""FP8 in Triton: three quantisers and two products.

Quantisers. One program owns whole tiles: it finds the largest magnitude, divides by the scale and
rounds. Division is IEEE's (``div_rn``) and rounding to E4M3 is done in fp32 as in ``emulated.py``,
so codes equal the emulation's bit for bit; the cast to the format that follows is exact. (A NaN
keeps to its own code here, where the emulation spreads it over its tile.)

``_gemm``. y[n] = w[e(n)] x[n] for a tile of TM rows by 128 outputs, tiles found as in
``kexa.kernels.grouped``. A block of 128 inputs is one product of codes, which starts from zero:

    total += (x codes . w codes) * x scale[n] * w scale[block]

``_weight_gemm``. dw[e] = sum_n dy[n] x[n]^T for one tile of one expert, over that expert's tiles of
128 tokens. Both operands have a scale per feature and tile:

    total += (dy codes . x codes) * dy scale[f] * x scale[d]

FP8 tensor cores of Hopper contract the last axis of both operands only, hence the layouts: w is
transposed in memory for dx, and tokens are transposed by the quantiser for dw.

Legend: N tokens, D inputs, F outputs, E experts, T tiles of 128 tokens, P = 128 T; TM, TN, TK, TR
tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kexa.kernels.fp8.emulated import E4M3_MAX, SMALLEST_AMAX, SMALLEST_NORMAL, TILE
from kexa.kernels.fp8.reference import tiles_bound
from kexa.kernels.grouped.triton import find_tile
from kexa.kernels.launch import Launch
from kexa.kernels.tiles import tile_of

ROWS = 32  # rows of 128, or columns of 128 tokens, that one program quantises
TURNED = 64  # rows and columns that one program transposes

_TILE = tl.constexpr(TILE)
_MAX = tl.constexpr(E4M3_MAX)
_SMALLEST = tl.constexpr(SMALLEST_AMAX)
_NORMAL = tl.constexpr(SMALLEST_NORMAL)


@triton.jit
def _scale(amax):
    return tl.div_rn(tl.maximum(amax, _SMALLEST), _MAX)


@triton.jit
def _encode(x, scale):
    """Codes of fp32 numbers; ``scale`` has the shape of ``x``."""
    q = tl.div_rn(x, scale)
    exponent = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(exponent, _NORMAL) * 1572864.0  # 1.5 * 2^20
    return (q + magic - magic).to(tl.float8e4nv)


@triton.jit
def _quantize_rows(x, codes, scales, x_n, N, D, TR: tl.constexpr):
    row = tl.program_id(0) * TR + tl.arange(0, TR)
    block = tl.program_id(1)
    d = block * _TILE + tl.arange(0, _TILE)
    inside = (row < N)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None]
    values = tl.load(x + at * x_n + d[None, :], inside, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(values), 1))
    code = _encode(values, tl.broadcast_to(scale[:, None], [TR, _TILE]))
    tl.store(codes + at * D + d[None, :], code, inside)
    tl.store(scales + block.to(tl.int64) * N + row, scale, row < N)


@triton.jit
def _quantize_tokens(
    x, offsets, codes, scales, x_n, D, P, E, BE: tl.constexpr, TR: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0)
    _, first, stop = find_tile(offsets, E, tile, BE, _TILE)
    i = tl.arange(0, _TILE)
    row, d = first + i, tl.program_id(1) * TR + tl.arange(0, TR)
    inside = (row < stop)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None]
    values = tl.load(x + at * x_n + d[None, :], inside, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(values), 0))
    code = tl.trans(_encode(values, tl.broadcast_to(scale[None, :], [_TILE, TR])))
    column = tile.to(tl.int64) * _TILE + i
    tl.store(codes + d.to(tl.int64)[:, None] * P + column[None, :], code, (d < D)[:, None])
    tl.store(scales + tile.to(tl.int64) * D + d, scale, d < D)


@triton.jit
def _quantize_blocks(w, codes, scales, w_e, w_f, F, D):
    e, b, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    f, d = b * _TILE + tl.arange(0, _TILE), c * _TILE + tl.arange(0, _TILE)
    inside = (f < F)[:, None] & (d < D)[None, :]
    at = f.to(tl.int64)[:, None]
    values = tl.load(w + e * w_e + at * w_f + d[None, :], inside, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.max(tl.abs(values), 1), 0))
    code = _encode(values, tl.broadcast_to(scale, [_TILE, _TILE]))
    tl.store(codes + e * F * D + at * D + d[None, :], code, inside)
    tl.store(scales + (e * tl.num_programs(1) + b) * tl.num_programs(2) + c, scale)


@triton.jit
def _transpose(w, turned, F, D, TR: tl.constexpr):
    """A square of TR by TR codes of one expert."""
    e = tl.program_id(0).to(tl.int64) * F * D
    i = tl.arange(0, TR)
    f, d = tl.program_id(1) * TR + i, tl.program_id(2) * TR + i
    inside = (f < F)[:, None] & (d < D)[None, :]
    codes = tl.load(w + e + f.to(tl.int64)[:, None] * D + d[None, :], inside, other=0)
    tl.store(
        turned + e + d.to(tl.int64)[:, None] * F + f[None, :], tl.trans(codes), tl.trans(inside)
    )


@triton.jit
def _gemm(
    x, x_scales, w, w_scales, offsets, y,
    N, E, OUT, IN,
    BE: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    columns, blocks = tl.cdiv(OUT, TN), tl.cdiv(IN, TK)
    e, first, stop = find_tile(offsets, E, tl.program_id(0) // columns, BE, TM)
    if e < E:
        row = first + tl.arange(0, TM)
        column = tl.program_id(0) % columns
        out = column * TN + tl.arange(0, TN)
        inner = tl.arange(0, TK)
        x_rows = x + row.to(tl.int64)[:, None] * IN
        w_rows = w + (e.to(tl.int64) * OUT + out)[None, :] * IN
        x_scale = x_scales + row
        w_scale = w_scales + (e.to(tl.int64) * columns + column) * blocks
        total = tl.zeros([TM, TN], tl.float32)
        for block in range(blocks):
            k = block * TK + inner
            a = tl.load(x_rows + k[None, :], (row < stop)[:, None] & (k < IN)[None, :], other=0.0)
            b = tl.load(w_rows + k[:, None], (k < IN)[:, None] & (out < OUT)[None, :], other=0.0)
            s = tl.load(x_scale, row < stop, other=0.0) * tl.load(w_scale + block)
            total += tl.dot(a, b) * s[:, None]
            x_scale += N
        inside = (row < stop)[:, None] & (out < OUT)[None, :]
        y_rows = y + row.to(tl.int64)[:, None] * OUT + out[None, :]
        tl.store(y_rows, total.to(y.dtype.element_ty), inside)


@triton.jit
def _weight_gemm(
    dy, dy_scales, x, x_scales, offsets, dw,
    P, E, F, D,
    BE: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    columns = tl.cdiv(D, TN)
    f = tl.program_id(0) // columns * TM + tl.arange(0, TM)
    d = tl.program_id(0) % columns * TN + tl.arange(0, TN)
    expert = tl.arange(0, BE)
    end = tl.load(offsets + expert, expert < E, other=0)
    begin = tl.load(offsets + expert - 1, (expert > 0) & (expert < E), other=0)
    tiles = tl.where(expert < E, tl.cdiv(end - begin, TK), 0)
    stop = tl.sum(tl.where(expert <= e, tiles, 0), 0)
    start = tl.sum(tl.where(expert < e, tiles, 0), 0)
    at, inner = start.to(tl.int64), tl.arange(0, TK)
    dy_rows = dy + f.to(tl.int64)[:, None] * P + (at * TK + inner)[None, :]
    x_rows = x + d.to(tl.int64)[None, :] * P + (at * TK + inner)[:, None]
    dy_scale, x_scale = dy_scales + at * F + f, x_scales + at * D + d
    total = tl.zeros([TM, TN], tl.float32)
    for _ in range(start, stop):
        a = tl.load(dy_rows, (f < F)[:, None], other=0.0)
        b = tl.load(x_rows, (d < D)[None, :], other=0.0)
        s, t = tl.load(dy_scale, f < F, other=0.0), tl.load(x_scale, d < D, other=0.0)
        total += tl.dot(a, b) * s[:, None] * t[None, :]
        dy_rows, x_rows, dy_scale, x_scale = dy_rows + TK, x_rows + TK, dy_scale + F, x_scale + D
    dw_rows = dw + (e.to(tl.int64) * F + f)[:, None] * D + d[None, :]
    tl.store(dw_rows, total.to(dw.dtype.element_ty), (f < F)[:, None] & (d < D)[None, :])


def rows_launch(x, codes, scales) -> Launch:
    """Launch that quantises ``x`` row by row."""
    N, D = x.shape
    grid = (triton.cdiv(N, ROWS), triton.cdiv(D, TILE))
    return Launch(_quantize_rows, grid, (x, codes, scales, x.stride(0), N, D, ROWS), 4, 1)


def tokens_launch(x, offsets, codes, scales) -> Launch:
    """Launch that quantises ``x`` along tokens and transposes it."""
    (D, P), E = codes.shape, len(offsets)
    arguments = (x, offsets, codes, scales, x.stride(0), D, P, E, triton.next_power_of_2(E), ROWS)
    return Launch(_quantize_tokens, (P // TILE, triton.cdiv(D, ROWS)), arguments, 4, 1)


def blocks_launch(w, codes, scales) -> Launch:
    """Launch that quantises ``w`` block by block."""
    arguments = (w, codes, scales, w.stride(0), w.stride(1), *w.shape[1:])
    return Launch(_quantize_blocks, tuple(scales.shape), arguments, 8, 1)


def transpose_launch(codes, turned) -> Launch:
    """Launch that fills ``turned`` [E, D, F] with the codes [E, F, D], both seen as bytes."""
    E, F, D = codes.shape
    grid = (E, triton.cdiv(F, TURNED), triton.cdiv(D, TURNED))
    return Launch(_transpose, grid, (codes, turned, F, D, TURNED), 4, 1)


def gemm_launch(x, w, offsets, y) -> Launch:
    """Launch that fills ``y`` from the codes and scales of ``x`` and ``w``."""
    (N, _), (E, out, inner), tile = x[0].shape, w[0].shape, tile_of("fp8 gemm", x[0])
    arguments = (*x, *w, offsets, y, N, E, out, inner, triton.next_power_of_2(E))
    arguments += (tile.TM, TILE, TILE)
    tiles = (N // tile.TM + E) * triton.cdiv(out, TILE) if N else 0
    return Launch(_gemm, (tiles,), arguments, tile.warps, tile.stages)


def weight_gemm_launch(dy, x, offsets, dw) -> Launch:
    """Launch that fills ``dw`` from the codes and scales of ``dy`` and ``x``."""
    E, F, D = dw.shape
    P, tile = x[0].shape[1], tile_of("fp8 weight gemm", x[0])
    arguments = (*dy, *x, offsets, dw, P, E, F, D, triton.next_power_of_2(E))
    arguments += (tile.TM, tile.TN, TILE)
    tiles = triton.cdiv(F, tile.TM) * triton.cdiv(D, tile.TN)
    return Launch(_weight_gemm, (tiles, E), arguments, tile.warps, tile.stages)


def quantize_rows(x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kexa.kernels.quantize_rows`."""
    x = x_ND.contiguous()
    N, D = x.shape
    codes, scales = _empty(x, (N, D), (triton.cdiv(D, TILE), N))
    rows_launch(x, codes, scales).run()
    return codes, scales


def quantize_tokens(
    x_ND: torch.Tensor, offsets_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kexa.kernels.quantize_tokens`."""
    x = x_ND.contiguous()
    D, T = x.shape[1], tiles_bound(len(x), len(offsets_E))
    codes, scales = _empty(x, (D, T * TILE), (T, D))
    tokens_launch(x, offsets_E.to(torch.int32), codes, scales).run()
    return codes, scales


def quantize_blocks(w_EFD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kexa.kernels.quantize_blocks`."""
    w = w_EFD.contiguous()
    E, F, D = w.shape
    codes, scales = _empty(w, w.shape, (E, triton.cdiv(F, TILE), triton.cdiv(D, TILE)))
    blocks_launch(w, codes, scales).run()
    return codes, scales


def transposed(codes_EFD: torch.Tensor, scales_EBC: torch.Tensor) -> tuple:
    """See :func:`kexa.kernels.transposed`."""
    E, F, D = codes_EFD.shape
    bytes_EFD = codes_EFD.contiguous().view(torch.uint8)
    turned = bytes_EFD.new_empty(E, D, F)
    transpose_launch(bytes_EFD, turned).run()
    return turned.view(codes_EFD.dtype), scales_EBC.mT.contiguous()


def scaled_gemm(x, w, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`kexa.kernels.scaled_gemm`."""
    y = torch.empty(x[0].shape[0], w[0].shape[1], dtype=dtype, device=offsets_E.device)
    gemm_launch(x, w, offsets_E.to(torch.int32), y).run()
    return y


def scaled_weight_gemm(dy, x, offsets_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`kexa.kernels.scaled_weight_gemm`."""
    shape = (len(offsets_E), dy[0].shape[0], x[0].shape[0])
    dw = torch.empty(shape, dtype=dtype, device=offsets_E.device)
    weight_gemm_launch(dy, x, offsets_E.to(torch.int32), dw).run()
    return dw


def _empty(x: torch.Tensor, codes, scales) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(codes, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(scales, dtype=torch.float32, device=x.device),
    )
