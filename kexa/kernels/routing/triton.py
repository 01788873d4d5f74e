"""Routing in Triton: top-k, gates and a stable counting sort in three launches, one backward.

1. ``_select`` takes a tile of R tokens. K times it takes the largest key that is still free, the
   lowest expert where keys are equal. It stores experts and gates, and counts how many pairs of the
   tile each expert got.
2. ``_scan`` turns the counts, per expert, into what earlier tiles hold, and a total.
3. ``_place`` gives each pair its place: where its expert begins (a prefix sum over the totals),
   plus what earlier tiles hold, plus what earlier tokens of the tile hold. A token has an expert at
   most once, so the last is a prefix sum down the tile.

Nothing depends on the order in which programs run: no atomics, and the sort is stable. The host
reads no count. A NaN key is the largest, as in PyTorch, so that it shows in the result; places stay
a permutation whatever the keys are.

Backward, with S = sum of the chosen scores + 1e-20 and c the scale,

    ds_j = (c dg_j - sum over k of dg_k g_k) / S       of the chosen; c dg_j if not normalised
    ds_i = 0                                           of the others

Legend: N tokens, E experts, K experts per token; R tokens per tile; BE, BK: E and K rounded up to
powers of two; TE experts and TT tiles per step of the scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kexa.kernels.launch import Launch

SCAN_EXPERTS, SCAN_TILES = 32, 64  # what one step of the scan holds


@triton.jit
def _select(
    scores, keys, chosen, gates, counts, scale,
    N, E,
    K: tl.constexpr, NORMALISE: tl.constexpr,
    R: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    token, expert, slot = tile * R + tl.arange(0, R), tl.arange(0, BE), tl.arange(0, BK)
    inside = (token < N)[:, None] & (expert < E)[None, :]
    at = token[:, None] * E + expert[None, :]
    score = tl.load(scores + at, inside, other=0.0).to(ACC)
    key = tl.load(keys + at, inside, other=0.0).to(ACC)
    key = tl.where(key == key, key, float("inf"))
    free = inside
    picks = tl.zeros([R, BK], tl.int32)
    weights = tl.zeros([R, BK], ACC)
    for k in range(K):
        best = tl.max(tl.where(free, key, float("-inf")), 1)
        pick = tl.min(tl.where(free & (key >= best[:, None]), expert[None, :], BE), 1)
        here = expert[None, :] == pick[:, None]
        free = free & (here == 0)
        weight = tl.sum(tl.where(here, score, 0.0), 1)
        picks = tl.where((slot == k)[None, :], pick[:, None], picks)
        weights = tl.where((slot == k)[None, :], weight[:, None], weights)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
    real = (token < N)[:, None] & (slot < K)[None, :]
    pair = token[:, None] * K + slot[None, :]
    tl.store(chosen + pair, picks.to(tl.int64), real)
    tl.store(gates + pair, (weights * scale).to(gates.dtype.element_ty), real)
    taken = tl.sum(tl.where(inside & (free == 0), 1, 0), 0)
    tl.store(counts + tile * E + expert, taken, expert < E)


@triton.jit
def _scan(
    counts, before, totals,
    tiles, E,
    TE: tl.constexpr, TT: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0) * TE + tl.arange(0, TE)
    total = tl.zeros([TE], tl.int32)
    for start in range(0, tiles, TT):
        tile = start + tl.arange(0, TT)
        at = tile.to(tl.int64)[:, None] * E + expert[None, :]
        inside = (tile < tiles)[:, None] & (expert < E)[None, :]
        count = tl.load(counts + at, inside, other=0)
        tl.store(before + at, total[None, :] + tl.cumsum(count, 0) - count, inside)
        total += tl.sum(count, 0)
    tl.store(totals + expert, total, expert < E)


@triton.jit
def _place(
    chosen, before, totals, order, inverse, offsets,
    N, E,
    K: tl.constexpr, R: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    token, expert = tile * R + tl.arange(0, R), tl.arange(0, BE)
    total = tl.load(totals + expert, expert < E, other=0)
    end = tl.cumsum(total, 0)
    if tile == 0:
        tl.store(offsets + expert, end, expert < E)
    held = tl.load(before + tile * E + expert, expert < E, other=0)
    hits = tl.zeros([R, BE], tl.int32)
    for k in range(K):
        pick = tl.load(chosen + token * K + k, token < N, other=-1)
        hits += (expert[None, :] == pick[:, None]).to(tl.int32)
    place = (end - total + held)[None, :] + tl.cumsum(hits, 0) - hits
    for k in range(K):
        pair = token * K + k
        pick = tl.load(chosen + pair, token < N, other=-1)
        mine = tl.sum(tl.where(expert[None, :] == pick[:, None], place, 0), 1).to(tl.int64)
        tl.store(inverse + pair, mine, token < N)
        tl.store(order + mine, pair, token < N)


@triton.jit
def _gates_backward(
    scores, chosen, dgates, dscores, scale,
    N, E,
    K: tl.constexpr, NORMALISE: tl.constexpr,
    R: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token, expert = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BE)
    slot = tl.arange(0, BK)
    real = (token < N)[:, None] & (slot < K)[None, :]
    pair = token[:, None] * K + slot[None, :]
    picks = tl.load(chosen + pair, real, other=0)
    score = tl.load(scores + token[:, None] * E + picks, real, other=0.0).to(ACC)
    d = tl.load(dgates + pair, real, other=0.0).to(ACC)
    total = tl.sum(score, 1) + 1e-20
    shared = tl.sum(d * score, 1) / total
    grad = tl.zeros([R, BE], ACC)
    for k in range(K):
        pick = tl.load(chosen + token * K + k, token < N, other=-1)
        d_k = tl.load(dgates + token * K + k, token < N, other=0.0).to(ACC)
        if NORMALISE:
            d_k = (d_k - shared) / total
        grad = tl.where(expert[None, :] == pick[:, None], (d_k * scale)[:, None], grad)
    inside = (token < N)[:, None] & (expert < E)[None, :]
    at = token[:, None] * E + expert[None, :]
    tl.store(dscores + at, grad.to(dscores.dtype.element_ty), inside)


def select_launch(scores, keys, chosen, gates, counts, normalise: bool, scale: float) -> Launch:
    """Launch that fills ``chosen``, ``gates`` and ``counts [tiles, E]``."""
    (N, E), K, R = scores.shape, chosen.shape[1], tile_tokens(scores)
    sizes = (triton.next_power_of_2(E), triton.next_power_of_2(K))
    arguments = (scores, keys, chosen, gates, counts, scale, N, E, K, normalise, R, *sizes)
    return Launch(_select, (len(counts),), (*arguments, _accumulator(scores)), warps=4, stages=1)


def scan_launch(counts, before, totals) -> Launch:
    """Launch that fills ``before [tiles, E]`` and ``totals [E]``."""
    tiles, E = counts.shape
    arguments = (counts, before, totals, tiles, E, SCAN_EXPERTS, SCAN_TILES)
    return Launch(_scan, (triton.cdiv(E, SCAN_EXPERTS),), arguments, warps=4, stages=1)


def place_launch(chosen, before, totals, order, inverse, offsets, R: int) -> Launch:
    """Launch that fills ``order``, ``inverse`` and ``offsets``."""
    (N, K), E = chosen.shape, len(totals)
    arguments = (chosen, before, totals, order, inverse, offsets, N, E, K, R)
    size = triton.next_power_of_2(E)
    return Launch(_place, (len(before),), (*arguments, size), warps=4, stages=1)


def backward_launch(scores, chosen, dgates, dscores, normalise: bool, scale: float) -> Launch:
    """Launch that fills ``dscores``."""
    (N, E), K, R = scores.shape, chosen.shape[1], tile_tokens(scores)
    sizes = (triton.next_power_of_2(E), triton.next_power_of_2(K))
    arguments = (scores, chosen, dgates, dscores, scale, N, E, K, normalise, R, *sizes)
    return Launch(
        _gates_backward, (triton.cdiv(N, R),), (*arguments, _accumulator(scores)), warps=4, stages=1
    )


def tile_tokens(scores: torch.Tensor) -> int:
    """Tokens per tile: as many as make 2048 scores."""
    return max(1, 2048 // triton.next_power_of_2(scores.shape[1]))


def _accumulator(scores: torch.Tensor) -> object:
    return tl.float64 if scores.dtype == torch.float64 else tl.float32


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, keys, K, normalise, scale):
        (N, E), R = scores.shape, tile_tokens(scores)
        chosen = scores.new_empty(N, K, dtype=torch.int64)
        gates = scores.new_empty(N, K)
        tiles = max(1, triton.cdiv(N, R))  # without tokens the offsets are written all the same
        counts = scores.new_empty(tiles, E, dtype=torch.int32)
        before, totals = torch.empty_like(counts), counts.new_empty(E)
        order, inverse = chosen.new_empty(N * K), chosen.new_empty(N * K)
        offsets = torch.empty_like(totals)
        select_launch(scores, keys, chosen, gates, counts, normalise, scale).run()
        scan_launch(counts, before, totals).run()
        place_launch(chosen, before, totals, order, inverse, offsets, R).run()
        ctx.mark_non_differentiable(chosen, order, inverse, offsets)
        ctx.save_for_backward(scores, chosen)
        ctx.normalise, ctx.scale = normalise, scale
        return chosen, gates, order, inverse, offsets

    @staticmethod
    def backward(ctx, _chosen, dgates, *_places):
        scores, chosen = ctx.saved_tensors
        dscores = torch.empty_like(scores)
        dgates = dgates.contiguous()
        backward_launch(scores, chosen, dgates, dscores, ctx.normalise, ctx.scale).run()
        return dscores, None, None, None, None


def route(
    scores_NE: torch.Tensor, keys_NE: torch.Tensor, top_k: int, normalise: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    """The fields of :class:`kexa.kernels.Routing`; see :func:`kexa.kernels.route`."""
    return _Route.apply(
        scores_NE.contiguous(), keys_NE.detach().contiguous(), top_k, normalise, scale
    )
