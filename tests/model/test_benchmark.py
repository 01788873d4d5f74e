"""The benchmark of the whole model compares equal results, and says nothing about speed else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import model as benchmark
from benchmarks.model import OURS, THEIRS, Shape, Variant

SMALL = Shape(
    2,
    20,
    target=1.0,
    rounds=3,
    changes=(
        ("vocab_size", 61),
        ("hidden_size", 24),
        ("num_hidden_layers", 4),
        ("intermediate_size", 40),
        ("moe_intermediate_size", 16),
        ("num_experts", 6),
        ("num_experts_per_tok", 2),
        ("sliding_window", 5),
    ),
)
EAGER = Variant(torch.float32, "eager", "grouped_mm")


def test_a_training_step_meets_the_fastest_rival():
    row, winners = benchmark.training(SMALL, (*OURS, EAGER, *THEIRS[:1]))
    assert set(row["ratio"]) == {"median", "low", "high"}
    assert [bool(v.attention) for v in winners] == [False, True]
    assert set(row["trial milliseconds"]) == {str(v) for v in (*OURS, EAGER, *THEIRS[:1])}
    assert list(row["milliseconds"]) == [str(v) for v in winners]


def test_generation_and_prefill_are_compared_on_equal_results():
    for row in (benchmark.generation(SMALL, 4), benchmark.prefill(SMALL)):
        assert row["ratio"]["median"] > 0 and "red" not in row


@pytest.mark.parametrize("what", ["loss", "gradients", "logits", "tokens"])
def test_no_ratio_where_results_disagree(monkeypatch, what):
    if what == "gradients":
        monkeypatch.setattr(benchmark, "SAME_GRADIENT", 1e-12)
    else:  # the other side reads other weights
        load = Variant.load

        def other(self, folder):
            model = load(self, folder)
            if self.attention:
                with torch.no_grad():
                    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
            return model

        monkeypatch.setattr(Variant, "load", other)
    if what == "logits":
        row = benchmark.prefill(SMALL)
    elif what == "tokens":
        row = benchmark.generation(SMALL, 4)
    else:
        row, winners = benchmark.training(SMALL, (*OURS, EAGER))
        assert not winners
    assert what in row["red"] and not {"ratio", "milliseconds"} & row.keys()


def test_variants_that_keep_too_much_are_known():
    config = benchmark.CONFIG
    assert Variant(torch.float32, "eager", "eager").kept(config, 1, 16_384) > benchmark.ROOM
    assert Variant(torch.float32, "sdpa", "batched_mm").kept(config, 4, 512) > benchmark.ROOM
    assert Variant(torch.float32, "sdpa", "grouped_mm").kept(config, 1, 16_384) == 0


def test_a_filled_cache_is_one_that_the_model_continues():
    config = dataclasses.replace(SMALL.config, max_position_embeddings=64)
    cache = benchmark.filled(config, 40)
    model = benchmark.KexaForCausalLM(config).eval()
    assert model(torch.ones(1, 1, dtype=torch.int64), cache=cache).isfinite().all()
    assert cache.longest == 41


def test_the_cache_of_a_hybrid_is_about_a_quarter():
    row = benchmark.cache_bytes(8192)
    assert row["share"] == pytest.approx((2 * 8192 + 6 * (128 + 8)) / (8 * 8192), abs=1e-5)


def test_a_sparse_layer_is_compared_with_a_dense_product_of_its_flops():
    row = benchmark.experts(torch.float32, 0.6, SMALL.config, 40)
    assert 0 < row["speed over dense"]["low"] <= row["speed over dense"]["high"]


def test_loading_reports_the_peak_of_a_fresh_process():
    size = benchmark.loading(SMALL.config)["megabytes"]
    assert 0 < size["model"] < size["imports"] <= size["peak"]
