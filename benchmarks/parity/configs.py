"""Random tiny configs and models, and the numerics under which a model meets itself.

A seed gives a config and its weights. Norm statistics, router scores and the table of RoPE are fp32
in a model of any dtype, as in the published implementation, which is why fp64 meets
``transformers`` at 1e-9: to the last bit even, since norms round to fp32 whatever another order of
summation changes before them. Router scores and RoPE depend in their own last bits on how many rows
a product has and on where in a row a token stands, so they bound how closely a model meets itself:
about 1e-6. What is asked there is whether the right numbers meet, and that shows best where nothing
is rounded to fp32: :func:`all_in_fp64`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from kexa.kernels.norm import reference
from kexa.model import KexaForCausalLM, ModelConfig, transformer
from kexa.model.linear import RMSNorm
from kexa.model.moe import Router


def random_config(seed: int) -> ModelConfig:
    """A tiny config in which each published mechanism may take any form it has."""
    choose = random.Random(seed)
    groups = choose.choice([1, 1, 2, 3])
    experts = groups * choose.choice([2, 3, 4])
    kept = choose.randint(1, groups)
    kv_heads = choose.choice([1, 2, 3])
    return ModelConfig(
        vocab_size=choose.choice([54, 64, 97]),
        hidden_size=choose.choice([16, 24, 40]),
        num_hidden_layers=choose.choice([1, 2, 3, 5]),
        num_attention_heads=kv_heads * choose.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=choose.choice([6, 8, 16]),
        intermediate_size=choose.choice([20, 33]),
        moe_intermediate_size=choose.choice([7, 12]),
        num_experts=experts,
        num_experts_per_tok=choose.randint(1, kept * experts // groups),
        num_shared_experts=choose.choice([1, 2]),
        first_k_dense_replace=choose.randint(0, 2),
        norm_topk_prob=choose.random() < 0.8,
        routed_scaling_factor=choose.choice([1.0, 2.5]),
        n_group=groups,
        topk_group=kept,
        sliding_window=choose.choice([1, 2, 3, 5, 8]),
        sliding_window_pattern="".join(choose.choices("LLG", k=choose.randint(1, 4))),
        rope_theta=choose.choice([1e4, 1e6]),
        rms_norm_eps=choose.choice([1e-5, 1e-6]),
        max_position_embeddings=128,
        tie_word_embeddings=choose.random() < 0.3,
        num_nextn_predict_layers=choose.randint(0, 1),
    )


def random_model(seed: int, dtype: torch.dtype = torch.float64) -> KexaForCausalLM:
    """Weights large enough that attention and routing are uneven; a bias that moves selection."""
    torch.manual_seed(seed)
    model = KexaForCausalLM(random_config(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for layer in model.moe_layers:
            layer.e_score_correction_bias.normal_(0.0, 0.1)
    return model.to(dtype).eval()


@contextmanager
def all_in_fp64() -> Iterator[None]:
    """Inside, what a model computes in fp32 whatever its dtype follows its dtype instead."""

    def norm(self: RMSNorm, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)

    def scores(self: Router, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight).sigmoid()

    def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        exponent = torch.arange(0, head_dim, 2, dtype=dtype).repeat(2) / head_dim
        angle = positions[..., None] / theta**exponent
        return angle.cos(), angle.sin()

    with (
        patch.object(RMSNorm, "forward", norm),
        patch.object(Router, "forward", scores),
        patch.object(transformer, "rope_table", rope_table),
    ):
        yield
