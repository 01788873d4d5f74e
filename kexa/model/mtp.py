"""Multi-token prediction: one extra block that predicts the token after next.

At position t the block reads the main model's hidden state after its final norm, h_t, and the
shared embedding of the next token x_{t+1}, and predicts x_{t+2} (reported: depth 1, loss weight
0.05):

    z_t = fc [ RMSNorm_e(Emb(x_{t+1})) ; RMSNorm_h(h_t) ]        embedding first
    logits of x_{t+2} = lm_head(RMSNorm(Layer(z)_t))

The layer is a pre-norm block with global attention (QK-norm, NoPE) and a dense SwiGLU; embedding
and head are the main model's. Gradients flow into h_t: the block trains the trunk too (chosen, as
DeepSeek-V3).

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kexa.config import ModelConfig
from kexa.model.attention import Attention, Context
from kexa.model.cache import LayerCache
from kexa.model.linear import Linear, RMSNorm, SwiGLU
from kexa.model.recompute import Recomputed
from kexa.model.step import takes_step


class MTPLayer(Recomputed):
    """Pre-norm decoder layer: global attention, dense SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, "full_attention")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def block(self, x_BTD: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        if takes_step(self, context, cache):
            return cache.layer_step(x_BTD, context, cache)
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class MTPBlock(nn.Module):
    """Everything named ``mtp.*`` in a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([MTPLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embedding_BTD: Tensor,
        hidden_BTD: Tensor,
        context: Context,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Normed output [B, T, D]; at t the embedding is of token t + 1, the hidden state of t."""
        pair = (self.pre_fc_norm_embedding(embedding_BTD), self.pre_fc_norm_hidden(hidden_BTD))
        return self.norm(self.layers[0](self.fc(torch.cat(pair, dim=-1)), context, cache))
