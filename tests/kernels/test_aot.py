"""Every kernel, at the published shapes, for Hopper and Blackwell, compiled without either."""

from __future__ import annotations

import pytest

from kexa.kernels import aot


@pytest.mark.parametrize("capability", sorted(aot.TENSOR_CORE))
def test_kernels_fit_and_use_the_tensor_cores(capability):
    kernels = [aot.compile_for(launch, capability) for _, launch in aot.published_launches()]
    assert len(kernels) == 9
    for kernel in kernels:
        assert kernel.tensor_core > 0, f"{kernel}: no {aot.TENSOR_CORE[capability]}"
        assert kernel.spilled == 0, f"{kernel}: spills registers"
        assert kernel.shared <= aot.SHARED_LIMIT, f"{kernel}: too much shared memory"
