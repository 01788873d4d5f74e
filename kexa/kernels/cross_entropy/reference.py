"""Linear cross-entropy as its definition: all logits at once. Meant to be read.

Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch


def linear_cross_entropy(
    h_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """See :func:`kexa.kernels.linear_cross_entropy`."""
    logits_NV = h_ND @ w_VD.T
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    lse_N = logits_NV.logsumexp(1)
    return (lse_N - chosen_N + z_loss * lse_N.square()).sum()
