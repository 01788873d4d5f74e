"""The benchmark runner: it measures every operation, and says nothing about speed on red."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks.registry import OPERATIONS
from kexa.kernels.check import Check

SMALL = {"B": 1, "T": 40, "H": 2, "G": 1, "K": 16, "W": 8, "S": 60}
SMALL |= {"N": 50, "D": 16, "F": 16, "E": 4, "V": 40, "C": 2}

OTHER = {  # some bound the cost, some round otherwise
    "SDPA, causal without window",
    "dense product of equal FLOPs",
    "product without FP8",
    "torch._scaled_mm, a scale per row",
    "grouped GEMM without FP8",
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_candidates_compute_the_same(operation):
    """A rival that computes something else is no rival. :data:`OTHER` are meant to."""
    candidates = operation.build(SMALL, "cpu")
    ours = candidates["kexa"]()
    for name, run in candidates.items():
        same = torch.allclose(run(), ours, atol=1e-5)
        assert same != (name in OTHER), name


def test_no_ratio_on_red(monkeypatch):
    operation = dataclasses.replace(OPERATIONS[0], cpu=(SMALL,))
    green = runner.results("cpu", (operation,), rounds=3)
    assert green["rows"][0]["ratio"] and "rival / kexa" in runner.table(green)
    red = Check("window attention", "pytorch", torch.float32, {"output": 2.0}, {"output": 1.0})
    monkeypatch.setattr(runner, "check", lambda *_: red)
    found = runner.results("cpu", (operation,), rounds=3)
    assert "ratio" not in found["rows"][0] and "milliseconds" not in found["rows"][0]
    assert "WRONG" in runner.table(found)


def test_spread_is_median_and_middle_four_fifths():
    ratios = [float(i) for i in range(1, 12)]
    assert runner.spread(ratios) == {"median": 6.0, "low": 2.0, "high": 10.0}
