"""The self-check must see a wrong result, and the cost model must count what its text says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kexa.config import ModelConfig
from kexa.kernels import check, costs
from kexa.kernels.attention import reference


@pytest.mark.parametrize("operation", check.OPERATIONS)
def test_this_machine_passes(operation):
    result = check.check(operation, "cpu", torch.float32)
    assert result.holds and result.path == "pytorch", result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_faint_fault_and_a_missing_number_are_seen(dtype):
    inputs = [torch.randn(1, n, 20, 8).to(dtype) for n in (2, 1, 1)]
    d_out = torch.randn(1, 2, 20, 8).to(dtype)

    def plain(q, k, v):
        return reference.attention(q, k, v, 4)

    def faint(q, k, v):
        return plain(q, k, v) * (1 + 1e-2)

    def holed(q, k, v):
        return torch.cat(
            [plain(q, k, v)[:, :, :-1], v[:, :1, -1:].expand(1, 2, 1, 8) * torch.nan], 2
        )

    honest = check.Check("attention", "pytorch", dtype, *check.compare(plain, plain, inputs, d_out))
    assert honest.holds, honest
    for fault in (faint, holed):
        errors, allowed = check.compare(fault, plain, inputs, d_out)
        assert not dataclasses.replace(honest, errors=errors, allowed=allowed).holds


def test_attention_cost_counts_the_visible_pairs():
    for tokens, window in ((1, 1), (10, 3), (7, 7), (5, 100)):
        pairs = int(reference.visible(tokens, window).sum())
        cost = costs.attention(tokens, heads=4, kv_heads=2, head_dim=8, window=window)
        assert cost.flops == 4 * 4 * 8 * pairs  # two products of 2 FLOPs per pair, head and feature
        assert cost.bytes == 2 * tokens * 8 * (4 + 2 + 2 + 4)


def test_least_time_is_set_by_the_scarcer_resource():
    cost = costs.grouped_gemm(rows=10, inputs=4, outputs=3, experts_used=2)
    assert cost.flops == 240 and cost.bytes == 2 * (24 + 70)
    loss = costs.linear_cross_entropy(rows=10, inputs=4, vocabulary=7)
    assert loss.flops == 560 and loss.bytes == 2 * (40 + 28)
    assert cost.least_seconds(flops=240, bandwidth=1e9) == 1.0
    assert cost.least_seconds(flops=1e9, bandwidth=188) == 1.0


def test_experts_move_no_gathered_row_and_no_unweighed_product():
    shape = {"tokens": 5, "top_k": 2, "experts_used": 3}
    up = costs.expert_up(**shape, inputs=4, inner=7)
    assert up.flops == 2 * (10 * 14 * 4) + 5 * 10 * 7
    assert up.bytes == 2 * (3 * 14 * 4 + 10 * 4 + 10 * 14 + 10 * 7) + 8 * 10
    down = costs.expert_down(**shape, inner=7, outputs=4)
    assert down.flops == 2 * (10 * 4 * 7) + 2 * 10 * 4
    assert down.bytes == 2 * (3 * 4 * 7 + 10 * 7 + 2 * 10 * 4 + 5 * 4) + (8 + 4) * 10


def test_the_experts_products_wait_for_arithmetic_at_the_published_shapes():
    model = ModelConfig()
    D, F = model.hidden_size, model.moe_intermediate_size
    tokens, top_k, experts = 8192, model.num_experts_per_tok, model.num_experts
    up = costs.expert_up(tokens, top_k, D, F, experts)
    down = costs.expert_down(tokens, top_k, F, D, experts)
    for cost in (up, down):
        assert cost.least_seconds() == cost.flops / costs.H100_FLOPS
    pairs, weights = tokens * top_k, 2 * experts * D * F
    separate_up = 2 * weights + 2 * pairs * (3 * D + 5 * F) + 8 * pairs
    separate_down = weights + 2 * pairs * (F + 8 * D + 5 * D / top_k) + 20 * pairs
    said = [round(n / 1e9, 1) for n in (up.bytes, separate_up, down.bytes, separate_down)]
    assert said == [8.1, 10.2, 5.2, 10.4]
    assert separate_down / costs.H100_BYTES > down.least_seconds()


def test_fp8_product_moves_codes_scales_and_bf16_rows():
    cost = costs.scaled_gemm(rows=256, inputs=128, outputs=384, experts_used=2)
    assert cost.flops == 2 * 256 * 128 * 384
    codes, scales = 2 * 384 * 128 + 256 * 128, 2 * 3 + 256
    assert cost.bytes == codes + 4 * scales + 2 * 256 * 384


def test_costs_of_row_operations_are_their_bytes():
    assert costs.rms_norm(rows=3, features=5).bytes == 2 * (15 + 5 + 15)  # x, weight, y
    assert costs.swiglu(rows=3, features=5).bytes == 2 * 3 * 15  # gate, up, y
    for cost in (costs.rms_norm(8192, 6144), costs.swiglu(65536, 2048)):
        assert cost.least_seconds() == cost.bytes / costs.H100_BYTES
