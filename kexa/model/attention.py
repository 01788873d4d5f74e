"""Grouped-query attention of the hybrid stack: window layers with RoPE, global layers without.

For a query at position t of a document, with keys of the same document only:

    window layer   sees t - window < s <= t (its own key counts, so ``window`` keys), with RoPE
    global layer   sees s <= t, no position encoding (NoPE)

Queries and keys are RMS-normed per head, one weight vector shared by all heads, before RoPE
(reported). RoPE turns the two halves of a head against each other. It depends on distances only, so
positions are counted along the row and need no restart at a document boundary or after left
padding.

``use_qk_norm`` and ``rope_layers`` of the config switch these choices off for ablations.

Legend: B rows, T tokens, D hidden size, H query heads, G key-value heads, K head size, S cached
slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from kexa.config import ModelConfig
from kexa.kernels import decode_attention, global_attention, window_attention
from kexa.model.cache import LayerCache, Step
from kexa.model.linear import Linear, RMSNorm


@dataclass
class Context:
    """What all layers of one forward call share."""

    # [T, K], or [B, 1, T, K] when rows stand at different positions; None where no layer has RoPE
    cos_TK: Tensor | None
    sin_TK: Tensor | None
    turn_TK: Tensor | None  # sin_TK, negative in the first half: what multiplies exchanged halves
    document_ids_BT: Tensor | None
    step: Step | None  # None without a cache
    # Sparse layers hand it their balance loss. A function: FSDP copies a list that holds tensors.
    balance: Callable[[Tensor], None] | None = None

    @property
    def real_BT(self) -> Tensor | None:
        """False at padding; None where there is none."""
        return None if self.document_ids_BT is None else self.document_ids_BT >= 0


def rope_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * theta^(-2i/K)`` in fp32, ``[..., K]`` with both halves equal."""
    exponent = (
        torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    )
    angle = positions[..., None].float() * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to ``x [..., T, K]``: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def unchanged(x: Tensor) -> Tensor:
    """``x`` itself."""
    return x


class Attention(nn.Module):
    """One attention layer; ``layer_type`` is ``"sliding_attention"`` or ``"full_attention"``.

    Queries, keys and values pass through ``operand`` on their way to attention, which a numerics
    policy may replace; the result comes back in the model's dtype.
    """

    operand = staticmethod(unchanged)

    def __init__(self, config: ModelConfig, layer_type: str):
        super().__init__()
        heads, kv_heads, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim = size
        self.window = config.sliding_window if layer_type == "sliding_attention" else None
        self.use_rope = config.rope_layers == "all" or (
            config.rope_layers == "sliding" and self.window is not None
        )
        self.q_proj = Linear(config.hidden_size, heads * size)
        self.k_proj = Linear(config.hidden_size, kv_heads * size)
        self.v_proj = Linear(config.hidden_size, kv_heads * size)
        self.o_proj = Linear(heads * size, config.hidden_size)
        norm = (lambda: RMSNorm(size, config.rms_norm_eps)) if config.use_qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = (
            rearrange(projection(x_BTD), "b t (h k) -> b t h k", k=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if self.use_rope:
            q_BHTK = rotate(q_BHTK, context.cos_TK, context.sin_TK)
            k_BGTK = rotate(k_BGTK, context.cos_TK, context.sin_TK)
        q_BHTK, k_BGTK, v_BGTK = (self.operand(x) for x in (q_BHTK, k_BGTK, v_BGTK))
        mask = None
        if cache is not None:
            keys_BGSK, values_BGSK, mask = cache.update(k_BGTK, v_BGTK, context.step)
        if mask is not None:
            step = context.step
            where = (step.positions_BT, step.start_B, self.window, mask)
            out_BHTK = decode_attention(q_BHTK, keys_BGSK, values_BGSK, *where)
        elif self.window is not None:
            out_BHTK = window_attention(
                q_BHTK, k_BGTK, v_BGTK, self.window, context.document_ids_BT
            )
        else:
            out_BHTK = global_attention(q_BHTK, k_BGTK, v_BGTK, context.document_ids_BT)
        return self.o_proj(rearrange(out_BHTK, "b h t k -> b t (h k)").to(x_BTD.dtype))
