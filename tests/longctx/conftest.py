"""A tokenizer, a haystack and a model, all tiny."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kexa.config import ExtensionConfig, ExtensionStage, ModelConfig
from kexa.data import Document, encode
from kexa.model import KexaForCausalLM

WORDS = ("the", "of", "and", "river", "stone", "house", "light", "over", "under", "people")


def text(words: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(words)) + "."


def documents(count: int) -> list[Document]:
    return [Document(text(4 + 3 * i, i), "test", "en", "en", str(i)) for i in range(count)]


def train(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[BOS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(400)] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session", params=[258, 300], ids=["bytes", "merges"])
def any_tokenizer(request):
    return train(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    return train(300)


@pytest.fixture(scope="session")
def haystack(tokenizer):
    return encode(tokenizer, documents(40))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return KexaForCausalLM(
        ModelConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            sliding_window_pattern="LG",
            max_position_embeddings=256,
            bos_token_id=1,
            initializer_range=0.5,
        )
    )


@pytest.fixture
def stage():
    return ExtensionStage(
        sequence_length=64,
        rows={"rehearsal": 2, "reasoning": 4, "long": 2},
        needles=2,
        steps=3,
        rounds=3,
        learning_rate=1e-2,
        weight_decay=0.1,
    )


@pytest.fixture
def config(stage):
    return ExtensionConfig(
        stages={"first": stage},
        haystack="en",
        shortest=32,
        digits=2,
        warmup_share=0.1,
        decay_share=0.3,
        mtp_weight=0.0,
        balance_weight=1e-4,
        balance_step=1e-3,
        numerics="fp32",
        checkpoint_every=2,
        probe_lengths=(32, 64),
        probe_depths=(0.0, 1.0),
        probe_trials=4,
        probe_distractors=1,
        threshold=0.9,
        short_rise=0.1,
        position_rows=2,
    )


@pytest.fixture
def cells():
    """Grids from a plain table, for the gate's arithmetic."""
    import numpy as np

    from kexa.longctx.niah import Grid

    def make(lengths, columns, trials=10):
        hits = np.array(columns).T
        return Grid(tuple(range(len(hits))), tuple(lengths), hits, trials)

    return SimpleNamespace(grid=make)
