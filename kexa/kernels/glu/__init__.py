"""SwiGLU between the two products of a feed-forward block, number by number.

    y = silu(gate) * up        silu(a) = a sigmoid(a)

Written as two operations it moves five numbers per output, forward: gate in, silu out and in, up
in, y out. As one it moves three.

Legend: ``...`` any leading axes, F inner size.
"""

from __future__ import annotations

import torch

from kexa.kernels.dispatch import use_triton
from kexa.kernels.glu import reference


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, both ``[..., F]``.

    Args:
        gate, up: one shape, floating dtype and device. Halves of one ``[..., 2F]`` tensor are read
            where they lie.

    Returns:
        y [..., F] in their dtype. Differentiable in both.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)}: expected one shape")
    if gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} and up is {up.dtype}; cast them to one dtype")
    if use_triton(gate):
        from kexa.kernels.glu.triton import swiglu as kernel

        return kernel(gate, up)
    return reference.swiglu(gate, up)
