"""A model of a few thousand parameters and random batches that are a function of the step."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from kexa.config import ModelConfig
from kexa.data import Document
from kexa.model import KexaForCausalLM
from kexa.train.evaluation import held_out

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


@pytest.fixture(scope="module")
def vocabulary():
    """A tokenizer of five words."""
    words = {w: i for i, w in enumerate(["[PAD]", "[BOS]", "aa", "b", "c"])}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="c"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return vocabulary


@pytest.fixture(scope="module")
def sets(vocabulary):
    """Two held-out rows of "en" and of "code"."""
    documents = {
        "en": [Document("aa b aa b", "test", "en", "en", "1")],
        "code": [Document("c c c", "test", "en", "code", "2")],
    }
    return held_out(vocabulary, documents, length=10, rows=2, seed=0)


def checkpoint_times(directory) -> dict[str, int]:
    """When each checkpoint under a directory was written."""
    manifests = directory.rglob("step-*/manifest.json")
    return {str(path): path.stat().st_mtime_ns for path in manifests}
