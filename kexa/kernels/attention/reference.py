"""Attention as its definition: a dense mask, a softmax, two products. Slow, and meant to be read.

    o[t] = sum_s softmax_s(q[t] . k[s] / sqrt(K)) v[s]   over the s that ``visible`` allows

Legend: B batch, T tokens, H query heads, G key/value heads, R = H / G query heads per key/value
head, K head size.
"""

from __future__ import annotations

import torch


def visible(
    tokens: int, window: int | None = None, document_ids_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B or 1, T, T]`` bool: may the query in row t see the key in column s?

    ``window=None`` is global attention.
    """
    t = torch.arange(tokens)[:, None]
    s = torch.arange(tokens)[None, :]
    mask_TT = s <= t
    if window is not None:
        mask_TT &= s > t - window
    if document_ids_BT is None:
        return mask_TT[None]
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return mask_TT.to(same_BTT.device) & same_BTT


def attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    window: int | None = None,
    document_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense reference of both operations: ``window=None`` is global attention."""
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    q_BGRTK = q_BHTK.reshape(B, G, H // G, T, K)
    scores_BGRTT = torch.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGTK) / K**0.5
    mask_BTT = visible(T, window, document_ids_BT).to(q_BHTK.device)
    scores_BGRTT = scores_BGRTT.masked_fill(~mask_BTT[:, None, None], float("-inf"))
    o_BGRTK = torch.einsum("bgrts,bgsk->bgrtk", scores_BGRTT.softmax(-1), v_BGTK)
    return o_BGRTK.reshape(B, H, T, K)
