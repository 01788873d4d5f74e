"""Routing's definition, which is also the path CPUs take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa.kernels import route
from tests.kernels import rows_checks as checks


@pytest.mark.parametrize("case", checks.ROUTING_CASES | checks.LARGE_ROUTING_CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_reference_equals_the_loops(case, dtype, tolerance):
    checks.check_routing(route, case, dtype, tolerance, lowest=False)


@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_sorting_and_back(tokens, experts, data):
    """Rows taken in order and put back by the inverse are the rows; experts never decrease."""
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    scores = torch.rand(tokens, experts, generator=generator)
    routing = route(scores, scores, top_k, True, 1.0)
    expert_P = routing.chosen_NK.flatten()
    sorted_P = expert_P[routing.order_P]
    assert torch.equal(sorted_P[routing.inverse_P], expert_P)
    assert bool((sorted_P.diff() >= 0).all())
    sizes = routing.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(sizes.long(), expert_P.bincount(minlength=experts))


def test_keys_get_no_gradient():
    scores, keys = torch.rand(5, 4, requires_grad=True), torch.rand(5, 4, requires_grad=True)
    gates = route(scores, keys, 2, True, 1.0).gates_NK
    (gates * torch.rand(5, 2)).sum().backward()
    assert keys.grad is None and bool(scores.grad.any())


def test_errors_say_what_to_do():
    scores = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"expected both \[N, E\]"):
        route(scores, scores[:, :3], 2, True, 1.0)
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k={top_k}: choose 1 to 4"):
            route(scores, scores, top_k, True, 1.0)
