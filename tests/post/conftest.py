"""A tokenizer with real merges and a model too small to know anything: enough for the mechanics."""

from __future__ import annotations

import pytest
import torch

from kexa.config import ModelConfig
from kexa.model import KexaForCausalLM
from kexa.post import tasks
from kexa.tokenizer import bpe
from kexa.tokenizer.vocabulary import PHRASES

VOCAB = 640


@pytest.fixture(scope="session")
def tokenizer():
    drawn = [t for f in tasks.FAMILIES for t in tasks.generate(f, "sft", 200, 0)]
    return bpe.train(
        [f"{t.prompt}\n{t.reasoning}.\n\n{t.answer}" for t in drawn], VOCAB, PHRASES, "NFC"
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        max_position_embeddings=512,
        num_nextn_predict_layers=1,
    )
    model = KexaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
