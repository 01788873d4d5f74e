"""A model of a few thousand parameters and random batches that are a function of the step."""

from types import SimpleNamespace

import pytest
import torch

from kexa.config import ModelConfig
from kexa.model import KexaForCausalLM

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    sliding_window=4,
    max_position_embeddings=64,
    num_nextn_predict_layers=1,
)
OPTIMIZATION = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1)


def tiny_model(seed: int = 0) -> KexaForCausalLM:
    torch.manual_seed(seed)
    return KexaForCausalLM(CONFIG)


def batch_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(2, 64, (4, 12), generator=generator)}


def loss_fn(model, batch):
    return model.loss(batch["input_ids"])


@pytest.fixture
def model():
    return tiny_model()
