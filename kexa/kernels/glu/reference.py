"""SwiGLU as its equation: the specification, and the path CPUs take."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See :func:`kexa.kernels.swiglu`."""
    return F.silu(gate) * up
