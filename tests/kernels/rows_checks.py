"""Checks of the operations that act on one row at a time: RMSNorm, SwiGLU, routing.

As in ``kernel_checks``: inputs of unit scale between fences of NaN, definitions written out number
by number, ``AssertionError`` with the case and the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.kernels.kernel_checks import assert_close, fenced

EPS = 0.1  # large beside the published 1e-5: forgetting it must show

# name: shape of x as it lies in memory, order of its axes
NORM_CASES = {
    "one number": ((1, 1), (0, 1)),
    "odd rows and features": ((63, 100), (0, 1)),
    "many tiles": ((257, 33), (0, 1)),
    "257 features": ((100, 257), (0, 1)),
    "axes exchanged": ((2, 3, 63, 12), (1, 2, 0, 3)),
    "no rows": ((0, 16), (0, 1)),
}

# name: leading axes, F, whether gate and up are halves of wider rows
GLU_CASES = {
    "one number": ((1,), 1, (False, False)),
    "halves of one tensor": ((63,), 100, (True, True)),
    "up is a half, gate is not": ((257,), 37, (False, True)),
    "wider than a tile": ((3,), 2149, (True, True)),
    "more axes": ((2, 50), 257, (True, False)),
    "no rows": ((0,), 16, (False, False)),
}

# name: N, E, K, normalise, what is done to the keys
ROUTING_CASES = {
    "one token, one expert": (1, 1, 1, True, "as they are"),
    "one tile": (100, 6, 2, True, "as they are"),
    "every expert": (63, 7, 7, True, "as they are"),
    "all tokens to one expert": (257, 16, 1, True, "one"),
    "no tokens": (0, 16, 2, True, "as they are"),
    "not normalised": (63, 100, 3, False, "as they are"),
    "equal keys": (63, 100, 4, True, "equal"),
    "published experts": (63, 128, 8, True, "as they are"),
    "three of four experts forbidden": (63, 257, 2, True, "forbidden"),
}
LARGE_ROUTING_CASES = {"many tiles": (5000, 128, 8, True, "as they are")}  # too many to interpret
SCALE = 2.5


def norm_inputs(case: str, dtype: torch.dtype):
    """``(x, w, dy)`` of one case."""
    shape, axes = NORM_CASES[case]
    generator = torch.Generator().manual_seed(shape[-1])
    x = fenced(generator, *shape, dtype=dtype).permute(axes)
    w = fenced(generator, shape[-1], dtype=dtype)
    return x, w, torch.randn(x.shape, dtype=torch.float64, generator=generator).to(dtype)


def glu_inputs(case: str, dtype: torch.dtype):
    """``(gate, up, dy)`` of one case."""
    outer, F, halves = GLU_CASES[case]
    generator = torch.Generator().manual_seed(F)
    gate, up = (
        fenced(generator, *outer, F * (1 + half), dtype=dtype)[..., half * i * F :][..., :F]
        for i, half in enumerate(halves)
    )
    dy = torch.randn(*outer, F, dtype=torch.float64, generator=generator).to(dtype)
    return gate, up, dy


def routing_inputs(case: str, dtype: torch.dtype):
    """``(scores, keys, K, normalise, d)`` of one case; d [N, E] holds a gradient per expert."""
    N, E, K, normalise, kind = (ROUTING_CASES | LARGE_ROUTING_CASES)[case]
    generator = torch.Generator().manual_seed(N + E)
    scores, keys = (fenced(generator, N, E, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        scores.sigmoid_()
        if kind == "forbidden":
            keys[:, torch.arange(E) % 4 > 0] = -math.inf
        elif kind == "one":
            keys[:, 7] += 100
        elif kind == "equal":
            keys.round_()
    return scores, keys, K, normalise, torch.randn(N, E, dtype=dtype, generator=generator)


def rms_norm_by_loops(x, w, eps: float) -> torch.Tensor:
    """The definition in fp64, one row at a time."""
    x, w = x.detach().double(), w.detach().double()
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        root = math.sqrt(sum(a * a for a in row) / len(row) + eps)
        rows.append([b * a / root for a, b in zip(row, w.tolist(), strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


def swiglu_by_loops(gate, up) -> torch.Tensor:
    """The definition in fp64, one number at a time."""
    pairs = zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    y = [a / (1 + math.exp(-a)) * b for a, b in pairs]
    return torch.tensor(y, dtype=torch.float64).view(gate.shape)


def check_rms_norm(
    op: Callable, reference: Callable, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Output and both gradients of ``op(x, w, eps)``; in fp16, the published rounding as well."""
    x, w, dy = norm_inputs(case, dtype)
    _check(lambda x, w: op(x, w, EPS), lambda x, w: reference(x, w, EPS), (x, w), dy, tolerance)
    if x.numel() < 30_000:
        x, w = x.detach().half(), w.detach().half()
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
        apart = (op(x, w, EPS) != normed.half() * w).double()
        assert not apart.any() or apart.mean() < 1e-3, f"{case}: not rounded before the weight"


def check_swiglu(
    op: Callable, reference: Callable, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Output and both gradients of ``op(gate, up)`` against an fp64 reference."""
    gate, up, dy = glu_inputs(case, dtype)
    _check(op, reference, (gate, up), dy, tolerance)


def _check(op, reference, inputs, dy, tolerance: float) -> None:
    out = op(*inputs)
    assert out.shape == dy.shape and out.dtype == dy.dtype, f"{out.shape}, {out.dtype}"
    got = (out, *torch.autograd.grad(out, inputs, dy))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*wide)
    want = (expected, *torch.autograd.grad(expected, wide, dy.double()))
    names = ("output", "first gradient", "second gradient")
    assert_close(dict(zip(names, zip(got, want, strict=True), strict=True)), tolerance, str(op))


def check_routing(
    op: Callable, case: str, dtype: torch.dtype, tolerance: float, lowest: bool
) -> None:
    """All results of ``op(scores, keys, K, normalise, scale)`` from the definitions.

    ``lowest``: of equal keys, the lowest expert has to be chosen.
    """
    scores, keys, K, normalise, d = routing_inputs(case, dtype)
    chosen, gates, order, inverse, offsets = op(scores, keys, K, normalise, SCALE)
    N, E = scores.shape
    assert chosen.shape == gates.shape == (N, K) and gates.dtype == dtype, case
    assert (chosen.dtype, offsets.dtype) == (torch.int64, torch.int32), case
    for n, (row, picks) in enumerate(zip(keys.tolist(), chosen.tolist(), strict=True)):
        best = sorted(range(E), key=lambda e: (-row[e], e))[:K]
        assert len(set(picks)) == K and set(picks) <= set(range(E)), f"{case}: token {n} {picks}"
        assert sorted(row[e] for e in picks) == sorted(row[e] for e in best), f"{case}: token {n}"
        assert not lowest or sorted(picks) == sorted(best), f"{case}: token {n} {picks} {best}"

    expert = chosen.flatten().tolist()
    by_expert = sorted(range(N * K), key=lambda p: (expert[p], p))
    assert order.tolist() == by_expert, f"{case}: order"
    assert [by_expert[i] for i in inverse.tolist()] == list(range(N * K)), f"{case}: inverse"
    counts = [0] * E
    for e in expert:
        counts[e] += 1
    assert offsets.tolist() == [sum(counts[: e + 1]) for e in range(E)], f"{case}: offsets"

    wide = scores.detach().double().requires_grad_()
    mask = torch.zeros(N, E, dtype=torch.float64).scatter_(1, chosen, 1.0)
    weight = SCALE * wide * mask
    if normalise:
        weight = weight / ((wide * mask).sum(1, keepdim=True) + 1e-20)
    (want,) = torch.autograd.grad(weight, wide, d.double() * mask)
    (got,) = torch.autograd.grad(gates, scores, d.gather(1, chosen))
    results = {"gates": (gates, weight.gather(1, chosen)), "dscores": (got, want)}
    assert_close(results, tolerance, case)
