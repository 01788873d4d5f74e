"""Counts from the configuration against the built model and the published numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kexa.model import KexaForCausalLM, ModelConfig
from kexa.model.accounting import (
    REPORTED_ACTIVE,
    account,
    draft_break_even,
    forward_flops,
    kv_cache_bytes,
    training_flops,
)

PUBLISHED = ModelConfig(num_nextn_predict_layers=1)


def built(config):
    """(main, MTP) numbers of a model on the meta device, correction biases included."""
    with torch.device("meta"):
        state = KexaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    mtp = sum(t.numel() for name, t in state.items() if name.startswith("mtp."))
    return sum(t.numel() for t in state.values()) - mtp, mtp


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 3, "num_shared_experts": 2},
        {"first_k_dense_replace": 9, "num_hidden_layers": 2, "num_nextn_predict_layers": 0},
        {"tie_word_embeddings": True, "use_qk_norm": False},
        {"sliding_window_pattern": "GL", "num_hidden_layers": 5},
    ],
)
def test_counts_equal_the_built_model(changes, build):
    config = dataclasses.replace(build().config, layer_types=(), **changes)
    counts = account(config)
    assert (counts.total, counts.mtp) == built(config)


def test_the_published_numbers():
    counts = account(PUBLISHED)
    assert (counts.total, counts.mtp) == (236_571_156_352, 528_513_280) == built(PUBLISHED)
    assert round(counts.active / 1e9, 2) == 22.72
    assert round(counts.attention / 1e9, 3) == 5.436
    assert round(counts.dense_ffn / 1e9, 3) == 0.340
    assert round(counts.experts_active / 1e9, 3) == 16.005
    assert round(counts.head / 1e9, 3) == 0.944
    assert (counts.window_layers, counts.global_layers) == (36, 12)
    assert counts.kv_bytes_per_token_global == 48 * 1024
    assert f"{training_flops(REPORTED_ACTIVE, 11e12):.2e}" == "1.52e+24"


def test_cache_bytes_are_those_of_the_buffers(build, ids):
    model = build()
    cache = model.new_cache(1, chunk=4)
    with torch.no_grad():
        model(ids(1, 64), cache=cache)
    spare = 3 * 4 * 2 * 2 * 8  # three window layers hold a chunk beyond the window
    assert 4 * (cache.numel() - spare) == kv_cache_bytes(model.config, 64, bytes_per_number=4)
    assert kv_cache_bytes(PUBLISHED, 262_144) == 12 * 2**30 + 36 * 128 * 4096


def test_flops_count_the_attended_keys():
    config = dataclasses.replace(PUBLISHED, num_nextn_predict_layers=0)
    first, later = forward_flops(config, 0), forward_flops(config, 1000)
    per_key = 4 * 64 * 128
    assert later["main"] - first["main"] == per_key * (36 * 127 + 12 * 1000)
    assert first["mtp"] == 0
    assert forward_flops(PUBLISHED, 0)["mtp"] == 2 * (528_513_280 + 153_600 * 6144) + per_key


def test_break_even_by_hand():
    """All experts used and no context: every weight is read in any call."""
    config = dataclasses.replace(PUBLISHED, num_experts=8)
    counts = account(config)
    assert draft_break_even(config, 1, 0, math.inf) == pytest.approx(
        (counts.mtp + counts.head) / counts.active
    )
    # Where only FLOPs count, two tokens cost twice one, and no acceptance is enough.
    assert draft_break_even(PUBLISHED, 1, 0, 1e-9) > 1
    # Batch 1 of the published model: one token touches 8 of 128 experts, two touch 15.5.
    counts = account(PUBLISHED)
    two = counts.active + 47 * (15.5 - 8) * 3 * 6144 * 2048
    expected = (two + counts.mtp + counts.head) / counts.active - 1
    assert draft_break_even(PUBLISHED, 1, 0, math.inf) == pytest.approx(expected)
