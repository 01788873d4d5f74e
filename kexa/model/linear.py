"""The layers that act on one token at a time: linear map, head, RMSNorm, SwiGLU.

Every matrix product of a dense layer goes through :class:`Linear`, whose ``matmul`` a numerics
policy replaces (FP8 training swaps in a quantised product); its default is ``F.linear``. The head
has a second such function, the loss of its logits. Nothing has a bias (reported).

RMSNorm is ``w * x / sqrt(mean(x^2) + eps)`` with statistics in fp32 whatever the model's dtype:
see :func:`kexa.kernels.rms_norm`.

Legend: D hidden size, F inner size of a feed-forward block; ``...`` any leading axes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexa.kernels import linear_cross_entropy, rms_norm, swiglu


class Linear(nn.Linear):
    """``y = matmul(x, weight)`` without a bias; ``matmul(x, w)`` defaults to ``F.linear``."""

    matmul = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Left to the model's one table of initial values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight)


class Head(Linear):
    """The vocabulary's linear map: ``matmul`` gives logits, ``cross_entropy`` their loss at once.

    ``cross_entropy`` defaults to :func:`kexa.kernels.linear_cross_entropy`; a replacement takes the
    same arguments.
    """

    cross_entropy = staticmethod(linear_cross_entropy)

    def loss(
        self,
        h_ND: Tensor,
        targets_N: Tensor,
        z_loss: float = 0.0,
        penalties: list[Tensor] | None = None,
    ) -> Tensor:
        """Summed cross-entropy of the targets in nats, plus ``z_loss`` times their summed squared
        log-normalisers; a list given as ``penalties`` receives the latter, weighted."""
        return self.cross_entropy(h_ND, self.weight, targets_N, z_loss, penalties)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: the dense feed-forward block and the shared expert."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size)
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
