"""Activation recompute: a layer keeps its input for the backward pass and runs again there.

Memory between forward and backward falls from all activations of a layer to its input, for one more
forward pass of it. The second pass must leave no trace: what a layer counts (tokens per expert), it
counts in the first pass only.

reported: nothing. chosen: whole layers, by ``torch.utils.checkpoint``; all of them or none.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kexa.model.moe import SparseMoE


class Recomputed(nn.Module, abc.ABC):
    """A layer whose work is ``block``; with ``recompute`` its activations are not kept."""

    recompute = False

    def forward(self, x_BTD: Tensor, context: Any, cache: Any = None) -> Tensor:
        if self.recompute and cache is None and torch.is_grad_enabled():
            return checkpoint(
                self.block, x_BTD, context, cache, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (contextlib.nullcontext(), _uncounted(self)),
            )  # fmt: skip
        return self.block(x_BTD, context, cache)

    @abc.abstractmethod
    def block(self, x_BTD: Tensor, context: Any, cache: Any) -> Tensor:
        """The layer."""


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Turn recompute on or off in every layer of a model, its MTP layer included."""
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.recompute = recompute


@contextlib.contextmanager
def _uncounted(layer: nn.Module) -> Iterator[None]:
    experts = [module for module in layer.modules() if isinstance(module, SparseMoE)]
    for module in experts:
        module.counts = False
    try:
        yield
    finally:
        for module in experts:
            module.counts = True
