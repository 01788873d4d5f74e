"""Root-mean-square norm over the last axis.

    y = round(x / sqrt(mean(x^2) + eps)) * w        round: to x's dtype

Statistics are fp32 whatever the dtype, and the normed numbers are rounded before ``w`` is applied,
as in the published implementation, so that logits agree with it to the last bits.

chosen: fp64, which only the parity tests use, has fp32 statistics too on this path, since the
published implementation has; the reference and the interpreted kernel compute fp64 in fp64.

Legend: ``...`` any leading axes, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kexa.kernels.dispatch import use_triton
from kexa.kernels.norm import few_passes


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows of ``x [..., D]`` scaled to root mean square 1, then each feature by its weight.

    Args:
        x: floating dtype. A view with its axes exchanged is read and written where it lies, as
            heads are in attention.
        weight_D: same dtype and device.
        eps: added to the mean square.

    Returns:
        y [..., D] in x's dtype. Differentiable in x and the weight.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight_D.shape)}: expected [..., D] and [D]"
        )
    if x.dtype != weight_D.dtype:
        raise ValueError(f"x is {x.dtype} and weight is {weight_D.dtype}; cast them to one dtype")
    if use_triton(x):
        from kexa.kernels.norm.triton import rms_norm as kernel

        return kernel(x, weight_D, eps)
    if x.dtype == torch.float32:
        if torch.is_grad_enabled():
            return few_passes.rms_norm(x, weight_D, eps)
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    return F.rms_norm(x.float(), weight_D.shape, None, eps).to(x.dtype) * weight_D
