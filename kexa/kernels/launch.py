"""One kernel launch as a value: what runs on a GPU is exactly what is compiled ahead of time.

An operation builds its :class:`Launch` from tensors; tile sizes, warps and stages follow from
shapes and dtypes alone. ``run`` launches it, and ``kexa.kernels.aot`` compiles the same value for a
chip that is not here, from tensors on the meta device.

chosen: tile sizes are a table (:mod:`kexa.kernels.tiles`), not autotuned at run time. They are then
known without a GPU, equal from run to run (autotuning makes sums, and so bits, depend on timings),
and checked by compilation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A Triton kernel, its grid, its arguments in the kernel's order, and its compile options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    warps: int
    stages: int

    def run(self) -> None:
        """Launch on the device of the first argument, a tensor; do nothing for an empty grid."""
        if 0 in self.grid:
            return
        with torch.cuda.device_of(self.arguments[0]):
            self.kernel[self.grid](*self.arguments, num_warps=self.warps, num_stages=self.stages)
