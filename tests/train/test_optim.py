"""Muon against a plain loop over matrices, its momentum in BF16, and which parameter goes where."""

import functools
import math

import pytest
import torch

from kexa.train import Muon, build_optimizers, grouping, orthogonalize
from tests.train.conftest import OPTIMIZATION

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix):
    """Five steps on one [m, n] matrix in fp64, on whichever side it comes."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


def plain_muon(matrices, gradients_of_steps, lr, decay, mu, nesterov):
    """Muon as a loop over single matrices in fp64."""
    matrices = [w.double().clone() for w in matrices]
    moments = [torch.zeros_like(w) for w in matrices]
    for gradients in gradients_of_steps:
        for i, g in enumerate(gradients):
            g = g.double()
            moments[i] = mu * moments[i] + g
            o = newton_schulz(g + mu * moments[i] if nesterov else moments[i])
            matrices[i] = matrices[i] * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(o.shape)) * o
    return matrices


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    "shape, parts", [((6, 10), 1), ((10, 6), 1), ((4, 8, 6), 2), ((3, 5, 5), 1)]
)
def test_muon_equals_a_loop_over_matrices(shape, parts, nesterov):
    torch.manual_seed(0)
    draw = functools.partial(torch.randn, dtype=torch.float64)
    p = torch.nn.Parameter(draw(shape))
    other = torch.nn.Parameter(draw(10, 6))  # shares a batch with some shapes
    m, n = shape[-2] // parts, shape[-1]
    expected = [*p.detach().clone().view(-1, m, n), other.detach().clone()]
    optimizer = Muon(
        [{"params": [p], "parts": parts}, {"params": [other]}], lr=0.1, nesterov=nesterov
    )
    history = []
    for _ in range(3):
        p.grad, other.grad = draw(shape), draw(10, 6)
        history.append([*p.grad.view(-1, m, n), other.grad.clone()])
        optimizer.step()
    expected = plain_muon(expected, history, 0.1, 0.1, 0.95, nesterov)
    got = [*p.detach().view(-1, m, n), other.detach()]
    for w, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(w, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 24, 16), (2, 512, 1024)])  # the second in Gram form
def test_fp32_equals_the_loop_to_rounding(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    before, p.grad = p.detach().clone(), torch.randn(shape)
    expected = plain_muon(before, [p.grad], 0.1, 0.1, 0.95, True)
    Muon([p], lr=0.1).step()
    torch.testing.assert_close(p.detach().double(), torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (5, 24, 48)])
def test_orthogonalized_singular_values_lie_in_the_band(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.25
    assert 0.6 < values.median() < 1.2


def test_orthogonalize_keeps_singular_vectors():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(8, 8, dtype=torch.float64))
    x = u @ torch.diag(torch.linspace(1, 2, 8, dtype=torch.float64)) @ v
    core = u.T @ orthogonalize(x) @ v.T
    torch.testing.assert_close(core, torch.diag(core.diagonal()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_bf16_parameters_is_the_sum_of_gradients(nesterov):
    """The buffer must not be overwritten by the update, which has norm about sqrt(rank)."""
    p = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16))
    optimizer = Muon([p], lr=0.0, nesterov=nesterov)
    g = torch.full((16, 16), 2.0, dtype=torch.bfloat16)
    p.grad = g
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum"], g)
    assert torch.equal(p.grad, torch.full_like(g, 2.0))
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], g * 1.95, rtol=2**-8, atol=0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_bf16_parameters_follows_fp64(nesterov):
    """Each step rounds the buffer twice, by at most 2^-9 of it; older roundings fade with mu."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(2, 16, 24, dtype=torch.bfloat16))
    optimizer = Muon([p], lr=0.1, nesterov=nesterov)
    reference = torch.zeros(2, 16, 24, dtype=torch.float64)
    largest = 0.0
    for step in range(8):
        p.grad = torch.randn(2, 16, 24).bfloat16()
        reference = 0.95 * reference + p.grad.double()
        largest = max(largest, float(reference.abs().max()))
        optimizer.step()
        error = (optimizer.state[p]["momentum"].double() - reference).abs().max()
        assert error <= (step + 1) * 2 * 2**-9 * largest
    assert p.isfinite().all() and p.dtype == torch.bfloat16


def test_zero_gradient_leaves_only_decay():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    Muon([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.95))


def test_update_has_the_root_mean_square_of_adam():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.randn(64, 256)
    Muon([p], lr=1.0, weight_decay=0.0).step()
    assert 0.15 < p.detach().square().mean().sqrt() < 0.25


def test_muon_refuses_vectors_and_uneven_parts():
    with pytest.raises(ValueError, match=r"\(4,\).*AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)
    with pytest.raises(ValueError, match="2 matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3, 4))], lr=0.1, parts=2)


def test_every_parameter_has_one_optimizer(model):
    muon, adam = build_optimizers(model, OPTIMIZATION)
    names = {p: name for name, p in model.named_parameters()}
    taken = [[names[p] for g in o.param_groups for p in g["params"]] for o in (muon, adam)]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    assert set(taken[1]) == {
        name
        for name in names.values()
        if "norm" in name
        or name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
    }
    split = [names[p] for g in muon.param_groups if g["parts"] == 2 for p in g["params"]]
    assert len(split) == 3 and all(name.endswith("experts.gate_up_proj") for name in split)


def test_adamw_alone_takes_every_parameter_and_decays_no_norm(model):
    (adam,) = build_optimizers(model, OPTIMIZATION, "adamw")
    taken = [p for group in adam.param_groups for p in group["params"]]
    assert {id(p) for p in taken} == {id(p) for p in model.parameters()}
    for group in adam.param_groups:
        assert (group["weight_decay"] == 0) == all(p.ndim == 1 for p in group["params"])
    with pytest.raises(ValueError, match="'sgd'; use 'muon' or 'adamw'"):
        build_optimizers(model, OPTIMIZATION, "sgd")


def test_norms_do_not_decay(model):
    _, adam = build_optimizers(model, OPTIMIZATION)
    for group in adam.param_groups:
        is_vector = group["params"][0].ndim == 1
        assert (group["weight_decay"] == 0) == is_vector


def test_grouping_counts_every_parameter(model):
    rows = [line.split() for line in grouping(model).splitlines()[1:]]
    total = sum(int(row[3].replace(",", "")) for row in rows)
    assert total == sum(p.numel() for p in model.parameters())
    gate_up = next(row for row in rows if row[0] == "gate_up")
    assert gate_up[1:3] == ["3", "24"]  # three layers, four experts, gate and up


def test_frozen_parameters_are_left_out(model):
    router = model.model.layers[1].mlp.gate.weight
    router.requires_grad_(False)
    _, adam = build_optimizers(model, OPTIMIZATION)
    router.requires_grad_(True)
    assert all(p is not router for g in adam.param_groups for p in g["params"])
