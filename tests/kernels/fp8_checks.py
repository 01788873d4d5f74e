"""What the FP8 kernels must satisfy, and an oracle: codes by search over E4M3's definition.

Quantisers must give the oracle's bits. Products get codes between fences of NaN and must equal the
products of the decoded codes in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kexa.kernels.fp8 import Scaled, reference
from tests.kernels import kernel_checks as checks

# name: rows, D, F, ends
CASES = {
    "one number": (1, 1, 1, (1,)),
    "empty first, middle and last": (63, 100, 33, (0, 40, 40, 63, 63)),
    "ragged over tiles and blocks": (257, 260, 130, (1, 66, 129, 257)),
    "experts longer than a tile": (300, 63, 100, (2, 2, 150, 300)),
    "no rows": (0, 16, 16, (0, 0, 0)),
}


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


def nearest_code(values: np.ndarray) -> np.ndarray:
    """Code of the nearest value, ties to the even code, zero without sign, by search in fp64."""
    magnitude = np.abs(values.astype(np.float64))
    upper = np.clip(np.searchsorted(GRID, magnitude), 1, 126)
    below, above = magnitude - GRID[upper - 1], GRID[upper] - magnitude
    take_upper = (below > above) | ((below == above) & (upper % 2 == 0))
    code = np.where(take_upper, upper, upper - 1)
    return np.where((values < 0) & (code > 0), code + 128, code).astype(np.uint8)


def nearest(values: np.ndarray) -> np.ndarray:
    """The value of that code."""
    code = nearest_code(values)
    return np.where(code >= 128, -1, 1).astype(np.float32) * GRID[code % 128].astype(np.float32)


def oracle(x: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales tile by tile; every operation is one fp32 rounding."""
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = np.maximum(np.abs(x[at]).max(), np.float32(2**-100)) / np.float32(448)
            codes[at] = nearest_code(x[at] / scales[i, j])
    return codes, scales


def oracle_values(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Codes of :func:`oracle`, decoded with their scales."""
    codes, scales = oracle(x, rows, columns)
    spread = scales.repeat(rows, 0).repeat(columns, 1)[: x.shape[0], : x.shape[1]]
    values = np.where(codes >= 128, -1, 1) * GRID[codes % 128]
    return values.astype(np.float32) * spread


def rows_by_tiles(x_ND: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = oracle(x_ND.numpy(), 1, 128)
    return codes, scales.T


def blocks_by_tiles(w_EFD: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    parts = [oracle(w.numpy(), 128, 128) for w in w_EFD]
    return np.stack([codes for codes, _ in parts]), np.stack([scales for _, scales in parts])


def tokens_by_tiles(x_ND: torch.Tensor, offsets_E: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Every expert's tiles one after the other, zero where a tile has no token."""
    N, D = x_ND.shape
    T = N // 128 + len(offsets_E)
    codes = np.zeros((D, T * 128), np.uint8)
    scales = np.full((T, D), np.float32(2**-100) / np.float32(448))
    start = tile = 0
    for end in offsets_E.tolist():
        for i in range(start, end, 128):
            part, scale = oracle(x_ND[i : min(i + 128, end)].numpy(), 128, 1)
            codes[:, tile * 128 : tile * 128 + len(part)] = part.T
            scales[tile] = scale
            tile += 1
        start = end
    return codes, scales


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers over twelve binary orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=generator).mul(3).exp2()
    return torch.randn(shape, generator=generator) * spread


def fenced_copy(x: torch.Tensor) -> torch.Tensor:
    """The same numbers between two fences of NaN."""
    buffer = torch.full((x.numel() + 2 * checks.FENCE,), float("nan")).to(x.dtype)
    inner = buffer[checks.FENCE : checks.FENCE + x.numel()].view(x.shape)
    return inner.copy_(x)


def inputs(case: str, draw: Callable = wide):
    """``(x, w, dy, offsets)``: x has a row of zeros and one below the smallest amax, w a block."""
    rows, D, F, ends = CASES[case]
    x, w = draw(rows, D, seed=1), draw(len(ends), F, D, seed=2)
    x[5:6], x[6:7], w[-1:, :64] = 0, 1e-31, 1e-31
    dy = draw(rows, F, seed=3)
    return *map(fenced_copy, (x, w, dy)), torch.tensor(ends, dtype=torch.int32)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(got: Scaled, expected: tuple[np.ndarray, np.ndarray], case: str) -> None:
    codes, scales = got
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    for name, ours, wanted in (
        ("codes", codes.view(torch.uint8).numpy(), expected[0]),
        ("scales", scales.numpy(), expected[1]),
    ):
        assert ours.shape == wanted.shape, f"{case}: {name} are {ours.shape}, not {wanted.shape}"
        assert np.array_equal(ours, wanted), f"{case}: {(ours != wanted).sum()} {name} differ"


def check_rows(op: Callable, case: str) -> None:
    x, *_ = inputs(case)
    ties = torch.from_numpy(GRID[1:] + GRID[:-1]).float()[: x.shape[1]] / 2
    x[7:8, : len(ties)] = 41 * ties  # scale 41: times 1/41 they would not all be ties
    x[7:8, :1] = 41 * 448.0
    assert_same_bits(op(x), rows_by_tiles(x), case)


def check_tokens(op: Callable, case: str) -> None:
    x, _, _, offsets = inputs(case)
    assert_same_bits(op(x, offsets), tokens_by_tiles(x, offsets), case)


def check_blocks(op: Callable, case: str) -> None:
    _, w, _, _ = inputs(case)
    assert_same_bits(op(w), blocks_by_tiles(w), case)


def check_transposed(op: Callable, case: str) -> None:
    codes, scales = reference.quantize_blocks(inputs(case)[1])
    turned = codes.view(torch.uint8).numpy().swapaxes(1, 2), scales.numpy().swapaxes(1, 2)
    assert_same_bits(op(codes, scales), turned, case)


def check_gemm(op: Callable, case: str) -> None:
    x, w, _, offsets = inputs(case, normal)
    operands = [
        Scaled(*map(fenced_copy, q))
        for q in (reference.quantize_rows(x), reference.quantize_blocks(w))
    ]
    got = op(*operands, offsets, torch.float32)
    expected = reference.scaled_gemm(*operands, offsets, torch.float64)
    checks.assert_close({"y": (got, expected)}, 1e-6, case)


def check_weight_gemm(op: Callable, case: str) -> None:
    x, _, dy, offsets = inputs(case, normal)
    operands = [Scaled(*map(fenced_copy, reference.quantize_tokens(t, offsets))) for t in (dy, x)]
    got = op(*operands, offsets, torch.float32)
    expected = reference.scaled_weight_gemm(*operands, offsets, torch.float64)
    checks.assert_close({"dw": (got, expected)}, 1e-6, case)


# operation: function of ``kexa.kernels.fp8.triton``, its check
OPERATIONS = {
    "fp8 rows": ("quantize_rows", check_rows),
    "fp8 tokens": ("quantize_tokens", check_tokens),
    "fp8 blocks": ("quantize_blocks", check_blocks),
    "fp8 transposed": ("transposed", check_transposed),
    "fp8 gemm": ("scaled_gemm", check_gemm),
    "fp8 weight gemm": ("scaled_weight_gemm", check_weight_gemm),
}
