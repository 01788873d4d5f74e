"""The three products of every FP8 recipe in numpy, independent of torch; sums in fp64.

Legend: N tokens, D inputs, F outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.kernels.fp8_checks import oracle_values


def round_bf16(x: np.ndarray) -> np.ndarray:
    """The nearest BF16 value of each number that fp32 holds, ties to even, as fp32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = bits >> 16 & 1
    return ((bits + 0x7FFF + odd) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _tiled(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    values = oracle_values(x, max(rows, 1), columns) if len(x) else x
    return values.astype(np.float64)


def _by_expert(x_ND: np.ndarray, counts: Sequence[int], rows: int | None) -> list[np.ndarray]:
    """Tiles of ``rows`` tokens of one feature (all of an expert's: None), expert by expert."""
    parts = np.split(x_ND, np.cumsum(counts)[:-1])
    return [_tiled(part, rows or len(part), 1) for part in parts]


def three_products(
    recipe: str, counts: Sequence[int], x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """``(y, dx, dw)`` of x [N, D], w [E, F, D] and dy [N, F], and the same of all magnitudes."""
    x, w, dy = (t.numpy() for t in (x, w, dy))
    (N, D), F = x.shape, w.shape[1]
    if recipe == "fp8":
        x_rows, dy_rows = _tiled(x, 1, 128), _tiled(dy, 1, 128)
        x_tokens, dy_tokens = (_by_expert(t, counts, 128) for t in (x, dy))
        w_y = w_dx = [_tiled(m, 128, 128) for m in w]
    elif recipe == "fp8-rowwise":
        x_rows, dy_rows = _tiled(x, 1, D), _tiled(dy, 1, F)
        x_tokens, dy_tokens = (_by_expert(t, counts, None) for t in (x, dy))
        w_y, w_dx = [_tiled(m, 1, D) for m in w], [_tiled(m, F, 1) for m in w]
    elif recipe == "fp8-tensorwise":
        x_rows, dy_rows = _tiled(x, N, D), _tiled(dy, N, F)
        ends = np.cumsum(counts)[:-1]
        x_tokens, dy_tokens = np.split(x_rows, ends), np.split(dy_rows, ends)
        w_y = w_dx = [_tiled(m, F, D) for m in w]
    expert = np.repeat(np.arange(len(counts)), counts)

    def all_three(f) -> list[np.ndarray]:
        y = np.array([f(w_y[e]) @ f(row) for e, row in zip(expert, x_rows, strict=True)])
        dx = np.array([f(row) @ f(w_dx[e]) for e, row in zip(expert, dy_rows, strict=True)])
        dw = [f(a).T @ f(b) for a, b in zip(dy_tokens, x_tokens, strict=True)]
        return [y.reshape(N, F), dx.reshape(N, D), np.stack(dw)]

    return all_three(lambda values: values), all_three(np.abs)


def exact_operands(
    counts: Sequence[int], D: int, F: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple[float, float, float]]:
    """x, w and dy whose scales are powers of two, so that fp32 holds their sums in any order.

    Integers below 100, so that larger ones round, and 448 on every sixteenth diagonal, so that it
    is the largest of every tile with sixteen numbers in a row; then each tensor times a power of
    two. Beside them, what y, dx and dw are multiples of.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int, factor: float) -> torch.Tensor:
        size = torch.randn(rows, columns, generator=generator).mul(2).exp2()
        values = (torch.randn(rows, columns, generator=generator) * size).round().clamp(-99, 99)
        diagonal = torch.arange(rows)[:, None] + torch.arange(columns)
        values[diagonal % 16 == 0] = 448.0
        return values * factor

    x, w, dy = 2.0**-3, 2.0**-6, 2.0**-11
    N = sum(counts)
    operands = draw(N, D, x), torch.stack([draw(F, D, w) for _ in counts]), draw(N, F, dy)
    return operands, (x * w, dy * w, dy * x)
