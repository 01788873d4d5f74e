"""The experts' products: definitions, which are also the path CPUs take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kexa.kernels import expert_down, expert_up, grouped_gemm
from tests.kernels import experts_checks as checks

SMALL = ["one token, one expert", "every expert", "no tokens"]


@pytest.mark.parametrize("case", SMALL)
def test_reference_equals_the_loops(case):
    x, w, routing, _ = checks.up_inputs(case, torch.float64)
    expected = checks.expert_up_by_loops(x, w, routing)
    torch.testing.assert_close(expert_up(x, w, routing).detach(), expected, rtol=0, atol=1e-10)
    h, w, routing, _ = checks.down_inputs(case, torch.float64)
    expected = checks.expert_down_by_loops(h, w, routing)
    torch.testing.assert_close(expert_down(h, w, routing).detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in checks.CASES if case != "no tokens"])
def test_gradients(case):
    checks.check_up(expert_up, case, torch.float64, 1e-12)
    checks.check_down(expert_down, case, torch.float64, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpus_get_the_bits_of_the_operations_one_by_one(dtype):
    """Gather, product, SwiGLU, product, back to pairs, weigh, sum: output and every gradient."""
    x, w_up, routing, _ = checks.up_inputs("ragged over tiles", dtype)
    _, w_down, _, dy = checks.down_inputs("ragged over tiles", dtype)
    leaves = (x, w_up, w_down, routing.gates_NK)

    def one_by_one():
        chosen_NK, gates_NK, order_P, inverse_P, offsets_E = routing
        gate_PF, up_PF = grouped_gemm(x[order_P // 2], w_up, offsets_E).chunk(2, dim=-1)
        out_PD = grouped_gemm(F.silu(gate_PF) * up_PF, w_down, offsets_E)
        out_NKD = out_PD[inverse_P].view(*chosen_NK.shape, -1)
        return (gates_NK[..., None] * out_NKD).sum(1).to(out_NKD.dtype)

    results = [
        (y.detach(), *torch.autograd.grad(y, leaves, dy))
        for y in (expert_down(expert_up(x, w_up, routing), w_down, routing), one_by_one())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_another_product_is_the_one_that_multiplies():
    x, w, routing, _ = checks.up_inputs("ragged over tiles", torch.float32)
    h, w_down, _, _ = checks.down_inputs("ragged over tiles", torch.float32)
    given = []

    def doubled(rows, w, offsets):
        given.append(rows)
        return 2 * grouped_gemm(rows, w, offsets)

    twice = expert_down(h, w_down, routing, doubled)
    torch.testing.assert_close(twice, 2 * expert_down(h, w_down, routing))
    expert_up(x, w, routing, doubled)
    assert torch.equal(given[0], h) and torch.equal(given[1], x[routing.order_P // 2])


def test_errors_say_what_to_do():
    x, w, routing, _ = checks.up_inputs("every expert", torch.float32)
    h, w_down, _, _ = checks.down_inputs("every expert", torch.float32)
    for call, message in (
        (lambda: expert_up(x[:, 1:], w, routing), r"expected \[N, D\] and \[E, 2F, D\]"),
        (lambda: expert_up(x, w[:, 1:], routing), "as many rows of gate as of up"),
        (lambda: expert_up(x[1:], w, routing), "21 tokens were routed, x has 20"),
        (lambda: expert_up(x, w[1:], routing), "routed among 3 experts, w has 2"),
        (lambda: expert_up(x, w.double(), routing), "cast them to one dtype"),
        (lambda: expert_down(h[:, 1:], w_down, routing), r"expected \[P, F\] and \[E, D, F\]"),
        (lambda: expert_down(h[1:], w_down, routing), "63 pairs were routed, h has 62 rows"),
        (lambda: expert_down(h, w_down[1:], routing), "routed among 3 experts, w has 2"),
        (lambda: expert_down(h, w_down.double(), routing), "cast them to one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
