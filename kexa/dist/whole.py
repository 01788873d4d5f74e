"""An optimizer of whole matrices over sharded parameters: gather, step, keep this rank's part.

Newton-Schulz needs whole matrices. Here every rank gathers every matrix for the time of a step,
which is right but neither spreads the work nor saves the memory; an optimizer that knows DTensors
needs none of this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kexa.dist.shard import part, place


def step_on_whole_matrices(optimizer: torch.optim.Optimizer) -> None:
    """Let ``optimizer.step()`` see whole tensors: parameters, gradients and its own state."""
    sharded: dict[Tensor, DTensor] = {}

    def gather(*_) -> None:
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if isinstance(p, DTensor) and p.grad is not None:
                    whole = p.detach().full_tensor().requires_grad_()
                    whole.grad = p.grad.full_tensor()
                    state = optimizer.state.pop(p, {})
                    optimizer.state[whole] = {k: v.full_tensor() for k, v in state.items()}
                    group["params"][i], sharded[whole] = whole, p

    @torch.no_grad()
    def scatter(*_) -> None:
        for group in optimizer.param_groups:
            for i, whole in enumerate(group["params"]):
                if whole in sharded:
                    p = group["params"][i] = sharded.pop(whole)
                    place(p, whole)
                    state = optimizer.state.pop(whole)
                    optimizer.state[p] = {k: part(v, p) for k, v in state.items()}

    optimizer.register_step_pre_hook(gather)
    optimizer.register_step_post_hook(scatter)
