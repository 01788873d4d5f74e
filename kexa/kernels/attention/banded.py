"""The PyTorch path: attention cut into tiles small enough that little of a tile is masked away.

Window attention. Cut the queries into blocks of W = ``window``. The keys that block n can see lie
in blocks n-1 and n, so every block is one (W, 2W) problem and all of them are one batched call:
O(T * 2W) products instead of O(T * T).

    keys of block n:   [ block n-1 | block n ]        query i of the block sees columns i+1 .. i+W

Global attention. Without documents PyTorch's causal kernel skips the upper triangle. With documents
it would need a dense mask and skip nothing, so the queries go in chunks, each against the keys up
to its own end.

PyTorch's kernel lets query heads share a key/value head, so keys and values are never repeated in
memory, and reads queries and writes outputs token by token, as a model's projections lay them out:
blocks of queries are views.

Legend: B batch, T tokens, H query heads, G key/value heads, K head size, N blocks,
W block = window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

QUERY_CHUNK = 256


def window_attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    window: int,
    document_ids_BT: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`kexa.kernels.window_attention`."""
    B, H, T, K = q_BHTK.shape
    W = window
    if T <= W:
        return global_attention(q_BHTK, k_BGTK, v_BGTK, document_ids_BT)
    N = -(-T // W)
    q_BTHK = F.pad(q_BHTK.transpose(1, 2), (0, 0, 0, 0, 0, N * W - T))
    q = q_BTHK.reshape(B * N, W, H, K).transpose(1, 2)
    mask_BWS = _tile_mask(B, T, W, N, document_ids_BT, q.device)
    o = F.scaled_dot_product_attention(
        q,
        _tiles(k_BGTK, W, N),
        _tiles(v_BGTK, W, N),
        attn_mask=mask_BWS[:, None],
        enable_gqa=True,
    )
    return o.transpose(1, 2).reshape(B, N * W, H, K)[:, :T].transpose(1, 2)


def global_attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    document_ids_BT: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`kexa.kernels.global_attention`."""
    if document_ids_BT is None:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True
        )
    T = q_BHTK.shape[2]
    position = torch.arange(T, device=q_BHTK.device)
    chunks = []
    for start in range(0, T, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, T)
        causal = position[None, :end] <= position[start:end, None]
        same = document_ids_BT[:, start:end, None] == document_ids_BT[:, None, :end]
        chunks.append(
            F.scaled_dot_product_attention(
                q_BHTK[:, :, start:end],
                k_BGTK[:, :, :end],
                v_BGTK[:, :, :end],
                attn_mask=(causal & same)[:, None],
                enable_gqa=True,
            )
        )
    return torch.cat(chunks, dim=2)


def _tiles(x_BGTK: torch.Tensor, W: int, N: int) -> torch.Tensor:
    """Keys or values as ``[B*N, G, 2W, K]``: each block behind the one before it.

    Before the first block stand zeros; the mask hides them.
    """
    B, G, T, K = x_BGTK.shape
    blocks = F.pad(x_BGTK, (0, 0, W, N * W - T)).view(B, G, N + 1, W, K)
    pairs = torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], dim=3)
    return pairs.transpose(1, 2).reshape(B * N, G, 2 * W, K)


def _tile_mask(
    B: int, T: int, W: int, N: int, document_ids_BT: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """``[B*N, W, 2W]`` bool. Rows that only pad the last block see themselves: no NaN."""
    i = torch.arange(W, device=device)[:, None]
    j = torch.arange(2 * W, device=device)[None, :]
    band = (j > i) & (j <= i + W)
    mask = band.expand(N, W, 2 * W).clone()
    mask[0] &= j >= W
    if document_ids_BT is None:
        return mask.repeat(B, 1, 1)
    ids_BNW = F.pad(document_ids_BT, (0, N * W - T)).view(B, N, W)
    before_BNW = F.pad(ids_BNW, (0, 0, 1, 0))[:, :-1]
    seen_BNS = torch.cat([before_BNW, ids_BNW], dim=2)
    same_BNWS = ids_BNW[..., None] == seen_BNS[:, :, None, :]
    return (mask & same_BNWS).view(B * N, W, 2 * W)
