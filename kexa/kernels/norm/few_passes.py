"""The PyTorch path of fp32: PyTorch's own norm, its gradient in few passes over x.

    r = 1 / sqrt(mean(x^2) + eps)        y = x r w
    dx = r (w dy) - x r^3 mean(x w dy)   dw = sum over rows of dy x r

Autograd, given the four operations that PyTorch makes of the norm on a CPU, would store three
tensors of x's size and walk back through each. Here x is stored and r computed again.

Legend: ``...`` any leading axes, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return F.rms_norm(x, weight_D.shape, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight_D = ctx.saved_tensors
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        r = (mean_square + ctx.eps).rsqrt()
        product = dy * x
        mean = (product @ weight_D)[..., None] / x.shape[-1]
        dx = (dy * weight_D).mul_(r).addcmul_(x, mean * r**3, value=-1)
        return dx, product.mul_(r).sum(tuple(range(x.dim() - 1))), None


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`kexa.kernels.rms_norm`."""
    return _RMSNorm.apply(x, weight_D, eps)
