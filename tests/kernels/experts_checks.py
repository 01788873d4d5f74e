"""Checks of the experts' two products, from tokens to pairs and from pairs to tokens.

As in ``kernel_checks``: inputs of unit scale between fences of NaN, definitions written out number
by number, ``AssertionError`` with the case and the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from kexa.kernels import Routing
from tests.kernels.kernel_checks import assert_close, fenced

# name: tokens, D, F, the experts each token may choose from, of how many, experts per token
CASES = {
    "one token, one expert": (1, 16, 16, (0,), 1, 1),
    "one expert each": (33, 20, 35, (0, 1, 2), 3, 1),
    "every expert": (21, 35, 20, (0, 1, 2), 3, 3),
    "empty and full experts": (63, 37, 70, (1, 3), 5, 2),
    "ragged over tiles": (100, 40, 65, (0, 1, 2), 3, 2),
    "no tokens": (0, 16, 16, (0, 1), 3, 2),
}


def routing_of(case: str, dtype: torch.dtype) -> Routing:
    """Experts drawn at random, sorted by loops; differentiable gates, at least fp32 as routers'."""
    N, _, _, allowed, E, K = CASES[case]
    generator = torch.Generator().manual_seed(N)
    chosen = [
        [allowed[i] for i in torch.randperm(len(allowed), generator=generator)[:K].tolist()]
        for _ in range(N)
    ]
    expert = [e for row in chosen for e in row]
    order = sorted(range(N * K), key=lambda p: (expert[p], p))
    inverse = [0] * len(order)
    for place, pair in enumerate(order):
        inverse[pair] = place
    ends = [sum(e <= last for e in expert) for last in range(E)]
    return Routing(
        torch.tensor(chosen, dtype=torch.int64).view(N, K),
        fenced(generator, N, K, dtype=torch.promote_types(dtype, torch.float32)),
        torch.tensor(order, dtype=torch.int64),
        torch.tensor(inverse, dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int32),
    )


def up_inputs(case: str, dtype: torch.dtype):
    """``(x, w, routing, dh)`` of one case."""
    N, D, F, _, E, K = CASES[case]
    generator = torch.Generator().manual_seed(D)
    x, w = (fenced(generator, *s, dtype=dtype) for s in ((N, D), (E, 2 * F, D)))
    dh = torch.randn(N * K, F, dtype=torch.float64, generator=generator).to(dtype)
    return x, w, routing_of(case, dtype), dh


def down_inputs(case: str, dtype: torch.dtype):
    """``(h, w, routing, dy)`` of one case."""
    N, D, F, _, E, K = CASES[case]
    generator = torch.Generator().manual_seed(F)
    h, w = (fenced(generator, *s, dtype=dtype) for s in ((N * K, F), (E, D, F)))
    dy = torch.randn(N, D, dtype=torch.float64, generator=generator).to(dtype)
    return h, w, routing_of(case, dtype), dy


def expert_up_by_loops(x, w, routing: Routing) -> torch.Tensor:
    """The definition in fp64, one number at a time."""
    x, w, K = x.detach().double(), w.detach().double(), routing.chosen_NK.shape[1]
    F = w.shape[1] // 2
    h = torch.zeros(len(routing.order_P), F, dtype=torch.float64)
    for p, pair in enumerate(routing.order_P.tolist()):
        u, matrix = x[pair // K], w[routing.chosen_NK[pair // K, pair % K]]
        for f in range(F):
            gate, up = (float((matrix[row] * u).sum()) for row in (f, F + f))
            h[p, f] = gate / (1 + math.exp(-gate)) * up
    return h


def expert_down_by_loops(h, w, routing: Routing) -> torch.Tensor:
    """The definition in fp64, one number at a time."""
    h, w, K = h.detach().double(), w.detach().double(), routing.chosen_NK.shape[1]
    y = torch.zeros(len(routing.chosen_NK), w.shape[1], dtype=torch.float64)
    for p, pair in enumerate(routing.order_P.tolist()):
        t, k = divmod(pair, K)
        for d in range(w.shape[1]):
            product = float((w[routing.chosen_NK[t, k], d] * h[p]).sum())
            y[t, d] += float(routing.gates_NK[t, k].detach()) * product
    return y


def dense_up(x, w, routing: Routing) -> torch.Tensor:
    """Every expert on every token, then one choice per pair: nothing sorted, sliced or gathered."""
    gate_NEF, up_NEF = torch.einsum("nd,egd->neg", x, w).chunk(2, dim=-1)
    h_NEF = gate_NEF * up_NEF / (1 + torch.exp(-gate_NEF))
    h_NKF = h_NEF[torch.arange(len(x))[:, None], routing.chosen_NK]
    return h_NKF.flatten(0, 1)[routing.order_P]


def dense_down(h, w, gates, routing: Routing) -> torch.Tensor:
    """Every expert on every pair, then one choice per pair."""
    h_NKF = h[routing.inverse_P].unflatten(0, gates.shape)
    chosen_NKE = torch.nn.functional.one_hot(routing.chosen_NK, len(w)).to(h.dtype)
    return torch.einsum("nkf,edf,nke,nk->nd", h_NKF, w, chosen_NKE, gates)


def check_up(op: Callable, case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Output, with and without a gradient, and both gradients of ``op(x, w, routing)``."""
    x, w, routing, dh = up_inputs(case, dtype)
    h = op(x, w, routing)
    got = (h, *torch.autograd.grad(h, (x, w), dh))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = dense_up(*wide, routing)
    want = (expected, *torch.autograd.grad(expected, wide, dh.double()))
    _compare(("h", "dx", "dw"), got, want, tolerance, case)
    with torch.no_grad():
        assert torch.equal(op(x, w, routing), h), f"{case}: other numbers without a gradient"


def check_rounding(op: Callable, case: str) -> None:
    """In fp16, gate and up are rounded before SwiGLU; few results may lie on the other side."""
    x, w, routing, _ = up_inputs(case, torch.float16)
    token = routing.order_P // routing.chosen_NK.shape[1]
    expert = routing.chosen_NK.flatten()[routing.order_P]
    product = torch.einsum("pd,pgd->pg", x.detach().double()[token], w.detach().double()[expert])
    gate, up = product.half().double().chunk(2, dim=-1)
    apart = op(x, w, routing) != (gate * up / (1 + torch.exp(-gate))).half()
    assert int(apart.sum()) <= 0.02 * apart.numel(), f"{case}: not rounded before SwiGLU"


def check_down(op: Callable, case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Output and all three gradients of ``op(h, w, routing)``."""
    h, w, routing, dy = down_inputs(case, dtype)
    leaves = (h, w, routing.gates_NK)
    y = op(h, w, routing)
    got = (y, *torch.autograd.grad(y, leaves, dy))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = dense_down(*wide, routing)
    want = (expected, *torch.autograd.grad(expected, wide, dy.double()))
    _compare(("y", "dh", "dw", "dgates"), got, want, tolerance, case)


def _compare(names, got, want, tolerance: float, case: str) -> None:
    assert_close(dict(zip(names, zip(got, want, strict=True), strict=True)), tolerance, case)
