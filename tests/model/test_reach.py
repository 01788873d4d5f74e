"""The reach of stacked layers, counted by hand."""

from __future__ import annotations

import pytest
import torch

from kexa.model import KexaForCausalLM, ModelConfig
from kexa.model.reach import reach


def model(pattern: str) -> KexaForCausalLM:
    torch.manual_seed(0)
    return KexaForCausalLM(
        ModelConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=len(pattern), num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, intermediate_size=16, moe_intermediate_size=8,
            num_experts=4, num_experts_per_tok=2, sliding_window=4, sliding_window_pattern=pattern,
            max_position_embeddings=64,
        )
    )  # fmt: skip


@pytest.mark.parametrize("pattern, width", [("L", 4), ("LL", 7), ("LLL", 10), ("LLLG", 30)])
def test_reach_of_a_stack(pattern, width):
    seen = reach(model(pattern), 30)
    expected = [min(t + 1, width) for t in range(30)]
    assert seen.sum(1).tolist() == expected
    assert not seen.triu(1).any()  # nobody sees the future


def test_documents_never_see_each_other():
    documents = torch.tensor([0] * 11 + [1] * 19)
    seen = reach(model("LLLG"), 30, documents)
    assert not seen[documents[:, None] != documents[None, :]].any()
    assert seen[10, :11].all() and seen[29, 11:].all()


def test_more_tokens_than_words_is_an_error():
    with pytest.raises(ValueError, match="tokens=41"):
        reach(model("L"), 41)
