"""Tiny models: every mechanism present, nothing larger than the tests need."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kexa.model import KexaForCausalLM, ModelConfig

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_experts=6,
    num_experts_per_tok=2,
    sliding_window=5,
    max_position_embeddings=256,
    num_nextn_predict_layers=1,
)


@pytest.fixture(autouse=True)
def repeatable():
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


@pytest.fixture
def build():
    """``build(**changes)``: a model with weights large enough that attention and routing are not
    uniform, and a correction bias that changes the selection."""

    def build(dtype: torch.dtype = torch.float32, **changes) -> KexaForCausalLM:
        model = KexaForCausalLM(dataclasses.replace(TINY, layer_types=(), **changes)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
            for layer in model.moe_layers:
                layer.e_score_correction_bias.normal_(0.0, 0.1)
        return model.eval()

    return build


@pytest.fixture
def ids():
    """``ids(B, T)``: random token ids."""
    return lambda batch, length: torch.randint(0, TINY.vocab_size, (batch, length))
