"""The MTP block once more, in NumPy: a position and a head at a time, sharing no code with kexa.

    z_t = fc [ norm_e(Emb(x_{t+1})) ; norm_h(h_t) ]        h: the main model's, after its final norm
    y_t = z_t + o(attention over 0..t of norm(z))          grouped heads, QK-norm, no positions
    logits of x_{t+2} = lm_head(norm(y_t + down(silu(gate(n_t)) * up(n_t)))),    n_t = norm(y_t)

Weights go by their published names. Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import numpy as np


def mtp_logits(
    weights: dict[str, np.ndarray], ids: list[int], hidden_TD: np.ndarray, head_dim: int, eps: float
) -> np.ndarray:
    """Logits ``[T - 1, V]`` for one document of T tokens; row t is about the token at t + 2."""

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x) + eps) * weights[f"mtp.{name}.weight"]

    def heads(x, name):
        return (weights[f"mtp.layers.0.self_attn.{name}_proj.weight"] @ x).reshape(-1, head_dim)

    def mlp(x, name):
        return weights[f"mtp.layers.0.mlp.{name}_proj.weight"] @ x

    keys, values, logits = [], [], []
    for hidden, following in zip(hidden_TD[:-1], ids[1:], strict=True):
        embedding = weights["model.embed_tokens.weight"][following]
        pair = norm(embedding, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")
        z = weights["mtp.fc.weight"] @ np.concatenate(pair)
        normed = norm(z, "layers.0.input_layernorm")
        keys.append([norm(k, "layers.0.self_attn.k_norm") for k in heads(normed, "k")])
        values.append(heads(normed, "v"))
        queries, mixed = heads(normed, "q"), []
        for h, query in enumerate(queries):
            group = h * len(keys[0]) // len(queries)
            query = norm(query, "layers.0.self_attn.q_norm")
            scores = np.array([query @ key[group] for key in keys]) / np.sqrt(head_dim)
            share = np.exp(scores - scores.max())
            mixed.append(share / share.sum() @ np.array([value[group] for value in values]))
        y = z + weights["mtp.layers.0.self_attn.o_proj.weight"] @ np.concatenate(mixed)
        normed = norm(y, "layers.0.post_attention_layernorm")
        gate = mlp(normed, "gate")
        y = y + mlp(gate / (1 + np.exp(-gate)) * mlp(normed, "up"), "down")
        logits.append(weights["lm_head.weight"] @ norm(y, "norm"))
    return np.array(logits)
