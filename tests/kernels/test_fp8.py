"""FP8: the format by its definition, the emulation and the codes by search, products by loops.

Legend: N tokens, D inputs, F outputs, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa.kernels import fp8
from kexa.kernels.fp8 import reference
from kexa.kernels.fp8.emulated import TILE, quantize, quantize_ragged, round_e4m3_, scale_of
from tests.kernels import fp8_checks as checks


def test_every_code_is_a_fixed_point_and_equals_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ours = torch.tensor([checks.decode(code) for code in range(256)])
    finite = ~ours.isnan()
    assert torch.equal(codes.isnan(), ~finite)
    assert torch.equal(codes[finite], ours[finite])
    assert torch.equal(round_e4m3_(codes[finite].clone()), codes[finite])


def test_encoding_gives_every_code_back_and_equals_the_cast():
    values = np.array([checks.decode(code) for code in range(256)], np.float32)
    finite = ~np.isnan(values)
    expected = np.arange(256, dtype=np.uint8)
    expected[0x80] = 0  # a zero has no sign
    np.testing.assert_array_equal(checks.nearest_code(values[finite]), expected[finite])
    ours = round_e4m3_(torch.from_numpy(values.copy())).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(ours.numpy()[finite], expected[finite])
    assert set(ours.numpy()[~finite].tolist()) <= {0x7F, 0xFF}  # NaN stays NaN
    cast = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(cast[finite & (values != 0)], expected[finite & (values != 0)])


def test_subnormals_and_what_lies_below_them():
    step = 2.0**-9
    x = torch.tensor([0.5, 0.5000001, 1.5, 2.5, 6.5, 7.5, 8.5]) * step
    expected = torch.tensor([0.0, 1.0, 2.0, 2.0, 6.0, 8.0, 8.0]) * step
    for sign in (1, -1):
        assert torch.equal(round_e4m3_(sign * x), sign * expected)
        assert torch.equal((sign * x).to(torch.float8_e4m3fn).float(), sign * expected)
    assert not round_e4m3_(torch.tensor([-0.0, -0.4 * step])).signbit().any()


def test_the_largest_of_a_tile_lands_on_448_and_never_above():
    generator = torch.Generator().manual_seed(0)
    amax = torch.rand(100_000, 1, generator=generator).mul(200).sub(100).exp2()
    scale = scale_of(amax)
    scaled = amax / scale
    assert ((scaled - 448).abs() <= 448 * 2.0**-23).all()  # the division may round upwards
    assert (round_e4m3_(scaled.clone()) == 448).all()
    assert torch.equal(quantize(amax, 1, 1), (448 * scale))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_spoils_its_tile_and_no_other(bad):
    x = checks.wide(2, 256)
    clean = quantize(x, 1, 128)
    x[0, 3] = bad
    rounded = quantize(x, 1, 128)
    assert rounded[0, 3].isnan()
    assert torch.equal(rounded[0, 128:], clean[0, 128:]) and torch.equal(rounded[1], clean[1])


def test_midpoints_go_to_the_even_code_and_neighbours_to_the_nearest():
    middle = torch.tensor((checks.GRID[1:] + checks.GRID[:-1]) / 2, dtype=torch.float32)
    around = torch.stack(
        [middle, middle.nextafter(middle + 1), middle.nextafter(torch.zeros_like(middle))]
    ).flatten()
    values = torch.cat([around, -around])
    rounded = round_e4m3_(values.clone())
    assert torch.equal(rounded, values.to(torch.float8_e4m3fn).float())
    np.testing.assert_array_equal(rounded.numpy(), checks.nearest(values.numpy()))


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_rounding_equals_torch_and_the_oracle(values):
    x = torch.tensor(values, dtype=torch.float32)
    rounded = round_e4m3_(x.clone())
    assert torch.equal(rounded, x.to(torch.float8_e4m3fn).float())
    np.testing.assert_array_equal(rounded.numpy(), checks.nearest(x.numpy()))


@pytest.mark.parametrize("rows, columns", [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (128, 128), (130, 257), (256, 384)])
def test_quantize_equals_the_oracle_bit_for_bit(shape, rows, columns):
    x = checks.wide(*shape)
    expected = torch.from_numpy(checks.oracle_values(x.numpy(), rows, columns))
    assert torch.equal(quantize(x, rows, columns), expected)


def test_quantize_handles_stacks_zeros_and_tiny_tiles():
    x = checks.wide(3, 130, 140)
    together = quantize(x, 128, 128)
    for i in range(3):
        assert torch.equal(together[i], quantize(x[i], 128, 128))
    assert torch.equal(quantize(torch.zeros(5, 7), 1, 128), torch.zeros(5, 7))
    tiny = torch.full((1, 4), 1e-31)  # the scale is 2^-100 / 448
    expected = checks.oracle_values(tiny.numpy(), 1, 128)
    np.testing.assert_array_equal(quantize(tiny, 1, 128).numpy(), expected)


@pytest.mark.parametrize("rows, columns", [(1, 128), (128, 1), (128, 128)])
def test_small_numbers_get_the_same_codes(rows, columns):
    x = checks.wide(130, 257)
    for factor in (2.0**-24, 2.0**-64):  # gradients of a mean loss, and far below them
        assert torch.equal(quantize(factor * x, rows, columns), factor * quantize(x, rows, columns))


@pytest.mark.parametrize("counts", [[300], [0, 1, 128, 0, 129, 42], [127, 173]])
def test_ragged_tiles_never_cross_an_expert(counts):
    x_ND = checks.wide(300, 17)
    parts = [checks.oracle_values(x.numpy(), 128, 1) for x in x_ND.split(counts) if len(x)]
    expected = torch.from_numpy(np.concatenate(parts))
    assert torch.equal(quantize_ragged(x_ND, counts), expected)


@pytest.mark.parametrize("case", checks.CASES)
@pytest.mark.parametrize("name", ["fp8 rows", "fp8 tokens", "fp8 blocks"])
def test_codes_and_scales_equal_the_oracle_bit_for_bit(name, case):
    function, check = checks.OPERATIONS[name]
    check(getattr(fp8, function), case)


@pytest.mark.parametrize("case", checks.CASES)
def test_the_emulation_is_the_codes_decoded(case):
    x, w, _, offsets = checks.inputs(case)
    assert torch.equal(quantize(x, 1, TILE), reference.decode_rows(*fp8.quantize_rows(x)))
    assert torch.equal(quantize(w, TILE, TILE), reference.decode_blocks(*fp8.quantize_blocks(w)))
    if len(x):
        counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        values_PD = reference.decode_rows(*fp8.quantize_tokens(x, offsets)).T
        padded = [-(-n // TILE) * TILE for n in counts]
        parts = values_PD[: sum(padded)].split(padded)
        kept = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        assert torch.equal(kept, quantize_ragged(x, counts))


@pytest.mark.parametrize("case", ["one number", "empty first, middle and last"])
def test_products_equal_the_loops(case):
    x, w, dy, offsets = checks.inputs(case, checks.normal)
    N, D, F = len(x), x.shape[1], w.shape[1]
    expert = [next(e for e, end in enumerate(offsets.tolist()) if n < end) for n in range(N)]
    x_hat = checks.oracle_values(x.numpy(), 1, 128).astype(np.float64)
    w_hat = [checks.oracle_values(m.numpy(), 128, 128).astype(np.float64) for m in w]
    y, dw = np.zeros((N, F)), np.zeros((len(offsets), F, D))
    for n in range(N):
        for f in range(F):
            y[n, f] = sum(x_hat[n, d] * w_hat[expert[n]][f, d] for d in range(D))
    start = 0
    for e, end in enumerate(offsets.tolist()):  # here no expert has more than one tile
        if end > start:
            a, b = (checks.oracle_values(t[start:end].numpy(), 128, 1) for t in (dy, x))
            for n in range(end - start):
                dw[e] += np.outer(a[n].astype(np.float64), b[n].astype(np.float64))
        start = end
    blocks = fp8.quantize_blocks(w)
    got_y = fp8.scaled_gemm(fp8.quantize_rows(x), blocks, offsets, torch.float64)
    tokens = (fp8.quantize_tokens(t, offsets) for t in (dy, x))
    got_dw = fp8.scaled_weight_gemm(*tokens, offsets, torch.float64)
    np.testing.assert_allclose(got_y.numpy(), y, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got_dw.numpy(), dw, rtol=0, atol=1e-10)
    back = fp8.scaled_gemm(fp8.quantize_rows(dy), fp8.transposed(blocks), offsets, torch.float64)
    dy_hat = checks.oracle_values(dy.numpy(), 1, 128).astype(np.float64)
    dx = np.stack([dy_hat[n] @ w_hat[expert[n]] for n in range(N)])
    np.testing.assert_allclose(back.numpy(), dx, rtol=0, atol=1e-10)


def test_results_are_bfloat16_unless_asked():
    x, w = checks.normal(5, 40, seed=0), checks.normal(1, 24, 40, seed=1)
    operands = fp8.quantize_rows(x), fp8.quantize_blocks(w), torch.tensor([5])
    y = fp8.scaled_gemm(*operands)
    assert torch.equal(y, fp8.scaled_gemm(*operands, torch.float32).bfloat16())


def test_errors_say_what_to_do():
    x, w, ends = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.tensor([1, 3])
    with pytest.raises(ValueError, match="flatten the leading axes"):
        fp8.quantize_rows(x[None])
    with pytest.raises(ValueError, match="flatten the leading axes"):
        fp8.quantize_tokens(x[None], ends)
    with pytest.raises(ValueError, match=r"use w\[None\] for one matrix"):
        fp8.quantize_blocks(w[0])
    rows, blocks = fp8.quantize_rows(x), fp8.quantize_blocks(w)
    with pytest.raises(ValueError, match=r"expected \[N, D\], \[E, F, D\] and \[E\]"):
        fp8.scaled_gemm(rows, blocks, ends[:1])
    with pytest.raises(ValueError, match=r"expected \[N, D\], \[E, F, D\] and \[E\]"):
        fp8.scaled_gemm(fp8.quantize_rows(x[:, :3]), blocks, ends)
    with pytest.raises(ValueError, match="quantise both with the same offsets"):
        one = torch.tensor([3])
        fp8.scaled_weight_gemm(fp8.quantize_tokens(x, ends), fp8.quantize_tokens(x, one), ends)
