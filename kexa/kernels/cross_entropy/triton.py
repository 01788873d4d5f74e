"""Linear cross-entropy in Triton: logits live in registers, forward and backward.

Forward. ``_forward`` computes a tile of TM rows by TN words of z = h w^T and leaves of each row the
log-sum-exp over the tile; PyTorch joins those of a row, V / TN numbers. The one tile that holds a
row's target stores its logit. Nothing depends on the order in which tiles run.

Backward. The vocabulary goes by in chunks. For each one ``_gradient`` computes the tiles of z again
and stores

    dz = weight (exp(z - lse) - onehot(target))          [N, chunk], in h's dtype

(with ``z_loss`` the exponential is multiplied by its row's 1 + 2 z_loss lse).

Then dw of the chunk is dz^T h, complete and a plain product, so PyTorch's; dh grows by dz w
(``_product``) in one buffer of fp32. Each number has one owner per chunk and chunks run in order,
so equal inputs give equal bits. That owner adds by an atomic instruction all the same: it adds in
memory, where loading the old values would spill registers of the largest tile.

chosen: dz of a chunk goes through memory. A kernel that kept it in registers would compute the
logits once per tile of dh, D / TN = 48 times at the published size. Here they are computed twice in
all: 8 N D V FLOPs in place of 6, and N x 8192 numbers in place of N x V.

Legend: N rows, D hidden size, V vocabulary (of the chunk, in the backward pass); TM, TN, TK tile
sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kexa.kernels.launch import Launch
from kexa.kernels.tiles import Tile, product_tiles, tile_of

CHUNK = 64  # tiles of words per chunk
LOGITS = "cross entropy logits"


@triton.jit
def _logits(
    h, w, h_n, w_v, row, word, N, D, V,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of z; -inf at words past the vocabulary."""
    h_rows = h + row.to(tl.int64)[:, None] * h_n
    w_rows = w + word.to(tl.int64)[None, :] * w_v
    inner = tl.arange(0, TK)
    z = tl.zeros([TM, TN], ACC)
    for start in range(0, D, TK):
        k = start + inner
        a = tl.load(h_rows + k[None, :], (row < N)[:, None] & (k < D)[None, :], other=0.0)
        b = tl.load(w_rows + k[:, None], (k < D)[:, None] & (word < V)[None, :], other=0.0)
        z += tl.dot(a, b, input_precision="ieee")
    return tl.where((word < V)[None, :], z, float("-inf"))


@triton.jit
def _forward(
    h, w, targets, parts, chosen,
    h_n, w_v,
    N, D, V,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, TM)  # tiles of one column of z run together: they share a tile of w
    row = tl.program_id(0) % tiles * TM + tl.arange(0, TM)
    column = tl.program_id(0) // tiles
    word = column * TN + tl.arange(0, TN)
    z = _logits(h, w, h_n, w_v, row, word, N, D, V, TM, TN, TK, ACC)
    largest = tl.max(z, 1)
    part = largest + tl.log(tl.sum(tl.exp(z - largest[:, None]), 1))
    tl.store(parts + column.to(tl.int64) * N + row, part, row < N)
    target = tl.load(targets + row, row < N, other=-1)
    logit = tl.sum(tl.where(word[None, :] == target[:, None], z, 0.0), 1)
    tl.store(chosen + row, logit, (target >= column * TN) & (target < column * TN + TN))


@triton.jit
def _gradient(
    h, w, targets, lse, factor, weight, dz,
    h_n, w_v, dz_n,
    N, D, V, first,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, TM)
    row = tl.program_id(0) % tiles * TM + tl.arange(0, TM)
    word = tl.program_id(0) // tiles * TN + tl.arange(0, TN)
    z = _logits(h, w, h_n, w_v, row, word, N, D, V, TM, TN, TK, ACC)
    p = tl.exp(z - tl.load(lse + row, row < N, other=0.0)[:, None])
    if factor is not None:
        p *= tl.load(factor + row, row < N, other=0.0)[:, None]
    target = tl.load(targets + row, row < N, other=-1)
    grad = p - ((first + word)[None, :] == target[:, None]).to(ACC)
    grad *= tl.load(weight)
    dz_rows = dz + row.to(tl.int64)[:, None] * dz_n + word[None, :]
    tl.store(dz_rows, grad.to(dz.dtype.element_ty), (row < N)[:, None] & (word < V)[None, :])


@triton.jit
def _product(
    a, b, out,
    a_m, b_k, out_m,
    M, N, K,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``out += a b``; shapes [M, N], [M, K], [K, N]."""
    columns = tl.cdiv(N, TN)
    first_m, first_n = tl.program_id(0) // columns * TM, tl.program_id(0) % columns * TN
    i, j, inner = tl.arange(0, TM), tl.arange(0, TN), tl.arange(0, TK)
    m, n = first_m + i, first_n + j
    a_rows = a + m.to(tl.int64)[:, None] * a_m
    total = tl.zeros([TM, TN], ACC)
    for start in range(0, K, TK):
        k = start + inner
        at = k.to(tl.int64)
        x = tl.load(a_rows + at[None, :], (m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(
            b + at[:, None] * b_k + n[None, :], (k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        total += tl.dot(x, y, input_precision="ieee")
    corner = out + first_m.to(tl.int64) * out_m + first_n
    inside = (m < M)[:, None] & (n < N)[None, :]
    at_tile = i[:, None] * out_m + j[None, :]
    tl.atomic_add(corner + at_tile, total, inside, sem="relaxed")


def forward_launch(h, w, targets, parts, chosen) -> Launch:
    """Launch that fills ``parts`` [tiles, N], log-sum-exps, and ``chosen`` [N], targets' logits."""
    (N, D), V, tile = h.shape, len(w), tile_of(LOGITS, h)
    arguments = (h, w, targets, parts, chosen, h.stride(0), w.stride(0), N, D, V)
    arguments += product_tiles(tile, h)
    return Launch(_forward, (_count(N, V, tile),), arguments, tile.warps, tile.stages)


def gradient_launch(h, w, targets, lse, weight, dz, first: int, factor=None) -> Launch:
    """Launch that fills ``dz`` [N, V] of the chunk ``w``, whose first word is ``first``.

    ``factor`` [N] multiplies every row's softmax.
    """
    (N, D), V, tile = h.shape, len(w), tile_of(LOGITS, h)
    strides = (h.stride(0), w.stride(0), dz.stride(0))
    arguments = (h, w, targets, lse, factor, weight, dz, *strides, N, D, V, first)
    arguments += product_tiles(tile, h)
    return Launch(_gradient, (_count(N, V, tile),), arguments, tile.warps, tile.stages)


def product_launch(a, b, out) -> Launch:
    """Launch that adds ``a b`` to ``out``."""
    (M, K), N, tile = a.shape, b.shape[1], tile_of("cross entropy product", a)
    strides = (a.stride(0), b.stride(0), out.stride(0))
    arguments = (a, b, out, *strides, M, N, K, *product_tiles(tile, a))
    return Launch(_product, (_count(M, N, tile),), arguments, tile.warps, tile.stages)


def _count(rows: int, columns: int, tile: Tile) -> int:
    return triton.cdiv(rows, tile.TM) * triton.cdiv(columns, tile.TN)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, z_loss):
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        parts = h.new_empty(triton.cdiv(len(w), tile_of(LOGITS, h).TN), len(h), dtype=wide)
        chosen = h.new_empty(len(h), dtype=wide)
        forward_launch(h, w, targets, parts, chosen).run()
        lse = parts.logsumexp(0)
        factor = 1 + 2 * z_loss * lse if z_loss else None
        penalty = z_loss * lse.square().sum() if z_loss else lse.new_zeros(())
        ctx.mark_non_differentiable(penalty)
        ctx.save_for_backward(h, w, targets, factor, lse)
        return (lse - chosen).sum() + penalty, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx, weight, _):
        h, w, targets, factor, lse = ctx.saved_tensors
        needs_h, needs_w = ctx.needs_input_grad[:2]
        dh = torch.zeros_like(h, dtype=lse.dtype) if needs_h else None
        dw = torch.empty_like(w) if needs_w else None
        words = CHUNK * tile_of(LOGITS, h).TN
        for first in range(0, len(w), words):
            chunk = slice(first, first + words)
            dz = h.new_empty(len(h), len(w[chunk]))
            gradient_launch(h, w[chunk], targets, lse, weight, dz, first, factor).run()
            if needs_h:
                product_launch(dz, w[chunk], dh).run()
            if needs_w:
                torch.mm(dz.T, h, out=dw[chunk])
        return (dh.to(h.dtype) if needs_h else None), dw, None, None


def linear_cross_entropy(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    z_loss: float = 0.0,
    penalties: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """See :func:`kexa.kernels.linear_cross_entropy`."""
    h, w, targets = h_ND.contiguous(), w_VD.contiguous(), targets_N.to(torch.int32).contiguous()
    loss, penalty = _LinearCrossEntropy.apply(h, w, targets, z_loss)
    if penalties is not None:
        penalties.append(penalty)
    return loss
