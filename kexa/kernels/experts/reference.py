"""The experts' products one operation at a time: the specification, and the path CPUs take.

Any product of sorted rows fits in, so a numerics policy with products of its own takes this path on
every device.

Legend: N tokens, D hidden size, F expert inner size, E experts, K experts per token, P = N * K
pairs of token and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kexa.kernels.glu import swiglu
from kexa.kernels.routing import Routing


def expert_up(
    x_ND: torch.Tensor, w_EGD: torch.Tensor, routing: Routing, product: Callable
) -> torch.Tensor:
    """See :func:`kexa.kernels.expert_up`."""
    pairs_PD = x_ND.index_select(0, routing.order_P // routing.chosen_NK.shape[1])
    gate_PF, up_PF = product(pairs_PD, w_EGD, routing.offsets_E).chunk(2, dim=-1)
    return swiglu(gate_PF, up_PF)


def expert_down(
    h_PF: torch.Tensor, w_EDF: torch.Tensor, routing: Routing, product: Callable
) -> torch.Tensor:
    """See :func:`kexa.kernels.expert_down`."""
    out_PD = product(h_PF, w_EDF, routing.offsets_E)
    out_NKD = out_PD.index_select(0, routing.inverse_P).unflatten(0, routing.gates_NK.shape)
    return (routing.gates_NK[..., None] * out_NKD).sum(1).to(out_NKD.dtype)
