"""Figures of a step: each against its definition, none of them felt by training."""

import math

import pytest
import torch

from kexa.kernels.fp8.emulated import quantize
from kexa.model.attention import Attention
from kexa.train import build_optimizers, fit, set_numerics
from kexa.train.metrics import Monitor, largest_logit, scalars, violation
from kexa.train.optim import role
from tests.train.conftest import OPTIMIZATION, batch_at, loss_fn, tiny_model


def train(numerics, every, directory=None, take=None, steps=3, accumulate=1):
    model = tiny_model()
    set_numerics(model, numerics)
    optimizers = build_optimizers(model, OPTIMIZATION)
    records = []
    for record in fit(
        model, optimizers, batch_at, loss_fn, steps, lambda _: 1.0, accumulate=accumulate,
        clip=0.1, checkpoint_dir=directory, checkpoint_every=1, metrics_every=every,
    ):  # fmt: skip
        records.append(record)
        if len(records) == take:
            break
    return model, records


@pytest.mark.parametrize("numerics", ["fp8", "fp8-tensorwise", "bf16", "fp32"])
def test_training_has_the_same_bits_with_and_without(numerics):
    accumulate = 2 if numerics == "fp32" else 1
    plain, records = train(numerics, every=0, accumulate=accumulate)
    measured, with_figures = train(numerics, every=2, accumulate=accumulate)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, measured.state_dict()[name]), name
    assert [r.figures != {} for r in with_figures] == [True, False, True]
    for a, b in zip(records, with_figures, strict=True):
        assert a.figures == {} and scalars(a).items() <= scalars(b).items()
    assert any(name.startswith("fp8_amax") for name in with_figures[0].figures) == (
        "fp8" in numerics
    )


def test_a_step_that_is_not_due_runs_the_same_code(model, monkeypatch):
    set_numerics(model, "fp8")
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    monitor = Monitor(model, 3)
    monitor.begin(3)
    loss_fn(model, batch_at(0)).total.backward()
    monitor.gradients()
    assert monitor.end()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        for attribute in ("matmul", "grouped_gemm", "cross_entropy", "operand"):
            if attribute in before[name]:
                assert module.__dict__[attribute] is before[name][attribute]
        assert not module._forward_hooks and not module._forward_pre_hooks
    monkeypatch.setattr(Monitor, "_watch", None)  # would be called
    for step in (1, 2, 4):
        monitor.begin(step)
        monitor.gradients()
        assert monitor.end() == {}
    Monitor(model, 0).begin(0)


def test_nothing_stays_behind_when_a_step_fails(model):
    set_numerics(model, "fp8")
    linear = model.model.layers[0].mlp.down_proj
    matmul = linear.matmul

    def broken(model, batch):
        loss_fn(model, batch)
        raise KeyboardInterrupt

    optimizers = build_optimizers(model, OPTIMIZATION)
    with pytest.raises(KeyboardInterrupt):
        list(fit(model, optimizers, batch_at, broken, 1, lambda _: 1.0, metrics_every=1))
    assert linear.matmul is matmul
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_resumed_run_has_the_figures_of_the_uninterrupted_one(tmp_path):
    _, records = train("fp8", every=2)
    train("fp8", every=2, directory=tmp_path, take=1)
    _, resumed = train("fp8", every=2, directory=tmp_path)
    assert resumed == records


def test_gradients_and_updates_by_role(model):
    monitor = Monitor(model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    monitor.begin(0)
    loss_fn(model, batch_at(0)).total.backward()
    monitor.gradients()
    norms = {}
    for name, p in model.named_parameters():
        norms[role(name)] = norms.get(role(name), 0.0) + float(p.grad.double().square().sum())
        p.grad.zero_()  # as clipping changes it afterwards
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.5 if role(name) == "router" else 0.25)
    figures = monitor.end()
    assert set(norms) == {"embed_tokens", "lm_head", "norm", "router", "gate_up", "matrix"}
    for r, square in norms.items():
        assert figures[f"grad_norm/{r}"] == pytest.approx(math.sqrt(square), rel=1e-5)
        expected = 0.5 if r == "router" else 0.25
        assert figures[f"update_rms/{r}"] == pytest.approx(expected, rel=1e-5)
    assert before.keys() == dict(model.named_parameters()).keys()


def test_a_skipped_update_is_zero():
    model = tiny_model()
    optimizers = build_optimizers(model, OPTIMIZATION)

    def broken(model, batch):
        loss = loss_fn(model, batch)
        return loss._replace(total=loss.total * float("nan"))

    (record,) = fit(model, optimizers, batch_at, broken, 1, lambda _: 1.0, metrics_every=1)
    assert record.skipped
    updates = [v for name, v in record.figures.items() if name.startswith("update_rms")]
    assert updates == [0.0] * 6


def test_experts_and_head(model):
    x = batch_at(0)["input_ids"]
    scores = []
    hooks = [m.gate.register_forward_hook(lambda *a: scores.append(a[2])) for m in model.moe_layers]
    with torch.no_grad():
        logits = model(x)
        ahead = model.mtp_hidden_states(x[:, 1:], model.hidden_states(x)[:, :-1])
        logits_ahead = model.lm_head(ahead[:, :-1])
    for hook in hooks:
        hook.remove()
    monitor = Monitor(model, 1)
    monitor.begin(0)
    loss_fn(model, {"input_ids": x})
    monitor.gradients()
    figures = monitor.end()
    for i, scores_NE in enumerate(scores[:3]):
        p = scores_NE / scores_NE.sum(1, keepdim=True)
        entropy = float(-(p * p.log()).sum(1).mean())
        assert figures[f"router_entropy/{i}"] == pytest.approx(entropy, rel=1e-5)
        assert entropy <= math.log(4) + 1e-6
    every = torch.cat([logits[:, :-1].flatten(0, 1), logits_ahead.flatten(0, 1)])
    assert figures["head_logit"] == pytest.approx(float(every.max()), rel=1e-5)
    assert figures["head_log_z"] == pytest.approx(float(every.logsumexp(1).mean()), rel=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_largest_attention_logit_by_loops(window, monkeypatch):
    monkeypatch.setattr("kexa.train.metrics.ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 13, 8, generator=generator) for n in (4, 2))
    documents = torch.tensor([[0] * 6 + [1] * 7, [0] * 13])
    best = max(
        float(q[b, h, t] @ k[b, h // 2, s]) / math.sqrt(8)
        for b in range(2) for h in range(4) for t in range(13) for s in range(t + 1)
        if documents[b, t] == documents[b, s] and (window is None or t - s < window)
    )  # fmt: skip
    assert float(largest_logit(q, k, window, documents)) == pytest.approx(best, rel=1e-6)


def test_attention_logits_are_those_of_what_attention_reads(model, monkeypatch):
    """QK-norm without RoPE: scaling the norm's weight scales the logits."""
    last = [m for m in model.modules() if isinstance(m, Attention)][3]
    results = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            last.q_norm.weight.fill_(factor)
        monitor = Monitor(model, 1)
        monitor.begin(0)
        loss_fn(model, batch_at(0))
        monitor.gradients()
        results.append(monitor.end())
    small, large = results
    assert large["attention_logit/3"] == pytest.approx(3 * small["attention_logit/3"], rel=1e-5)
    assert 0 < small["attention_logit/3"] <= math.sqrt(8) + 1e-4  # |q| = |k| = sqrt(K)
    assert {"attention_logit/0", "attention_logit/mtp"} <= small.keys()


def test_fp8_figures_count_what_is_rounded_to_zero(model):
    set_numerics(model, "fp8")
    linear = model.model.layers[0].mlp.down_proj  # 32 inputs, 16 outputs
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    x[:, ::4], x[:, 1] = 1e-3, 5000.0  # 1e-3 is far below 5000 / 448 * 2^-10
    x[0, :] = 0.0
    x.requires_grad_()
    monitor = Monitor(model, 1)
    monitor.begin(0)
    y = linear(x)
    dy = torch.full_like(y, 0.5)
    dy[:, 0] = 1e-8
    y.backward(dy)
    monitor.gradients()
    figures = monitor.end()
    nonzero = int((x != 0).sum())
    lost = int(((quantize(x.detach(), 1, 128) == 0) & (x != 0)).sum())
    assert lost >= 19 * 8
    assert figures["fp8_underflow/fprop x"] == pytest.approx(lost / nonzero)
    assert figures["fp8_underflow/wgrad x"] == 0  # there a column of 1e-3 has its own scale
    assert figures["fp8_amax/fprop x"] == figures["fp8_amax/wgrad x"] == 5000.0
    assert figures["fp8_amax/dgrad dy"] == 0.5
    assert figures["fp8_underflow/dgrad dy"] == pytest.approx(1 / 16)
    assert figures["fp8_amax/fprop w"] == pytest.approx(float(linear.weight.detach().abs().max()))
    assert figures["fp8_underflow/dgrad w"] == figures["fp8_underflow/fprop w"] < 0.01


def test_every_product_of_the_recipe_is_measured(model, monkeypatch):
    set_numerics(model, "fp8")
    seen = []
    monkeypatch.setattr(Monitor, "_fp8", lambda self, name, *_: seen.append(name))
    monitor = Monitor(model, 1)
    monitor.begin(0)
    loss_fn(model, batch_at(0)).total.backward()
    # 5 x 4 of attention, 5 x 3 of dense blocks, 3 x 2 of experts
    assert {name: seen.count(name) for name in set(seen)} == dict.fromkeys(
        ["fprop x", "fprop w", "dgrad dy", "dgrad w", "wgrad dy", "wgrad x"], 41
    )
    monitor.gradients()
    monitor.end()


def test_violation_is_the_excess_of_the_busiest():
    assert violation([4, 4, 4, 4]) == 0
    assert violation([8, 4, 4, 0]) == 1
    assert violation([0, 0]) == 0
