"""Attention in Triton, forward and backward: one pass over the visible keys, no score ever stored.

Forward (online softmax). For a tile of queries, walk over the key tiles that hold a visible key,
from the window's start to the diagonal, keeping per query the largest score m, the sum l of
exponentials (``total``) and the unnormalised output:

    m' = max(m, max_s S_s)     a = exp(m - m')     l' = a l + sum_s exp(S_s - m')     O' = a O + P V

Saved for the backward pass: O and lse = m + log l. With P = exp(S - lse), D = rowsum(O * dO) and
S = scale q k,

    dV = P^T dO     dP = dO V^T     dS = P * (dP - D)     dQ = scale dS K     dK = scale dS^T Q

* ``_backward_q`` owns a tile of queries, walks keys as the forward does, and leaves D for
* ``_backward_kv``, which owns a tile of keys and walks the queries of all R heads that share it:
  gradients of grouped heads are summed in registers, without atomics, so equal inputs give equal
  bits.

Scores are kept in base 2 (exp2 is the hardware's instruction): scale carries log2(e), lse is in
bits. Window attention and global attention are the same kernels; global is window = T.

Departures from the textbook kernel: documents are compared in the mask instead of cutting the batch
into sequences; a query masked in a whole tile is handled by the finite start m = -1e30 (then P is
0, not NaN). Where several documents share a row of global attention, ``_extents`` says first of
each block of tokens how far back its documents begin and how far on they end, and no tile beyond is
visited: documents of length L cost O(T L), not O(T T). Ids may come in any order.

Legend: B batch, T tokens, H query heads, G key/value heads, R = H / G, K head size; TQ, TS tile
sizes over queries and keys; BK = K rounded up to a power of two; BLOCK tokens per extent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kexa.kernels.launch import Launch
from kexa.kernels.tiles import tile_of

LOG2_E = math.log2(math.e)
BLOCK = 32  # tokens per extent; what a program owns is a multiple


@triton.jit
def _rows(base, token, feature, stride, T, K: tl.constexpr):
    """Load a ``[tokens, features]`` tile of one head; zeros outside."""
    inside = (token < T)[:, None] & (feature < K)[None, :]
    return tl.load(
        base + token.to(tl.int64)[:, None] * stride + feature[None, :], inside, other=0.0
    )


@triton.jit
def _visible(query, key, query_ids, key_ids, window, T):
    """``[queries, keys]`` bool. Rows of padding (query >= T) see nothing."""
    t, s = query[:, None], key[None, :]
    return (s <= t) & (s > t - window) & (t < T) & (query_ids[:, None] == key_ids[None, :])


@triton.jit
def _extents(ids, first_key, last_query, T, BLOCK: tl.constexpr):
    """Of each block, where its documents begin and end: a multiple of BLOCK, or past T at the end.

    Stored at the block: the first key that one of its queries may see, and the end of the queries
    that may see one of its keys.
    """
    b, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, row = tl.arange(0, BLOCK), ids + b * T
    token = n * BLOCK + i
    own = tl.load(row + token, token < T, other=0)
    begin = n * BLOCK
    for start in range(0, n * BLOCK, BLOCK):
        other = tl.load(row + start + i)
        same = (own[:, None] == other[None, :]) & (token < T)[:, None]
        found = tl.max(tl.max(same.to(tl.int32), 1), 0) > 0
        begin = tl.where(found, tl.minimum(begin, start), begin)
    end = n * BLOCK + BLOCK
    for start in range(n * BLOCK + BLOCK, T, BLOCK):
        other = tl.load(row + start + i, start + i < T, other=0)
        same = (own[:, None] == other[None, :]) & (start + i < T)[None, :]
        found = tl.max(tl.max(same.to(tl.int32), 1), 0) > 0
        end = tl.where(found, start + BLOCK, end)
    at = b * tl.num_programs(1) + n
    tl.store(first_key + at, begin)
    tl.store(last_query + at, end)


@triton.jit
def _of_blocks(extents, b, first, T, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The extents of the blocks of one tile; past the last block those of the last."""
    blocks = tl.cdiv(T, BLOCK)
    block = tl.minimum(first // BLOCK + tl.arange(0, TILE // BLOCK), blocks - 1)
    return tl.load(extents + b * blocks + block)


@triton.jit
def _forward(
    q, k, v, ids, first_key, o, lse,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, R, T, window, scale,
    K: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TS: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first = tl.program_id(1) * TQ
    query, feature = first + tl.arange(0, TQ), tl.arange(0, BK)
    query_ids = tl.load(ids + b * T + query, query < T, other=0)
    q_tile = _rows(q + b * q_b + h * q_h, query, feature, q_t, T, K)
    k_head, v_head = k + b * k_b + h // R * k_h, v + b * v_b + h // R * v_h

    m = tl.full([TQ], -1e30, ACC)
    total = tl.zeros([TQ], ACC)
    out = tl.zeros([TQ, BK], ACC)
    begin = tl.maximum(0, first - window + 1)
    if first_key is not None:
        begin = tl.maximum(begin, tl.min(_of_blocks(first_key, b, first, T, TQ, BLOCK), 0))
    for start in range(begin // TS * TS, tl.minimum(T, first + TQ), TS):
        key = start + tl.arange(0, TS)
        key_ids = tl.load(ids + b * T + key, key < T, other=0)
        k_tile = _rows(k_head, key, feature, k_t, T, K)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        score = tl.where(_visible(query, key, query_ids, key_ids, window, T), score, float("-inf"))
        m_next = tl.maximum(m, tl.max(score, 1))
        p = tl.exp2(score - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _rows(v_head, key, feature, v_t, T, K)
        out = out * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        m = m_next
    total = tl.where(query < T, total, 1.0)
    inside = (query < T)[:, None] & (feature < K)[None, :]
    o_rows = o + b * o_b + h * o_h + query.to(tl.int64)[:, None] * o_t + feature[None, :]
    tl.store(o_rows, (out / total[:, None]).to(o.dtype.element_ty), inside)
    tl.store(lse + (b * H + h) * T + query, m + tl.log2(total), query < T)


@triton.jit
def _backward_q(
    q, k, v, ids, first_key, o, lse, do, dq, delta,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H, R, T, window, scale, scale_q,
    K: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TS: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first = tl.program_id(1) * TQ
    query, feature = first + tl.arange(0, TQ), tl.arange(0, BK)
    query_ids = tl.load(ids + b * T + query, query < T, other=0)
    q_tile = _rows(q + b * q_b + h * q_h, query, feature, q_t, T, K)
    do_tile = _rows(do + b * do_b + h * do_h, query, feature, do_t, T, K)
    o_tile = _rows(o + b * o_b + h * o_h, query, feature, o_t, T, K)
    k_head, v_head = k + b * k_b + h // R * k_h, v + b * v_b + h // R * v_h
    row = (b * H + h) * T + query
    bits = tl.load(lse + row, query < T, other=0.0)
    d = tl.sum(o_tile.to(ACC) * do_tile.to(ACC), 1)
    tl.store(delta + row, d, query < T)

    grad = tl.zeros([TQ, BK], ACC)
    begin = tl.maximum(0, first - window + 1)
    if first_key is not None:
        begin = tl.maximum(begin, tl.min(_of_blocks(first_key, b, first, T, TQ, BLOCK), 0))
    for start in range(begin // TS * TS, tl.minimum(T, first + TQ), TS):
        key = start + tl.arange(0, TS)
        key_ids = tl.load(ids + b * T + key, key < T, other=0)
        k_tile = _rows(k_head, key, feature, k_t, T, K)
        v_tile = _rows(v_head, key, feature, v_t, T, K)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        visible = _visible(query, key, query_ids, key_ids, window, T)
        p = tl.where(visible, tl.exp2(score - bits[:, None]), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - d[:, None])
        grad += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    inside = (query < T)[:, None] & (feature < K)[None, :]
    dq_rows = dq + b * dq_b + h * dq_h + query.to(tl.int64)[:, None] * dq_t + feature[None, :]
    tl.store(dq_rows, (grad * scale_q).to(dq.dtype.element_ty), inside)


@triton.jit
def _backward_kv(
    q, k, v, ids, last_query, lse, do, delta, dk, dv,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h,
    dv_t, G, R, T, window, scale, scale_q,
    K: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TS: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    first = tl.program_id(1) * TS
    key, feature = first + tl.arange(0, TS), tl.arange(0, BK)
    key_ids = tl.load(ids + b * T + key, key < T, other=0)
    k_tile = _rows(k + b * k_b + g * k_h, key, feature, k_t, T, K)
    v_tile = _rows(v + b * v_b + g * v_h, key, feature, v_t, T, K)

    grad_k = tl.zeros([TS, BK], ACC)
    grad_v = tl.zeros([TS, BK], ACC)
    end = tl.minimum(T, first + TS - 1 + window)
    if last_query is not None:
        end = tl.minimum(end, tl.max(_of_blocks(last_query, b, first, T, TS, BLOCK), 0))
    for h in range(g * R, g * R + R):
        q_head, do_head = q + b * q_b + h * q_h, do + b * do_b + h * do_h
        row = (b * G * R + h) * T
        for start in range(first // TQ * TQ, end, TQ):
            query = start + tl.arange(0, TQ)
            query_ids = tl.load(ids + b * T + query, query < T, other=0)
            q_tile = _rows(q_head, query, feature, q_t, T, K)
            do_tile = _rows(do_head, query, feature, do_t, T, K)
            bits = tl.load(lse + row + query, query < T, other=0.0)
            d = tl.load(delta + row + query, query < T, other=0.0)
            score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
            visible = tl.trans(_visible(query, key, query_ids, key_ids, window, T))
            p = tl.where(visible, tl.exp2(score - bits[None, :]), 0.0)
            grad_v += tl.dot(p.to(do_tile.dtype), do_tile, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            ds = p * (dp - d[None, :])
            grad_k += tl.dot(ds.to(q_tile.dtype), q_tile, input_precision="ieee")
    inside = (key < T)[:, None] & (feature < K)[None, :]
    token = key.to(tl.int64)[:, None]
    dk_rows = dk + b * dk_b + g * dk_h + token * dk_t + feature[None, :]
    dv_rows = dv + b * dv_b + g * dv_h + token * dv_t + feature[None, :]
    tl.store(dk_rows, (grad_k * scale_q).to(dk.dtype.element_ty), inside)
    tl.store(dv_rows, grad_v.to(dv.dtype.element_ty), inside)


def extents_launch(ids, first_key, last_query) -> Launch:
    """Launch that fills the extents of all blocks, ``[B, ceil(T / BLOCK)]``."""
    (B, T), blocks = ids.shape, first_key.shape[1]
    return Launch(_extents, (B, blocks), (ids, first_key, last_query, T, BLOCK), warps=1, stages=1)


def forward_launch(q, k, v, ids, first_key, o, lse, window: int) -> Launch:
    """Launch that fills ``o`` and ``lse``."""
    (B, H, T, _), tile = q.shape, tile_of("attention forward", q)
    tensors = (q, k, v, ids, first_key, o, lse)
    numbers = (H, H // k.shape[1], T, window, _scale(q) * LOG2_E)
    arguments = (*tensors, *_strides(q, k, v, o), *numbers, *_sizes(q, tile.TM, tile.TN))
    grid = (B * H, triton.cdiv(T, tile.TM))
    return Launch(_forward, grid, arguments, tile.warps, tile.stages)


def backward_q_launch(q, k, v, ids, first_key, o, lse, do, dq, delta, window: int) -> Launch:
    """Launch that fills ``dq`` and ``delta`` (= rowsum(o * do), in lse's dtype)."""
    (B, H, T, _), tile = q.shape, tile_of("attention backward_q", q)
    tensors = (q, k, v, ids, first_key, o, lse, do, dq, delta)
    numbers = (H, H // k.shape[1], T, window, _scale(q) * LOG2_E, _scale(q))
    arguments = (*tensors, *_strides(q, k, v, o, do, dq), *numbers, *_sizes(q, tile.TM, tile.TN))
    grid = (B * H, triton.cdiv(T, tile.TM))
    return Launch(_backward_q, grid, arguments, tile.warps, tile.stages)


def backward_kv_launch(q, k, v, ids, last_query, lse, do, delta, dk, dv, window: int) -> Launch:
    """Launch that fills ``dk`` and ``dv``; reads the ``delta`` of :func:`backward_q_launch`."""
    (B, H, T, _), G, tile = q.shape, k.shape[1], tile_of("attention backward_kv", q)
    tensors = (q, k, v, ids, last_query, lse, do, delta, dk, dv)
    numbers = (G, H // G, T, window, _scale(q) * LOG2_E, _scale(q))
    arguments = (*tensors, *_strides(q, k, v, do, dk, dv), *numbers, *_sizes(q, tile.TN, tile.TM))
    grid = (B * G, triton.cdiv(T, tile.TM))
    return Launch(_backward_kv, grid, arguments, tile.warps, tile.stages)


class _Sizes(NamedTuple):
    K: int
    BK: int
    TQ: int
    TS: int
    ACC: object
    BLOCK: int


def _sizes(q: torch.Tensor, TQ: int, TS: int) -> _Sizes:
    """What every kernel is told at compile time."""
    K = q.shape[-1]
    acc = tl.float64 if q.dtype == torch.float64 else tl.float32
    return _Sizes(K, max(16, triton.next_power_of_2(K)), TQ, TS, acc, BLOCK)


def _scale(q: torch.Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, head and token of each; the features are contiguous."""
    return [stride for x in tensors for stride in x.stride()[:3]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ids, first_key, last_query, window):
        B, H, T, K = q.shape
        # Stored token by token, so that the caller's [B, T, H * K] view of the output is free.
        o = q.new_empty(B, T, H, K).transpose(1, 2)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(B, H, T, dtype=wide, device=q.device)
        forward_launch(q, k, v, ids, first_key, o, lse, window).run()
        ctx.save_for_backward(q, k, v, ids, first_key, last_query, o, lse)
        ctx.window = window
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, ids, first_key, last_query, o, lse = ctx.saved_tensors
        do = _features_contiguous(do)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = torch.empty_like(lse)
        backward_q_launch(q, k, v, ids, first_key, o, lse, do, dq, delta, ctx.window).run()
        backward_kv_launch(q, k, v, ids, last_query, lse, do, delta, dk, dv, ctx.window).run()
        return dq, dk, dv, None, None, None, None


def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    window: int,
    document_ids_BT: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`kexa.kernels.window_attention`; ``window`` = T is global attention."""
    B, _, T, _ = q_BHTK.shape
    first_key = last_query = None
    if document_ids_BT is None:
        ids = torch.zeros(B, T, dtype=torch.int32, device=q_BHTK.device)
    else:
        ids = document_ids_BT.to(torch.int32).contiguous()
        if window >= T:  # a window ends sooner than most documents do
            first_key, last_query = ids.new_empty(2, B, triton.cdiv(T, BLOCK))
            extents_launch(ids, first_key, last_query).run()
    q, k, v = (_features_contiguous(x) for x in (q_BHTK, k_BGTK, v_BGTK))
    return _Attention.apply(q, k, v, ids, first_key, last_query, min(window, T))


def _features_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
