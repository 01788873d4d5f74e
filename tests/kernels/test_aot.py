"""Every kernel, at the published shapes, for Hopper and Blackwell, compiled without either."""

from __future__ import annotations

import json

import pytest
import triton

from benchmarks.__main__ import RESULTS, compile_ahead
from kexa.kernels import aot

WITHOUT_PRODUCT = {"rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"}
WITHOUT_PRODUCT |= {"select", "scan", "place", "gates_backward"}
WITHOUT_PRODUCT |= {"quantize_rows", "quantize_tokens", "quantize_blocks", "transpose"}
WITHOUT_PRODUCT |= {"combine", "extents"}


@pytest.fixture(scope="module")
def compiled() -> dict:
    return compile_ahead()


@pytest.mark.parametrize("capability", sorted(aot.TENSOR_CORE))
def test_kernels_fit_and_use_the_tensor_cores(compiled, capability):
    kernels = [row for row in compiled["rows"] if row["capability"] == capability]
    assert len(kernels) == 41
    for kernel in kernels:
        product = kernel["kernel"] not in WITHOUT_PRODUCT
        assert (kernel["tensor_core"] > 0) == product, f"{kernel}: {aot.TENSOR_CORE[capability]}"
        assert kernel["spilled"] == 0, f"{kernel}: spills registers"
        assert kernel["shared"] <= aot.SHARED_LIMIT, f"{kernel}: too much shared memory"


def test_the_committed_table_is_what_compiles(compiled):
    committed = json.loads((RESULTS / "aot.json").read_text(encoding="utf-8"))
    assert committed["triton"] == triton.__version__, "run: python -m benchmarks --aot"
    assert committed == compiled, "the kernels changed; run: python -m benchmarks --aot"
