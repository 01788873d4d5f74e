"""Logits and greedy tokens against ``transformers``' ExaoneMoe, through exported checkpoints.

Its norms and router round to fp32 even in an fp64 model, and so do ours: that is why fp64 agrees to
1e-9. Its default expert path refuses fp64 (hence ``experts_implementation="eager"``) and its eager
attention takes the softmax in fp32 (hence ``attn_implementation="sdpa"``).
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from kexa.interop import save_hf
from kexa.model import KexaForCausalLM, ModelConfig, generate


def random_config(seed: int) -> ModelConfig:
    choose = random.Random(seed)
    groups = choose.choice([1, 1, 2])
    experts = groups * choose.choice([2, 3, 4])
    kv_heads = choose.choice([1, 2, 3])
    layers = choose.choice([2, 3, 5])
    pattern = choose.choice(["LLLG", "LG", "G", "L", "GLL"])
    kept = choose.randint(1, groups)
    return ModelConfig(
        vocab_size=choose.choice([53, 64, 97]),
        hidden_size=choose.choice([16, 24, 40]),
        num_hidden_layers=layers,
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
        sliding_window=choose.choice([1, 3, 8]),
        sliding_window_pattern=pattern,
        rope_theta=choose.choice([1e4, 1e6]),
        max_position_embeddings=128,
        num_nextn_predict_layers=choose.randint(0, 1),
    )


def random_model(config: ModelConfig, dtype: torch.dtype) -> KexaForCausalLM:
    model = KexaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for layer in model.moe_layers:
            layer.e_score_correction_bias.normal_(0.0, 0.1)
    return model.to(dtype).eval()


def transformers_model(path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager", attn_implementation="sdpa"
    )


@pytest.mark.parametrize("seed", range(12))
def test_logits_agree(seed, tmp_path):
    torch.manual_seed(seed)
    config = random_config(seed)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model = random_model(config, dtype)
        save_hf(model, tmp_path / str(dtype))
        theirs = transformers_model(tmp_path / str(dtype), dtype)
        x = torch.randint(0, config.vocab_size, (2, 3 * config.sliding_window + 10 + seed % 2))
        with torch.no_grad():
            ours = model(x)
            assert ours.std() > 0.1  # else agreement says nothing
            torch.testing.assert_close(ours, theirs(x).logits, atol=tolerance, rtol=0)


def test_greedy_tokens_agree_over_window_wraps(tmp_path):
    torch.manual_seed(3)
    config = random_config(3)
    model = random_model(config, torch.float32)
    save_hf(model, tmp_path, max_shard_bytes=20_000)
    x = torch.randint(0, config.vocab_size, (3, 11))
    theirs = transformers_model(tmp_path, torch.float32).generate(
        x,
        attention_mask=torch.ones_like(x),  # else token 0 counts as padding
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generate(model, x, 40, temperature=0), theirs)
