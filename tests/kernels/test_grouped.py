"""The grouped GEMM on the path CPUs take."""

from __future__ import annotations

import pytest
import torch

from kexa.kernels import grouped_gemm
from tests.kernels import kernel_checks as checks


@pytest.mark.parametrize("case", ["one row", "empty first, middle and last", "one row each"])
def test_pytorch_path_equals_the_loops(case):
    x, w, offsets, _ = checks.grouped_inputs(case, torch.float64)
    expected = checks.grouped_gemm_by_loops(x, w, offsets)
    torch.testing.assert_close(grouped_gemm(x, w, offsets).detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in checks.GROUPED_CASES if c != "no rows"])
def test_gradients(case):
    def dense(x, w, offsets):
        """Every expert on every row, then one choice per row: no slicing by offsets."""
        expert = torch.searchsorted(offsets, torch.arange(len(x), dtype=torch.int32), right=True)
        return torch.einsum("nd,efd->nef", x, w)[torch.arange(len(x)), expert]

    checks.check_grouped_gemm(grouped_gemm, dense, case, torch.float64, 1e-12)


def test_an_expert_without_rows_gets_a_zero_gradient():
    x, w, offsets, dy = checks.grouped_inputs("empty first, middle and last", torch.float32)
    (dw,) = torch.autograd.grad(grouped_gemm(x, w, offsets), w, dy)
    assert [bool(g.any()) for g in dw] == [False, True, False, True, False]


def test_errors_say_what_to_do():
    x, w, ends = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.tensor([1, 3])
    with pytest.raises(ValueError, match="must end at the 3 rows"):
        grouped_gemm(x, w, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="must not decrease"):
        grouped_gemm(x, w, torch.tensor([4, 3]))
    with pytest.raises(ValueError, match="one end per expert"):
        grouped_gemm(x, w, torch.tensor([3]))
    with pytest.raises(ValueError, match="cast them to one dtype"):
        grouped_gemm(x, w.double(), ends)
    with pytest.raises(ValueError, match=r"\[N, D\] and \[E, F, D\]"):
        grouped_gemm(x, w[..., :3], ends)
