"""Decode attention in Triton: every key is read once, by all query heads that share it.

A few queries leave most of a chip idle, so the slots of a long cache are split: ``_attend`` owns
``SPLIT`` slots of one key/value head and the R * T queries that read them, and leaves a normalised
output and lse; ``_combine`` weighs the splits:

    o = sum_i 2^(lse_i - lse) o_i      lse = log2 sum_i 2^lse_i

A ring is one split and written at once. What a slot holds follows from the row's last position, so
no mask is read; slots that nobody sees (stale, padding) are not read either. Time is set by the
bytes of keys and values; only 64 query rows (8 heads, 8 tokens) fill the full-rate instruction.

Legend: B rows, T new tokens, S slots, H query heads, G key/value heads, R = H / G, K head size;
TQ, TS tile sizes over queries and slots; BK = K rounded up to a power of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kexa.kernels.attention.triton import LOG2_E
from kexa.kernels.launch import Launch

SPLIT = 1024  # slots of a global layer that one program walks


@triton.jit
def _attend(
    q, k, v, position, begin, o, lse,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, o_i, o_b, o_h, o_t, p_b,
    B, G, R, T, S, window, scale,
    RING: tl.constexpr, SPLIT: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TS: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    row, feature = tl.program_id(2) * TQ + tl.arange(0, TQ), tl.arange(0, BK)
    h, t = g * R + row // T, row % T  # rows are ordered head by head
    first, start = tl.load(position + b * p_b), tl.load(begin + b)
    query, last = first + t, first + T - 1
    inside = (row < R * T)[:, None] & (feature < K)[None, :]
    q_rows = q + b * q_b + h[:, None] * q_h + t[:, None] * q_t + feature[None, :]
    q_tile = tl.load(q_rows, inside, other=0.0)

    m = tl.full([TQ], -1e30, tl.float32)
    total = tl.zeros([TQ], tl.float32)
    out = tl.zeros([TQ, BK], tl.float32)
    stop = tl.minimum(S, (split + 1) * SPLIT)
    if not RING:
        stop = tl.minimum(stop, last + 1)
    for at in range(split * SPLIT, stop, TS):
        slot = at + tl.arange(0, TS)
        held = slot
        if RING:
            held = last - (last - slot + S) % S
        seen = (slot < stop) & (held >= start) & (held <= last)
        if RING:
            seen = seen & (held > first - window)
        read = seen[:, None] & (feature < K)[None, :]
        k_tile = tl.load(
            k + b * k_b + g * k_h + slot[:, None] * k_s + feature[None, :], read, other=0.0
        )
        v_tile = tl.load(
            v + b * v_b + g * v_h + slot[:, None] * v_s + feature[None, :], read, other=0.0
        )
        visible = seen[None, :] & (held[None, :] <= query[:, None])
        if RING:
            visible = visible & (held[None, :] > query[:, None] - window)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        score = tl.where(visible, score, float("-inf"))
        m_next = tl.maximum(m, tl.max(score, 1))
        p = tl.exp2(score - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        m = m_next
    some = total > 0  # a split may hold nothing that a query sees: weight 2^-1e30
    total = tl.where(some, total, 1.0)
    o_rows = o + split * o_i + b * o_b + h[:, None] * o_h + t[:, None] * o_t + feature[None, :]
    tl.store(o_rows, (out / total[:, None]).to(o.dtype.element_ty), inside)
    tl.store(lse + ((split * B + b) * G * R + h) * T + t, m + tl.log2(total), row < R * T)


@triton.jit
def _combine(parts, lse, o, o_b, o_h, o_t, H, T, ROWS, SPLITS, K: tl.constexpr, BK: tl.constexpr):
    row, feature = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    m = tl.load(lse + row)
    total = m * 0 + 1.0
    out = tl.load(parts + row * K + feature, feature < K, other=0.0)
    for _ in range(1, SPLITS):
        row += ROWS
        bits = tl.load(lse + row)
        m_next = tl.maximum(m, bits)
        shrink, weight = tl.exp2(m - m_next), tl.exp2(bits - m_next)
        part = tl.load(parts + row * K + feature, feature < K, other=0.0)
        out = out * shrink + part * weight
        total = total * shrink + weight
        m = m_next
    row = tl.program_id(0).to(tl.int64)
    o_row = o + row // (H * T) * o_b + row // T % H * o_h + row % T * o_t
    tl.store(o_row + feature, (out / total).to(o.dtype.element_ty), feature < K)


def attend_launch(q, k, v, position, begin, o, lse, window: int | None) -> Launch:
    """Launch that fills ``o`` [splits, B, H, T, K] and ``lse`` [splits, B, H, T]."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    R, splits = H // G, len(o)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    strides += [*o.stride()[:4], position.stride(0)]
    numbers = (B, G, R, T, S, window or 0, LOG2_E / math.sqrt(K))
    narrow = q.element_size() <= 2
    TQ = min(64 if narrow else 16, max(16, triton.next_power_of_2(R * T)))
    split = SPLIT if splits > 1 else triton.next_power_of_2(S)
    block = max(16, triton.next_power_of_2(K))
    tiles = (window is not None, split, K, block, TQ, 64 if narrow else 32)
    grid = (B * G, splits, triton.cdiv(R * T, TQ))
    arguments = (q, k, v, position, begin, o, lse, *strides, *numbers, *tiles)
    return Launch(_attend, grid, arguments, warps=8 if TQ > 32 else 4, stages=2)


def combine_launch(parts, lse, o) -> Launch:
    """Launch that fills ``o`` from the splits."""
    splits, B, H, T, K = parts.shape
    sizes = (H, T, B * H * T, splits, K, max(16, triton.next_power_of_2(K)))
    return Launch(_combine, (B * H * T,), (parts, lse, o, *o.stride()[:3], *sizes), 1, 1)


def decode_attention(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    position_BT: torch.Tensor,
    start_B: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """See :func:`kexa.kernels.decode_attention`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTK, k_BGSK, v_BGSK))
    parts, lse = buffers(q, k.shape[2], window)
    attend_launch(q, k, v, position_BT, start_B, parts, lse, window).run()
    if len(parts) == 1:
        return parts[0]
    o = _output(q)
    combine_launch(parts, lse, o).run()
    return o


def buffers(q: torch.Tensor, slots: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and lse per split; the output itself where there is one split."""
    splits = 1 if window is not None else triton.cdiv(slots, SPLIT)
    fp32 = {"dtype": torch.float32, "device": q.device}
    parts = _output(q)[None] if splits == 1 else torch.empty(splits, *q.shape, **fp32)
    return parts, torch.empty(splits, *q.shape[:3], **fp32)


def _output(q: torch.Tensor) -> torch.Tensor:
    """Stored token by token, so that the caller's ``[B, T, H * K]`` view of it is free."""
    B, H, T, K = q.shape
    return q.new_empty(B, T, H, K).transpose(1, 2)
