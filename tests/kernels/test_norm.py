"""RMSNorm's definition and the path CPUs take."""

from __future__ import annotations

import pytest
import torch

from kexa.kernels import rms_norm
from kexa.kernels.norm import reference
from tests.kernels import rows_checks as checks


@pytest.mark.parametrize("case", ["one number", "odd rows and features", "axes exchanged"])
def test_reference_equals_the_loops(case):
    x, w, _ = checks.norm_inputs(case, torch.float64)
    expected = checks.rms_norm_by_loops(x, w, checks.EPS)
    torch.testing.assert_close(
        reference.rms_norm(x, w, checks.EPS).detach(), expected, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("case", checks.NORM_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorch_path_equals_the_reference(case, dtype):
    """fp64 is no more exact than fp32: its statistics are, as published, fp32."""
    checks.check_rms_norm(rms_norm, reference.rms_norm, case, dtype, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_before_the_weight(dtype):
    x, w = torch.randn(50, 96).to(dtype), torch.randn(96).to(dtype)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    differ = rms_norm(x, w, 1e-5) != w * normed.to(dtype)
    assert differ.double().mean() < 1e-3  # a sum in another order may turn a tie


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"expected \[..., D\] and \[D\]"):
        rms_norm(torch.zeros(3, 4), torch.zeros(5), 1e-5)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        rms_norm(torch.zeros(3, 4), torch.zeros(4).half(), 1e-5)
