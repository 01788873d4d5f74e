"""RMSNorm as its equation: the specification. fp64 is computed in fp64, other dtypes in fp32."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`kexa.kernels.rms_norm`."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed.to(x.dtype) * weight_D
