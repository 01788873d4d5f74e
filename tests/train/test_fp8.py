"""FP8 and BF16 products: what they round, on both paths, and which modules follow a policy.

Legend: N tokens, D inputs, F outputs, E experts.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kexa.kernels import grouped_gemm, linear_cross_entropy
from kexa.kernels.fp8.emulated import quantize
from kexa.train import fp8, set_numerics
from kexa.train.fp8 import (
    bf16_grouped_gemm,
    bf16_matmul,
    fp8_grouped_gemm,
    fp8_matmul,
    fp8_operands,
    round_bf16,
    rowwise_grouped_gemm,
    rowwise_matmul,
    tensorwise_grouped_gemm,
    tensorwise_matmul,
)
from tests.kernels.fp8_checks import wide
from tests.train import fp8_oracle
from tests.train.conftest import batch_at, loss_fn


def test_fp8_matmul_is_three_products_of_quantized_operands():
    x, w, dy = wide(2, 90, 200), wide(150, 200, seed=1), wide(2, 90, 150, seed=2)
    x.requires_grad_(), w.requires_grad_()
    y = fp8_matmul(x, w)
    y.backward(dy)
    flat, dy_flat = x.detach().flatten(0, 1), dy.flatten(0, 1)
    w_hat = quantize(w.detach(), 128, 128)
    y_ref = round_bf16(F.linear(quantize(x.detach(), 1, 128), w_hat))
    dx_ref = round_bf16(quantize(dy_flat, 1, 128) @ w_hat)
    dw_ref = round_bf16(quantize(dy_flat, 128, 1).T @ quantize(flat, 128, 1))
    for got, expected in [(y, y_ref), (x.grad, dx_ref.view_as(x)), (w.grad, dw_ref)]:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("product", ["fp8", "bf16"])
def test_grouped_product_is_the_product_of_each_expert(product):
    dense, grouped = {
        "fp8": (fp8_matmul, fp8_grouped_gemm),
        "bf16": (bf16_matmul, bf16_grouped_gemm),
    }[product]
    counts = [0, 130, 1, 69]
    x, w = wide(200, 40).requires_grad_(), wide(4, 24, 40, seed=1).requires_grad_()
    dy = wide(200, 24, seed=2)
    y = grouped(x, w, torch.tensor(counts).cumsum(0).int())
    y.backward(dy)
    for e, (x_e, y_e, dx_e, dy_e) in enumerate(
        zip(x.split(counts), y.split(counts), x.grad.split(counts), dy.split(counts), strict=True)
    ):
        if not len(x_e):
            assert w.grad[e].count_nonzero() == 0
            continue
        a, b = x_e.detach().requires_grad_(), w[e].detach().requires_grad_()
        reference = dense(a, b)
        reference.backward(dy_e)
        for got, expected in [(y_e, reference), (dx_e, a.grad), (w.grad[e], b.grad)]:
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)


PRODUCTS = {
    "fp8": (fp8_matmul, fp8_grouped_gemm),
    "fp8-rowwise": (rowwise_matmul, rowwise_grouped_gemm),
    "fp8-tensorwise": (tensorwise_matmul, tensorwise_grouped_gemm),
}
SIZES = {  # counts of tokens per expert, D, F
    "one number": ((1,), 1, 1),
    "dense, odd": ((157,), 259, 131),
    "empty experts": ((0, 130, 0, 1, 126, 0), 130, 37),
    "whole tiles": ((128, 256), 128, 128),
    "no tokens": ((0, 0), 24, 16),
}


def products(recipe: str, counts: tuple[int, ...], x, w, dy):
    """y, dx and dw ``[E, F, D]``; one expert is the dense product."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    dense, grouped = PRODUCTS[recipe]
    ends = torch.tensor(counts).cumsum(0).int()
    y = dense(x, w[0]) if len(counts) == 1 else grouped(x, w, ends)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


# Every tile, those at the edges too, has sixteen numbers: see exact_operands.
EXACT_SIZES = {
    "dense, odd": ((157,), 276, 147),
    "empty experts": ((0, 147, 0, 17, 126, 0), 148, 37),
    "whole tiles": ((128, 256), 128, 128),
}


@pytest.mark.parametrize("size", EXACT_SIZES)
@pytest.mark.parametrize("recipe", PRODUCTS)
def test_products_equal_the_oracle_bitwise_where_sums_are_exact(recipe, size):
    counts, D, F = EXACT_SIZES[size]
    operands, units = fp8_oracle.exact_operands(counts, D, F)
    got = products(recipe, counts, *operands)
    expected, absolute = fp8_oracle.three_products(recipe, counts, *operands)
    for ours, wanted, terms, unit in zip(got, expected, absolute, units, strict=True):
        assert terms.max() < unit * 2**24 and np.all(wanted % unit == 0)  # exact in any order
        np.testing.assert_array_equal(ours.numpy(), fp8_oracle.round_bf16(wanted))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", PRODUCTS)
def test_products_equal_the_oracle_bitwise_but_for_the_order_of_sums(recipe, size):
    """fp32 sums of K terms move by at most K 2^-24 of the terms' magnitudes: a result must be a
    BF16 number within that reach, which for most results is a single one."""
    counts, D, F = SIZES[size]
    x, dy = wide(sum(counts), D, seed=1), wide(sum(counts), F, seed=2)
    w = wide(len(counts), F, D, seed=3)
    got = products(recipe, counts, x, w, dy)
    expected, absolute = fp8_oracle.three_products(recipe, counts, x, w, dy)
    lengths = (D, F, max(counts))
    for ours, wanted, terms, K in zip(got, expected, absolute, lengths, strict=True):
        low, high = (fp8_oracle.round_bf16(wanted + s * K * 2.0**-23 * terms) for s in (-1, 1))
        assert np.all((low <= ours.numpy()) & (ours.numpy() <= high))
        assert not ours.numel() or (low == high).mean() > 0.5


@pytest.mark.parametrize("recipe", PRODUCTS)
def test_gradients_do_not_depend_on_the_scale_of_the_loss(recipe):
    counts, D, F = SIZES["empty experts"]
    x, dy = wide(sum(counts), D, seed=1), wide(sum(counts), F, seed=2)
    w = wide(len(counts), F, D, seed=3)
    _, dx, dw = products(recipe, counts, x, w, dy)
    _, small_dx, small_dw = products(recipe, counts, x, w, 2.0**-40 * dy)
    assert torch.equal(small_dx, 2.0**-40 * dx) and torch.equal(small_dw, 2.0**-40 * dw)


@pytest.mark.parametrize("recipe", PRODUCTS)
def test_operands_are_what_the_products_read(recipe):
    counts, D, F = SIZES["empty experts"]
    x, dy = wide(sum(counts), D, seed=1), wide(sum(counts), F, seed=2)
    w = wide(len(counts), F, D, seed=3)
    operands = fp8_operands(PRODUCTS[recipe][1], counts)
    rounded = {name: f({"x": x, "w": w, "dy": dy}[name.split()[1]]) for name, f in operands.items()}
    parts = {k: v.split(counts) for k, v in rounded.items() if not k.endswith("w")}
    y = torch.cat([a @ b.T for a, b in zip(parts["fprop x"], rounded["fprop w"], strict=True)])
    dx = torch.cat([a @ b for a, b in zip(parts["dgrad dy"], rounded["dgrad w"], strict=True)])
    dw = [a.T @ b for a, b in zip(parts["wgrad dy"], parts["wgrad x"], strict=True)]
    for got, expected in zip(
        products(recipe, counts, x, w, dy), (y, dx, torch.stack(dw)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-4)
    assert fp8_operands(bf16_matmul, [1]) is None


def test_the_kernels_path_computes_what_the_emulation_does(monkeypatch):
    """Equal codes, sums in another order: a result moves by at most one BF16 rounding."""
    counts = [0, 130, 1, 69]
    offsets = torch.tensor(counts).cumsum(0).int()
    x, w, w_dense = wide(200, 140), wide(4, 136, 140, seed=1), wide(136, 140, seed=3)
    dy = wide(200, 136, seed=2)

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, w, w_dense)]
        grouped = fp8_grouped_gemm(leaves[0], leaves[1], offsets)
        dense = fp8_matmul(leaves[0].view(2, 100, 140), leaves[2]).flatten(0, 1)
        dx_dw = torch.autograd.grad(grouped, leaves[:2], dy)
        return grouped, *dx_dw, dense, *torch.autograd.grad(dense, leaves[::2], dy)

    emulated = results()
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    with_codes = results()
    assert with_codes[0].grad_fn.name() == "_Fp8KernelsBackward"
    for got, expected in zip(with_codes, emulated, strict=True):
        assert got.dtype == torch.float32
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6 * largest)


def test_emulated_bf16_equals_bf16_arithmetic():
    """Operands exact; sums in another order may move a result by one unit in the last place."""
    x, w, dy = torch.randn(70, 96), torch.randn(50, 96), torch.randn(70, 50)
    ours = [t.clone().requires_grad_() for t in (x, w)]
    native = [t.bfloat16().requires_grad_() for t in (x, w)]
    y = bf16_matmul(*ours)
    y.backward(dy)
    y_native = F.linear(*native)
    y_native.backward(dy.bfloat16())
    pairs = [(y, y_native), (ours[0].grad, native[0].grad), (ours[1].grad, native[1].grad)]
    for got, expected in pairs:
        assert torch.equal(got, got.bfloat16().float())
        torch.testing.assert_close(got, expected.float(), rtol=2**-7, atol=2**-7)
        assert (got == expected.float()).float().mean() > 0.97


def test_error_of_a_product_is_that_of_the_format():
    """Blockwise E4M3 of normal operands is known to give about 28.7 dB against fp32."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 1024), torch.randn(128, 1024)
    exact = x @ w.T
    noise = fp8_matmul(x, w) - exact
    decibel = 10 * torch.log10(exact.square().mean() / noise.square().mean())
    assert 27.5 < decibel < 30


def test_policy_reaches_every_product_and_leaves_parameters_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = set_numerics(model, "fp8")
    assert changed["high"] == ["lm_head", "mtp.fc"]
    assert changed["experts"] == [f"model.layers.{i}.mlp" for i in (1, 2, 3)]
    # q, k, v, o of 5 layers; gate, up, down of 2 dense and 3 shared blocks
    assert len(changed["linear"]) == 5 * 4 + 5 * 3
    loss_fn(model, batch_at(0)).total.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())


def test_policies_order_by_precision_and_fp32_undoes_them(model):
    exact = model(batch_at(0)["input_ids"])
    errors = {}
    for policy in ("bf16", "fp8"):
        set_numerics(model, policy)
        errors[policy] = (model(batch_at(0)["input_ids"]) - exact).square().mean()
    assert 0 < 4 * errors["bf16"] < errors["fp8"]
    set_numerics(model, "fp32")
    assert torch.equal(model(batch_at(0)["input_ids"]), exact)
    assert model.model.layers[1].mlp.grouped_gemm is grouped_gemm
    assert model.lm_head.cross_entropy is linear_cross_entropy


def test_an_outlier_costs_its_tile_its_row_or_everything():
    torch.manual_seed(0)
    x, w = torch.randn(128, 512), torch.randn(64, 512)
    x[:64, 7], w[:, 7] = 1e5, 0  # in half of the rows; nothing reads it
    exact = x @ w.T
    errors = {}
    for recipe, (matmul, _) in PRODUCTS.items():
        with_outlier, without = (matmul(x, w) - exact).square().mean(1).split(64)
        errors[recipe] = float(with_outlier.mean()), float(without.mean())
    block, row, tensor = errors.values()
    assert block[0] < row[0] / 2  # one tile of four
    assert row[0] == pytest.approx(tensor[0], rel=0.2)
    assert row[1] == pytest.approx(block[1], rel=0.2) and row[1] < tensor[1] / 10


def test_every_recipe_trains_a_whole_model_and_rounds_in_its_own_way(model):
    gradients = {}
    for recipe in PRODUCTS:
        set_numerics(model, recipe)
        loss = loss_fn(model, batch_at(0)).total
        gradients[recipe] = torch.autograd.grad(loss, model.model.layers[1].mlp.experts.down_proj)
    a, b, c = (g for (g,) in gradients.values())
    assert a.isfinite().all() and not torch.equal(a, b) and not torch.equal(b, c)
    for other in (b, c):
        assert float((a - other).norm() / a.norm()) < 0.2


@pytest.mark.parametrize("policy", ["bf16", "fp8"])
def test_policy_reaches_the_loss_of_the_head(model, policy):
    hidden, targets = model.hidden_states(batch_at(0)["input_ids"])[0], torch.arange(8)
    weight, hidden = model.lm_head.weight, hidden[:8].detach()
    set_numerics(model, policy)
    (gradient,) = torch.autograd.grad(model.lm_head.loss(hidden, targets), weight)
    (exact,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    assert torch.equal(gradient, round_bf16(gradient)) and not torch.equal(gradient, exact)
    torch.testing.assert_close(gradient, exact, rtol=2**-6, atol=2**-8 * float(exact.abs().max()))


def test_unknown_policy_is_an_error(model):
    with pytest.raises(
        ValueError, match="'fp4': use one of fp8, fp8-rowwise, fp8-tensorwise, bf16, fp32"
    ):
        set_numerics(model, "fp4")
