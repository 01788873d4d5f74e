"""Logits, packing, chunked prefill and cached decoding over random tiny configs; greedy tokens.

A slice of the cases that ``python -m benchmarks.parity`` runs, and faults that they must find.
"""

from __future__ import annotations

import dataclasses
import json
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.__main__ import RESULTS
from benchmarks.parity.__main__ import CONFIGS, KINDS, errors, failed, repeat, results
from benchmarks.parity.configs import random_config, random_model
from kexa.interop import save_hf
from kexa.kernels.decode.reference import visible_slots
from kexa.model import attention, cache, generate, moe
from kexa.model.cache import Cache

SEEDS = range(5)


def failures(kind: str, seed: int) -> dict[str, float]:
    return {case: error for case, error in errors(kind, seed).items() if failed(kind, error)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mtp"])  # in test_mtp.py
def test_a_slice_of_the_cases_agrees(kind, seed):
    assert errors(kind, seed)
    assert failures(kind, seed) == {}


def test_the_configs_reach_every_form_of_every_mechanism():
    configs = [random_config(seed) for seed in range(CONFIGS)]
    for what in (
        lambda c: c.tie_word_embeddings,
        lambda c: c.num_nextn_predict_layers,
        lambda c: not c.norm_topk_prob,
        lambda c: c.routed_scaling_factor != 1,
        lambda c: c.n_group > 1 and c.topk_group < c.n_group,
        lambda c: c.num_experts_per_tok == 1,
        lambda c: c.num_experts_per_tok == c.num_experts,
        lambda c: c.num_shared_experts > 1,
        lambda c: c.num_attention_heads > c.num_key_value_heads > 1,
        lambda c: c.first_k_dense_replace == 0,
        lambda c: c.first_k_dense_replace >= c.num_hidden_layers,
        lambda c: c.sliding_window == 1,
        lambda c: set(c.layer_types) == {"full_attention"},
        lambda c: set(c.layer_types) == {"sliding_attention"},
        lambda c: len(set(c.layer_types)) == 2,
        lambda c: c.head_dim * c.num_attention_heads != c.hidden_size,
    ):
        assert sum(bool(what(config)) for config in configs) >= 5


def one_key_more(position_BT, start_B, slots, window):
    return visible_slots(position_BT, start_B, slots, window and window + 1)


def padding_is_seen(position_BT, start_B, slots, window):
    return visible_slots(position_BT, torch.zeros_like(start_B), slots, window)


def over_document_borders(q, k, v, *_):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )


def bias_in_the_weights(self, scores_NE):
    biased_NE = scores_NE + self.e_score_correction_bias
    return moe.route(biased_NE, biased_NE, self.top_k, self.normalise, self.scale)


@pytest.mark.parametrize(
    ("kind", "place", "name", "fault"),
    [
        ("transformers-fp32", attention, "rotate", lambda x, cos, sin: x),
        ("transformers-fp32", moe.SparseMoE, "route", bias_in_the_weights),
        ("transformers-fp64", moe.SparseMoE, "route", bias_in_the_weights),
        ("packed", attention, "global_attention", over_document_borders),
        ("prefill", cache, "visible_slots", one_key_more),
        ("prefill", cache, "visible_slots", padding_is_seen),
        ("decode", cache, "visible_slots", one_key_more),
        ("decode", cache, "visible_slots", padding_is_seen),
        ("decode", Cache, "roll_back", lambda self, tokens: None),
    ],
)
def test_a_planted_fault_is_found(kind, place, name, fault):
    with patch.object(place, name, fault):
        assert any(failures(kind, seed) for seed in SEEDS)


def test_a_failure_is_named_so_that_it_can_be_repeated(capsys):
    """On seed 8, whose config has one layer and an MTP block: all kinds have cases."""
    with patch.object(Cache, "roll_back", lambda self, tokens: None):
        failure = results(range(8, 9))["failures"][0]
        assert (failure["kind"], failure["seed"]) == ("decode", 8)
        assert failure["config"] == dataclasses.asdict(random_config(8))
        assert repeat(8, ["decode"], failure["case"]) == 1
        said = f"decode: {failure['case']}: {failure['error']:.1e} FAILED"
        assert said in capsys.readouterr().out
    assert repeat(8, ["decode"], failure["case"]) == 0
    with pytest.raises(ValueError, match="no case 'another'"):
        repeat(8, ["decode"], "another")


def test_the_committed_results_are_of_these_kinds_and_without_failure():
    found = json.loads((RESULTS / "parity.json").read_text(encoding="utf-8"))
    assert found["configs"] == CONFIGS and found["cases"] >= 5000 and found["failures"] == []
    assert found["kinds"].keys() == KINDS.keys()
    for kind, row in found["kinds"].items():
        assert row["tolerance"] == KINDS[kind].tolerance and not failed(kind, row["worst"])


def test_greedy_tokens_agree_over_window_wraps(tmp_path):
    model = random_model(3, torch.float32)
    save_hf(model, tmp_path, max_shard_bytes=20_000)
    x = torch.randint(0, model.config.vocab_size, (3, 11))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="eager", attn_implementation="sdpa"
    ).generate(
        x,
        attention_mask=torch.ones_like(x),  # else token 0 counts as padding
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generate(model, x, 40, temperature=0), theirs)
