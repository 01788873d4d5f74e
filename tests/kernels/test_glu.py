"""SwiGLU's definition, which is also the path CPUs take."""

from __future__ import annotations

import pytest
import torch

from kexa.kernels import swiglu
from tests.kernels import rows_checks as checks


@pytest.mark.parametrize("case", checks.GLU_CASES)
def test_reference_equals_the_loops(case):
    gate, up, _ = checks.glu_inputs(case, torch.float64)
    expected = checks.swiglu_by_loops(gate, up)
    torch.testing.assert_close(swiglu(gate, up).detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", checks.GLU_CASES)
def test_gradients(case):
    def written_out(gate, up):
        return gate * up / (1 + torch.exp(-gate))

    checks.check_swiglu(swiglu, written_out, case, torch.float64, 1e-12)


def test_errors_say_what_to_do():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="expected one shape"):
        swiglu(x, x[:2])
    with pytest.raises(ValueError, match="cast them to one dtype"):
        swiglu(x, x.half())
