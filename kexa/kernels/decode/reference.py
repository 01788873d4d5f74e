"""Decode attention as PyTorch writes it: which slots a query sees, and attention to those.

The specification, and the path CPUs take.

Legend: B rows, T new tokens, S slots, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_slots(position_BT: Tensor, start_B: Tensor, slots: int, window: int | None) -> Tensor:
    """``[B, 1, T, S]`` bool: does the query at this position see the key in this slot?

    ``window=None``: slot s holds position s. Else the slots are a ring, and slot s holds the last
    position up to the row's last query that is s modulo their number.
    """
    query_BT1 = position_BT[:, :, None]
    first_B11 = start_B[:, None, None]
    slots_S = torch.arange(slots, device=position_BT.device)
    if window is None:
        return ((slots_S <= query_BT1) & (slots_S >= first_B11))[:, None]
    last_B11 = position_BT[:, -1, None, None]
    held_B1S = last_B11 - (last_B11 - slots_S) % slots
    return ((held_B1S <= query_BT1) & (held_B1S > query_BT1 - window) & (held_B1S >= first_B11))[
        :, None
    ]


def decode_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B1TS: Tensor) -> Tensor:
    """Attention under an explicit mask; query heads of one group are folded into the query axis."""
    batch, heads, length, size = q_BHTK.shape
    groups = k_BGSK.shape[1]
    q_BGTK = q_BHTK.reshape(batch, groups, heads // groups * length, size)
    mask = mask_B1TS if length == 1 else mask_B1TS.repeat(1, 1, heads // groups, 1)
    return F.scaled_dot_product_attention(q_BGTK, k_BGSK, v_BGSK, attn_mask=mask).reshape(
        q_BHTK.shape
    )
