"""Expert parallelism: each rank of the "ep" axis holds E / ep experts; tokens travel to them.

    pairs sorted by expert are sorted by rank too: cut them into one block per rank
    dispatch   all-to-all of the blocks' sizes, then of the rows
    experts    the rows that arrived, those of all ranks, through this rank's experts
    combine    all-to-all back, then every token weighs and sums its own K rows

Nothing is dropped or padded: blocks have the size that routing gives them, which costs one wait of
the host for the sizes in each layer. Gates stay at home, so their gradient does too. The backward
pass of an all-to-all is the all-to-all of the gradients the other way.

chosen: the rows are gathered, weighed and summed by plain operations around the exchange; the
experts' two products are the same functions as on one device, with one expert per row (K = 1).

reported: dropless routing. Everything else here follows from the model's definition.

Legend: N tokens of this rank, K experts per token, P = N * K pairs, R rows that arrived, D hidden
size, F expert inner size, E experts, L = E / ep experts of this rank, G ranks of the "ep" axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from kexa.kernels import Routing, expert_down, expert_up
from kexa.kernels.experts.reference import rows_of_pairs, weighed_sum
from kexa.model.moe import Experts


class ParallelExperts(nn.Module):
    """This rank's part of an :class:`kexa.model.moe.Experts`, whose place it takes.

    Its parameters have the names and the global shapes of the original; they are DTensors split
    over experts.

    Args:
        experts: the whole stack, the same on every rank.
        mesh: the axis "ep".
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh
        for name, whole in experts.named_parameters():
            part = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            self.register_parameter(name, nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)])))

    def forward(self, x_ND: Tensor, routing: Routing, grouped_gemm: Callable) -> Tensor:
        """As :meth:`kexa.model.moe.Experts.forward`, tokens of this rank in and out."""
        group = self.mesh.get_group()
        counts_E = routing.offsets_E.diff(prepend=routing.offsets_E.new_zeros(1)).long()
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=group)
        counts_GL = counts_E.unflatten(0, (self.mesh.size(), -1))
        arriving_GL = arriving_E.view_as(counts_GL)
        sent, received = torch.stack([counts_GL.sum(1), arriving_GL.sum(1)]).tolist()

        rows_RD = _AllToAll.apply(rows_of_pairs(x_ND, routing), sent, received, group)
        if not any(received):  # a row of zeros, for products that want one; it changes no gradient
            rows_RD = F.pad(rows_RD, (0, 0, 0, 1))
            arriving_GL[0, 0] = 1
        local = _routing(arriving_GL, len(rows_RD), x_ND.dtype)
        h_RF = expert_up(rows_RD, self.gate_up_proj.to_local(), local, grouped_gemm)
        out_RD = expert_down(h_RF, self.down_proj.to_local(), local, grouped_gemm)
        out_PD = _AllToAll.apply(out_RD[: sum(received)], received, sent, group)
        return weighed_sum(out_PD, routing)


def _routing(arriving_GL: Tensor, rows: int, dtype: torch.dtype) -> Routing:
    """The routing of rows that come rank after rank, each rank's sorted by expert."""
    ranks, experts = arriving_GL.shape
    expert_GL = torch.arange(experts, device=arriving_GL.device).repeat(ranks)
    expert_R = expert_GL.repeat_interleave(arriving_GL.flatten(), output_size=rows)
    order_R = expert_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R).scatter_(
        0, order_R, torch.arange(rows, device=order_R.device)
    )
    offsets_L = arriving_GL.sum(0).cumsum(0, dtype=torch.int32)
    gates_R1 = torch.ones(rows, 1, dtype=dtype, device=order_R.device)
    return Routing(expert_R[:, None], gates_R1, order_R, inverse_R, offsets_L)


class _AllToAll(torch.autograd.Function):
    """Blocks of rows to every rank of a group; ``sent`` and ``received`` are their lengths."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.lengths, ctx.group = (sent, received), group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        sent, received = ctx.lengths
        return _AllToAll.apply(grad, received, sent, ctx.group), None, None, None
