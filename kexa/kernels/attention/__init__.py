"""Window and global attention with grouped queries and packed documents.

Both are causal softmax attention with scale 1/sqrt(K); a query at t sees the keys at s where

    window:  t - window < s <= t      global:  s <= t      and always  document(s) == document(t)

reported: three window layers (128 keys) to one global layer; 64 query heads on 8 key/value heads.
reported: RoPE on window layers only; it is applied before, so nothing here knows positions.
inferred: the window counts the query's own key; the public implementations agree on that.
chosen: padding is a document with a negative id: every row sees at least itself, so none is NaN.

Legend: B batch, T tokens, H query heads, G key/value heads (H a multiple of G), K head size.
"""

from __future__ import annotations

import torch

from kexa.kernels.attention import banded
from kexa.kernels.dispatch import use_triton

MAX_TRITON_HEAD_DIM = 128  # larger tiles of q, k, v and dO do not fit in shared memory together


def window_attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    window: int,
    document_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention to the last ``window`` keys, the query's own included. Cost O(T * window).

    Args:
        q_BHTK, k_BGTK, v_BGTK: one floating dtype, one device; H is a multiple of G.
        window: keys a query sees, at least 1.
        document_ids_BT: integers; tokens see only tokens with their own id. ``None``: one document
        per row.

    Returns:
        o_BHTK in q's dtype. Differentiable in q, k and v.

    Raises:
        ValueError: shapes that do not fit together, or ``window`` < 1.
    """
    if window < 1:
        raise ValueError(f"window={window}: a query sees at least its own key, so use 1 or more")
    _check(q_BHTK, k_BGTK, v_BGTK, document_ids_BT)
    if _triton(q_BHTK):
        from kexa.kernels.attention.triton import attention

        return attention(q_BHTK, k_BGTK, v_BGTK, window, document_ids_BT)
    return banded.window_attention(q_BHTK, k_BGTK, v_BGTK, window, document_ids_BT)


def global_attention(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    document_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention to every earlier key of the same document.

    Arguments, result and errors as :func:`window_attention`.
    """
    _check(q_BHTK, k_BGTK, v_BGTK, document_ids_BT)
    if _triton(q_BHTK):
        from kexa.kernels.attention.triton import attention

        return attention(q_BHTK, k_BGTK, v_BGTK, q_BHTK.shape[2], document_ids_BT)
    return banded.global_attention(q_BHTK, k_BGTK, v_BGTK, document_ids_BT)


def _triton(q_BHTK: torch.Tensor) -> bool:
    return use_triton(q_BHTK) and q_BHTK.shape[-1] <= MAX_TRITON_HEAD_DIM


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ids: torch.Tensor | None
) -> None:
    B, H, T, K = q.shape
    G = k.shape[1]
    if k.shape != v.shape or k.shape != (B, G, T, K) or H % G:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected q [B, H, T, K], "
            "k and v [B, G, T, K], H a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if document_ids is not None and document_ids.shape != (B, T):
        raise ValueError(f"document_ids {tuple(document_ids.shape)}: expected [B, T] = {(B, T)}")
