"""What decode attention must satisfy: the loops over positions, whatever slots they lie in.

Slots that no query sees hold NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.kernels import kernel_checks as checks

# name: H, G, T, K, slots, window, tokens each row holds before the call, left padding of each row
CASES = {
    "first key alone": (2, 1, 1, 16, 9, 8, (0,), (0,)),
    "ring wrapped, ragged, odd head size": (6, 2, 3, 12, 14, 9, (40, 3, 22), (0, 2, 5)),
    "ring over two tiles": (4, 2, 5, 16, 100, 63, (257, 63), (0, 1)),
    "padding inside the window": (2, 2, 2, 16, 40, 30, (33, 100), (20, 0)),
    "global, ragged": (4, 1, 4, 16, 104, None, (100, 3), (0, 2)),
    "more queries than a tile": (18, 1, 5, 16, 80, None, (70,), (3,)),
    "global over three splits": (2, 1, 2, 16, 2300, None, (2200,), (1100,)),
}


def inputs(case: str, dtype: torch.dtype):
    """``(q, k, v, position, start, window)``; k and v as a cache holds them."""
    H, G, T, K, slots, window, before, padding = CASES[case]
    B = len(before)
    generator = torch.Generator().manual_seed(slots)
    q = checks.fenced(generator, B, T, H, K, dtype=dtype).detach().transpose(1, 2)
    k, v = (torch.full((B, G, slots, K), math.nan, dtype=dtype) for _ in "kv")
    for b in range(B):
        oldest = padding[b] if window is None else max(padding[b], before[b] - window + 1)
        for p in range(oldest, before[b] + T):
            for buffer in (k, v):
                number = torch.randn(G, K, dtype=torch.float64, generator=generator)
                buffer[b, :, p if window is None else p % slots] = number.to(dtype)
    position = torch.tensor(before)[:, None] + torch.arange(T)
    return q, k, v, position, torch.tensor(padding), window


def by_loops(q, k, v, position, start, window) -> torch.Tensor:
    """The definition in fp64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    B, H, T, K = q.shape
    share, slots = H // k.shape[1], k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            at = int(position[b, t])
            oldest = int(start[b]) if window is None else max(int(start[b]), at - window + 1)
            held = torch.arange(oldest, at + 1) % slots
            for h in range(H):
                weights = (k[b, h // share, held] @ q[b, h, t] / math.sqrt(K)).softmax(0)
                out[b, h, t] = weights @ v[b, h // share, held]
    return out


def check(op: Callable, case: str, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5):
    """``op(q, k, v, position, start, window)`` against the loops."""
    arguments = inputs(case, dtype)
    checks.assert_close({"output": (op(*arguments), by_loops(*arguments))}, tolerance, case)
