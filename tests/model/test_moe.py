"""Routing and balancing against loops over tokens and experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


def route_by_loop(layer, u, top_k, n_group, topk_group):
    """(experts, weights) of one token from the equations, without tensors of tokens."""
    scores = [float(torch.sigmoid(u @ e)) for e in layer.gate.weight]
    biased = [s + float(b) for s, b in zip(scores, layer.e_score_correction_bias, strict=True)]
    size = len(scores) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
    worth = [sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
    allowed = [i for g in best for i in groups[g]]
    chosen = sorted(allowed, key=lambda i: -biased[i])[:top_k]
    total = sum(scores[i] for i in chosen) + 1e-20
    return chosen, [2.5 * scores[i] / total for i in chosen]


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (3, 2), (2, 1)])
def test_mixture_equals_a_loop_over_tokens(build, n_group, topk_group):
    model = build(n_group=n_group, topk_group=topk_group)
    layer = model.moe_layers[1]
    x = torch.randn(2, 9, 24)
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for b in range(2):
            for t in range(9):
                u = x[b, t]
                for e, weight in zip(*route_by_loop(layer, u, 2, n_group, topk_group), strict=True):
                    gate, up = (layer.experts.gate_up_proj[e] @ u).chunk(2)
                    expected[b, t] += weight * (layer.experts.down_proj[e] @ (F.silu(gate) * up))
                expected[b, t] += layer.shared_experts(u)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_bias_changes_selection_but_not_weights(build):
    layer = build().moe_layers[0]
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    layer.e_score_correction_bias.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    routing = layer.route(scores)
    assert routing.chosen_NK.sort().values.tolist() == [[0, 5]]
    weights = dict(zip(routing.chosen_NK[0].tolist(), routing.gates_NK[0].tolist(), strict=True))
    assert weights == pytest.approx({0: 2.5 * 0.1 / 0.7, 5: 2.5 * 0.6 / 0.7})
    layer.e_score_correction_bias.zero_()
    assert layer.route(scores).chosen_NK.sort().values.tolist() == [[4, 5]]


def test_one_expert_may_take_every_token(build):
    model = build()
    for layer in model.moe_layers:
        layer.e_score_correction_bias.copy_(torch.tensor([9.0, 8.0, 0, 0, 0, 0]))
    model.train().loss(torch.randint(0, 61, (2, 10)))
    assert model.expert_load().tolist() == [[20, 20, 0, 0, 0, 0]] * 3


def test_bias_rule_and_cleared_counts(build):
    model = build()
    layer = model.moe_layers[0]
    layer.e_score_correction_bias.zero_()
    layer.load_E.copy_(torch.tensor([4.0, 0, 2, 2, 3, 1]))  # mean 2
    model.update_balance_bias(step=0.25)
    assert layer.e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, -0.25, 0.25]
    assert model.expert_load().sum() == 0


def test_counts_accumulate_in_training_only(build, ids):
    model, x = build(), ids(3, 10)
    model(x)
    assert model.expert_load().sum() == 0
    model.train()
    with torch.no_grad():
        model(x)
    assert model.expert_load().sum() == 0
    model(x)
    model(x)
    assert model.expert_load().sum(1).tolist() == [2 * 3 * 10 * 2] * 3


def test_bias_steps_even_out_a_skewed_router(build, ids):
    """Pushed far enough, the rule alone moves load away from the favoured experts."""
    model, x = build().train(), ids(8, 32)
    layer = model.moe_layers[0]
    layer.e_score_correction_bias.copy_(torch.tensor([0.5, 0.5, 0, 0, 0, 0]))

    def spread():
        model(x)
        load = model.expert_load()[0].clone()
        return float(load.max() / load.mean())

    before = spread()
    for _ in range(100):
        model.update_balance_bias(step=0.02)
        after = spread()
    assert before > 2.5 and after < 1.25


def test_balance_loss_equals_a_loop(build):
    model = build().train()
    layer = model.moe_layers[1]
    x = torch.randn(3, 7, 24)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, :2] = False
    balance = []
    layer(x, real, balance.append)
    per_sequence = []
    for b in range(3):
        tokens = [x[b, t] for t in range(7) if real[b, t]]
        scores = [torch.sigmoid(layer.gate.weight @ u) for u in tokens]
        loss = 0.0
        for i in range(6):
            hits = sum(int(i in s.topk(2).indices) for s in scores)  # unbiased scores, as printed
            f = 6 / (2 * len(tokens)) * hits
            p = sum(s[i] / s.sum() for s in scores) / len(tokens)
            loss = loss + f * p
        per_sequence.append(loss)
    torch.testing.assert_close(balance[0], sum(per_sequence) / 3, atol=1e-5, rtol=1e-5)


def test_balance_gradient_reaches_the_router_only_through_p(build):
    """Even routing is the minimum: the loss is 1 per layer there and larger when skewed."""
    model = build().train()
    layer = model.moe_layers[0]
    with torch.no_grad():
        layer.gate.weight.zero_()
    x = torch.randn(1, 30, 24)
    balance = []
    layer(x, balance=balance.append)
    torch.testing.assert_close(balance[0], torch.tensor(1.0))
    balance[0].backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    assert layer.experts.down_proj.grad is None
