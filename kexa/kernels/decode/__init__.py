"""Decode attention: a few new queries per row against the slots of a cache.

The buffers are those of ``kexa.model.cache``: of a global layer slot s holds position s; of a
window layer they are a ring, where position p lies in slot p mod S. Rows of a batch stand at
different positions and may begin with padding. A query at position t sees the keys at p with

    start <= p <= t     and on window layers     t - window < p

Legend: B rows, T new tokens, S slots, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kexa.kernels.attention import MAX_TRITON_HEAD_DIM
from kexa.kernels.decode import reference
from kexa.kernels.dispatch import use_triton


def decode_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    position_BT: Tensor,
    start_B: Tensor,
    window: int | None,
    mask_B1TS: Tensor | None = None,
) -> Tensor:
    """Attention of T new tokens, whose own keys and values are stored already.

    Args:
        q_BHTK, k_BGSK, v_BGSK: one floating dtype, one device; H is a multiple of G. What lies in
        slots that no query sees does not matter. position_BT: int64, T consecutive ones per row.
        start_B: int64, columns of left padding. window: ``None`` for a global layer. mask_B1TS:
        :func:`reference.visible_slots`, where layers share it; kernels work it out themselves.

    Returns:
        o_BHTK in q's dtype. Gradients flow on the PyTorch path, which is taken when one is wanted.

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, H, _, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    if k_BGSK.shape != (B, G, S, K) or v_BGSK.shape != k_BGSK.shape or H % G:
        raise ValueError(
            f"q {tuple(q_BHTK.shape)}, k {tuple(k_BGSK.shape)}, v {tuple(v_BGSK.shape)}: expected "
            "q [B, H, T, K], k and v [B, G, S, K], H a multiple of G"
        )
    differentiable = torch.is_grad_enabled() and q_BHTK.requires_grad
    if use_triton(q_BHTK) and K <= MAX_TRITON_HEAD_DIM and not differentiable:
        from kexa.kernels.decode.triton import decode_attention as kernel

        return kernel(q_BHTK, k_BGSK, v_BGSK, position_BT, start_B, window)
    if mask_B1TS is None:
        mask_B1TS = reference.visible_slots(position_BT, start_B, S, window)
    return reference.decode_attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
