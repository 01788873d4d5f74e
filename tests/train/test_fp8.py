"""FP8 against an independent oracle: codes decoded by the format's definition, nearest by search.

Legend: N tokens, D inputs, F outputs, E experts.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kexa.kernels import grouped_gemm
from kexa.kernels.fp8.emulated import quantize, quantize_ragged, round_e4m3_
from kexa.train import set_numerics
from kexa.train.fp8 import (
    bf16_grouped_gemm,
    bf16_matmul,
    fp8_grouped_gemm,
    fp8_matmul,
    round_bf16,
)
from tests.train.conftest import batch_at, loss_fn


def decode(code: int) -> float:
    """E4M3: sign, four exponent bits with bias 7, three mantissa bits; 0x7f and 0xff are NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


GRID = np.array([decode(code) for code in range(127)])  # the finite values from 0 up


def nearest(values: np.ndarray) -> np.ndarray:
    """The nearest grid value of each number, ties to the even code, by search in fp64."""
    magnitude = np.abs(values.astype(np.float64))
    upper = np.clip(np.searchsorted(GRID, magnitude), 1, 126)
    low, high = GRID[upper - 1], GRID[upper]
    take_high = (magnitude - low > high - magnitude) | (
        (magnitude - low == high - magnitude) & (upper % 2 == 0)
    )
    return np.copysign(np.where(take_high, high, low), values).astype(np.float32)


def oracle(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Tile by tile: scale, nearest code, times scale, every operation one fp32 rounding."""
    out = np.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns]
            amax = np.maximum(np.abs(tile).max(), np.float32(1e-4))
            scale = np.float32(amax / np.float32(448))
            out[i : i + rows, j : j + columns] = nearest(tile / scale) * scale
    return out


def wide(*shape, seed=0):
    """Numbers over twelve binary orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=generator).mul(3).exp2()
    return torch.randn(shape, generator=generator) * spread


def bits(x):
    """The bits, with one zero: the emulation drops the sign of zero, which no product shows."""
    return (x + 0.0).contiguous().view(torch.int32)


def test_every_code_is_a_fixed_point_and_equals_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ours = torch.tensor([decode(code) for code in range(256)])
    finite = ~ours.isnan()
    assert torch.equal(codes.isnan(), ~finite)
    assert torch.equal(bits(codes[finite]), bits(ours[finite]))
    assert torch.equal(round_e4m3_(codes[finite].clone()), codes[finite])


def test_midpoints_go_to_the_even_code_and_neighbours_to_the_nearest():
    middle = torch.tensor((GRID[1:] + GRID[:-1]) / 2, dtype=torch.float32)
    around = torch.stack(
        [middle, middle.nextafter(middle + 1), middle.nextafter(torch.zeros_like(middle))]
    ).flatten()
    values = torch.cat([around, -around])
    rounded = round_e4m3_(values.clone())
    assert torch.equal(rounded, values.to(torch.float8_e4m3fn).float())
    np.testing.assert_array_equal(rounded.numpy(), nearest(values.numpy()))


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_rounding_equals_torch_and_the_oracle(values):
    x = torch.tensor(values, dtype=torch.float32)
    rounded = round_e4m3_(x.clone())
    assert torch.equal(rounded, x.to(torch.float8_e4m3fn).float())
    np.testing.assert_array_equal(rounded.numpy(), nearest(x.numpy()))


@pytest.mark.parametrize("rows, columns", [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (128, 128), (130, 257), (256, 384)])
def test_quantize_equals_the_oracle_bit_for_bit(shape, rows, columns):
    x = wide(*shape)
    expected = torch.from_numpy(oracle(x.numpy(), rows, columns))
    assert torch.equal(bits(quantize(x, rows, columns)), bits(expected))


def test_quantize_handles_stacks_zeros_and_tiny_tiles():
    x = wide(3, 130, 140)
    together = quantize(x, 128, 128)
    for i in range(3):
        assert torch.equal(together[i], quantize(x[i], 128, 128))
    assert torch.equal(quantize(torch.zeros(5, 7), 1, 128), torch.zeros(5, 7))
    tiny = torch.full((1, 4), 1e-5)  # below the clamp: the scale is 1e-4 / 448
    np.testing.assert_array_equal(quantize(tiny, 1, 128).numpy(), oracle(tiny.numpy(), 1, 128))


@pytest.mark.parametrize("counts", [[300], [0, 1, 128, 0, 129, 42], [127, 173]])
def test_ragged_tiles_never_cross_an_expert(counts):
    x_ND = wide(300, 17)
    expected = torch.cat(
        [torch.from_numpy(oracle(x.numpy(), 128, 1)) for x in x_ND.split(counts) if len(x)]
    )
    assert torch.equal(bits(quantize_ragged(x_ND, counts)), bits(expected))


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


def test_unknown_policy_is_an_error(model):
    with pytest.raises(ValueError, match="'fp4': use one of fp8, bf16, fp32"):
        set_numerics(model, "fp4")
