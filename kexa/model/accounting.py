"""Sizes and costs of a model from its configuration alone.

    total      every weight of the main model
    active     weights that a token meets: attention, dense FFN or K routed experts with the shared
               one and the router, norms, head; not the input embedding, which is a look-up
    kv bytes   key and value of every KV head, per token and layer; a window layer holds at most
               ``window`` tokens
    training   6 FLOPs per active weight and token (2 forward, 4 backward), without the products
               of queries and keys

reported: 236B total, 23B active, 0.52B MTP, 36 window and 12 global layers, 1.52e24 FLOPs for 11T
tokens (which is 6 * 23e9 * 11e12: the report rounds the active weights to 23B). The exact counts
from the published shapes are 236,571,156,352 and 528,513,280 (MTP).
"""

from __future__ import annotations

from dataclasses import dataclass

from kexa.config import ModelConfig

REPORTED_ACTIVE = 23_000_000_000  # rounded, as the report's compute figure uses it


@dataclass(frozen=True)
class Accounting:
    """Counts of weights; ``kv_bytes_per_token_global``: BF16 bytes that a further token costs."""

    total: int
    mtp: int
    active: int
    attention: int
    dense_ffn: int
    experts_active: int
    head: int
    window_layers: int
    global_layers: int
    kv_bytes_per_token_global: int


def account(config: ModelConfig) -> Accounting:
    """All counts of one configuration."""
    c = config
    layers, hidden = c.num_hidden_layers, c.hidden_size
    dense_layers = min(c.first_k_dense_replace, layers)
    sparse_layers = layers - dense_layers
    attention = _attention(c)
    dense = 3 * hidden * c.intermediate_size
    expert = 3 * hidden * c.moe_intermediate_size
    shared = c.num_shared_experts * expert
    router = c.num_experts * hidden
    bias = c.num_experts  # the correction bias: in the checkpoint, but not trained by gradients
    norms = 2 * hidden * layers + hidden
    head = c.vocab_size * hidden
    embedding = 0 if c.tie_word_embeddings else head
    sparse = c.num_experts * expert + shared + router + bias
    sparse_active = c.num_experts_per_tok * expert + shared + router + bias
    mtp = 2 * hidden * hidden + attention + dense + 5 * hidden if c.num_nextn_predict_layers else 0
    window_layers = sum(kind == "sliding_attention" for kind in c.layer_types)
    return Accounting(
        total=layers * attention
        + dense_layers * dense
        + sparse_layers * sparse
        + norms
        + head
        + embedding,
        mtp=mtp,
        active=layers * attention
        + dense_layers * dense
        + sparse_layers * sparse_active
        + norms
        + head,
        attention=layers * attention,
        dense_ffn=dense_layers * dense,
        experts_active=sparse_layers * sparse_active,
        head=head,
        window_layers=window_layers,
        global_layers=layers - window_layers,
        kv_bytes_per_token_global=(layers - window_layers) * _kv_bytes(c, bytes_per_number=2),
    )


def kv_cache_bytes(config: ModelConfig, tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values after ``tokens`` tokens of one sequence, without draft slots."""
    per_layer = _kv_bytes(config, bytes_per_number)
    counts = account(config)
    held = counts.global_layers * tokens + counts.window_layers * min(tokens, config.sliding_window)
    return held * per_layer


def training_flops(active: int, tokens: float) -> float:
    """``6 * active * tokens``, as the report counts: attention scores are left out."""
    return 6.0 * active * tokens


def forward_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of one token in one forward call behind ``context`` earlier tokens.

    ``main``: the main model with its head. ``mtp``: the MTP block with the shared head (0 without
    MTP). The products of queries, keys and values are included.
    """
    counts = account(config)
    seen_window = min(context + 1, config.sliding_window)
    seen = counts.window_layers * seen_window + counts.global_layers * (context + 1)
    per_key = 4.0 * config.num_attention_heads * config.head_dim  # q.k and weight * v
    mtp = 2.0 * (counts.mtp + counts.head) + per_key * (context + 1) if counts.mtp else 0.0
    return {"main": 2.0 * counts.active + per_key * seen, "mtp": mtp}


def draft_break_even(
    config: ModelConfig, batch_size: int, context: int, flops_per_byte: float
) -> float:
    """Acceptance above which self-drafting makes decoding cheaper.

    A plain step is one call of the main model on one token per row. A round of drafting is one call
    of the MTP block and one of the main model on two tokens per row; it yields 1 + a tokens per
    row. So

        a* = (cost(main, 2 tokens) + cost(MTP, 1 token)) / cost(main, 1 token) - 1
        cost = max(bytes read, FLOPs / flops_per_byte)

    Bytes are BF16 weights, each read once per call, and keys and values. Of E experts, N tokens
    that choose K at random touch E (1 - (1 - K/E)^N): drafting reads more experts when a batch is
    small and pays in FLOPs when it is large.

    Args:
        batch_size, context: rows decoded together, and tokens behind each.
        flops_per_byte: the device's peak FLOP/s over its bytes/s; infinite if only bytes count.
    """
    counts, flops = account(config), forward_flops(config, context)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    sparse_layers = config.num_hidden_layers - min(
        config.first_k_dense_replace, config.num_hidden_layers
    )
    always = counts.active - sparse_layers * config.num_experts_per_tok * expert

    def main(tokens_per_row: int) -> float:
        tokens = tokens_per_row * batch_size
        touched = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens
        weights = always + sparse_layers * config.num_experts * touched * expert
        read = 2 * weights + batch_size * kv_cache_bytes(config, context)
        return max(read, tokens * flops["main"] / flops_per_byte)

    mtp_read = 2 * (counts.mtp + counts.head) + batch_size * context * _kv_bytes(config, 2)
    mtp = max(mtp_read, batch_size * flops["mtp"] / flops_per_byte)
    return (main(2) + mtp) / main(1) - 1


def _attention(c: ModelConfig) -> int:
    projections = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    return projections + (2 * c.head_dim if c.use_qk_norm else 0)


def _kv_bytes(c: ModelConfig, bytes_per_number: int) -> int:
    return 2 * c.num_key_value_heads * c.head_dim * bytes_per_number
