"""A byte tokenizer and a tiny random model: enough for every mechanism of evaluation."""

import pytest
import torch

from kexa.model import KexaForCausalLM, ModelConfig
from kexa.tokenizer import SPECIAL_TOKENS, bpe
from kexa.tokenizer.vocabulary import WORDS


@pytest.fixture(scope="session")
def tokenizer():
    return bpe.build([*SPECIAL_TOKENS, *bpe.byte_alphabet()], [], WORDS, "NFC")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return KexaForCausalLM(config).eval()
