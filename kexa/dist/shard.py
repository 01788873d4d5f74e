"""A model over the ranks of a mesh: PyTorch's ``fully_shard`` (FSDP2) and expert parallelism.

    experts of a layer     split over "ep" by expert, each part over "fsdp"
    the rest of a layer    over all ranks; a layer is gathered when it runs
    MTP block              over all ranks
    embedding, head, norm  over all ranks; gathered once per step

Parameters stay fp32 (the master weights) and each element lives on one rank, and so do its gradient
and its optimizer state. Every rank reads other rows of the batch and its loss is its share of the
global mean (:mod:`kexa.dist.loss`), so gradients are *summed* over ranks, never averaged.

A model too large for one process is built on the meta device, sharded, and filled parameter by
parameter: ``shard``, ``model.to_empty(device=...)``, then :func:`place` for each.

chosen: the 236B model's attention and shared experts over all ranks rather than over "fsdp" only,
which would hold a copy for each place along "ep".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from kexa.dist.experts import ParallelExperts
from kexa.dist.mesh import Layout
from kexa.dist.reduce import local
from kexa.model import KexaForCausalLM


def shard(model: KexaForCausalLM, layout: Layout) -> KexaForCausalLM:
    """Split a model that is the same on every rank, in place; on one process nothing changes.

    Parameter names and global shapes stay; parameters become DTensors. Build optimizers after it.
    Calls that read parameters have to be made by all ranks together.
    """
    if layout.size == 1:
        return model
    for layer in model.model.layers:
        if layer.is_sparse and layout.ep > 1:
            layer.mlp.experts = ParallelExperts(layer.mlp.experts, layout.grid["ep"])
            _split(layer.mlp.experts, layout.grid["fsdp"])
        _split(layer, layout.world)
    if model.mtp is not None:
        _split(model.mtp, layout.world)
    _split(model, layout.world)
    for method in ("loss", "hidden_states"):
        register_fsdp_forward_method(model, method)
    return model


@torch.no_grad()
def place(p: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of ``whole``, which every rank gives alike, into a parameter."""
    local(p).copy_(local(part(whole, p)) if isinstance(p, DTensor) else whole)


def part(whole: Tensor, like: DTensor) -> DTensor:
    """A tensor that every rank has, sharded as ``like``; nothing is sent."""
    mesh = like.device_mesh
    copies = DTensor.from_local(whole.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=like.placements)


def _split(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)  # with the next line: a sum, by gloo and NCCL alike
    module.set_force_sum_reduction_for_comms(True)
