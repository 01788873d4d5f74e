"""What ranks have to agree on: gradient norm, clipping, expert counts.

Each gradient element lives on one rank, so the global norm is

    norm = sqrt(sum over ranks of (norm of this rank's elements)^2)

On one process every function is what its name says of plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar that is the same on every rank."""
    norm = torch.nn.utils.get_total_norm([local(grad) for grad in grads])
    if not any(isinstance(grad, DTensor) for grad in grads):
        return norm
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()


def scale_to_norm(grads: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Multiply gradients whose norm exceeds ``limit`` down to it, in place."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(grad) for grad in grads], factor)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace equally shaped tensors by their sums over all ranks, in place, in one exchange."""
    if dist.is_initialized() and tensors:
        sums = torch.stack(list(tensors))
        dist.all_reduce(sums)
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)
