"""The definition of linear cross-entropy and the PyTorch path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kexa.kernels import linear_cross_entropy
from kexa.kernels.cross_entropy import reference, sliced
from kexa.train.fp8 import bf16_cross_entropy, bf16_matmul
from tests.kernels import kernel_checks as checks


@pytest.mark.parametrize("case", [c for c in checks.CROSS_ENTROPY_CASES if "many" not in c])
def test_reference_equals_the_loops(case):
    h, w, targets = checks.cross_entropy_inputs(case, torch.float64)
    expected = checks.linear_cross_entropy_by_loops(h, w, targets)
    torch.testing.assert_close(
        reference.linear_cross_entropy(h, w, targets).detach(), expected, rtol=1e-14, atol=1e-10
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", checks.CROSS_ENTROPY_CASES)
def test_pytorch_path_equals_the_reference(case, dtype, tolerance):
    op, plain = linear_cross_entropy, reference.linear_cross_entropy
    checks.check_cross_entropy(op, plain, case, dtype, tolerance)


@pytest.mark.parametrize("bf16_products", [True, False])
def test_of_bf16_operands_only_what_is_rounded_differs(monkeypatch, bf16_products):
    """Against fp64 on the same operands: the loss is fp32's, gradients lie within a BF16 step."""
    monkeypatch.setattr(sliced, "has_bf16_products", lambda: bf16_products)
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    out, want = (linear_cross_entropy(*xs, targets) for xs in ((h, w), exact))
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=0)
    for got, true in zip(*map(torch.autograd.grad, (out, want), ((h, w), exact)), strict=True):
        assert (got - true).norm() / true.norm() < 2**-8


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), words=st.integers(1, 40), slice_rows=st.integers(1, 17))
def test_any_slicing(rows, words, slice_rows):
    draw = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(rows * 41 + words)}
    leaves = [torch.randn(n, 6, **draw).requires_grad_() for n in (rows, words)]
    targets = torch.randint(0, words, (rows,), generator=draw["generator"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliced, "ROWS", slice_rows)
        out = linear_cross_entropy(*leaves, targets)
    expected = reference.linear_cross_entropy(*leaves, targets)
    got, want = (torch.autograd.grad(0.3 * loss, leaves) for loss in (out, expected))
    for a, b in zip((out, *got), (expected, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck():
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets), (h, w), fast_mode=True
    )


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden states", "head"])
def test_frozen_inputs_cost_no_gradient_and_leave_the_other_alone(frozen):
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float32)
    full = torch.autograd.grad(linear_cross_entropy(h, w, targets), (h, w))
    leaves = [h, w]
    leaves[frozen] = leaves[frozen].detach()
    loss = linear_cross_entropy(*leaves, targets)
    saved = loss.grad_fn.saved_tensors
    assert saved[frozen] is None
    (gradient,) = torch.autograd.grad(loss, leaves[1 - frozen])
    assert torch.equal(gradient, full[1 - frozen])


def test_without_autograd_there_is_only_the_loss():
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float32)
    with_gradients = linear_cross_entropy(h, w, targets)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(h, w, targets)
    assert torch.equal(loss, with_gradients) and not loss.requires_grad
    assert counter.get_total_flops() == 2 * h.numel() * len(w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_summed_in_fp32(dtype):
    """Loss as exact as fp32 from the same numbers; dz rounds once, the gradients once more."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 64, generator=generator).to(dtype) / 4 for n in (600, 50)]
    targets = torch.randint(0, 50, (600,), generator=generator)
    leaves = [x.requires_grad_() for x in leaves]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    loss, exact = linear_cross_entropy(*leaves, targets), linear_cross_entropy(*wide, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    got, want = torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, wide)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert float((a - b).abs().max() / b.abs().max()) < torch.finfo(dtype).eps


def test_bf16_policy_equals_bf16_products():
    """Against the head's three products in BF16 on all logits: they differ in the logits' rounding,
    which the loss leaves out."""
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 64, generator=generator) / 4 for n in (300, 90))
    targets = torch.randint(0, 90, (300,), generator=generator)

    def by_products(h, w, targets):
        return torch.nn.functional.cross_entropy(bf16_matmul(h, w), targets, reduction="sum")

    results = []
    for op in (bf16_cross_entropy, by_products):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        loss = op(*leaves, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).abs().max()) <= 2**-7 * float(theirs.abs().max())
    assert all(torch.equal(g, g.bfloat16().float()) for g in results[0][1:])


def test_a_loss_used_twice_gives_its_gradient_twice():
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float32)
    loss = linear_cross_entropy(h, w, targets)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (h, w))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, again, strict=True))


def test_errors_say_what_to_do():
    h, w, targets = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \[N, D\] and \[V, D\]"):
        linear_cross_entropy(h, w[:, :3], targets)
    with pytest.raises(ValueError, match="expected one per row"):
        linear_cross_entropy(h, w, targets[:2])
    with pytest.raises(ValueError, match="cast them to one dtype"):
        linear_cross_entropy(h, w.double(), targets)
    with pytest.raises(RuntimeError, match="index 5 is out of bounds"):
        linear_cross_entropy(h, w, targets + 5)


def test_z_loss_is_the_mean_square_of_the_log_normalisers_beside_the_loss():
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float64)
    penalties = []
    loss = linear_cross_entropy(h, w, targets, 0.5, penalties)
    (penalty,) = penalties
    lse_N = [math.log(sum(math.exp(float(x @ word)) for word in w.detach())) for x in h.detach()]
    assert penalty.item() == pytest.approx(0.5 * sum(z * z for z in lse_N), rel=1e-12)
    assert not penalty.requires_grad
    plain = linear_cross_entropy(h, w, targets)
    assert (loss - penalty).item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 0.5), (h, w), fast_mode=True
    )


def test_without_z_loss_the_penalty_is_zero():
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float32)
    penalties = []
    linear_cross_entropy(h, w, targets, penalties=penalties)
    assert [float(p) for p in penalties] == [0.0]
    with pytest.raises(ValueError, match="z_loss=-0.1 would reward large logits; use 0 or more"):
        linear_cross_entropy(h, w, targets, -0.1)
