"""More than one process: the mesh, FSDP2 and expert parallelism, all of it torch.distributed."""

from kexa.dist.loss import batch_loss
from kexa.dist.mesh import Layout, check, join, leave, local_device, processes
from kexa.dist.reduce import any_rank, is_main, scale_to_norm, sum_over_ranks, total_norm
from kexa.dist.shard import place, shard

__all__ = [
    "Layout",
    "any_rank",
    "batch_loss",
    "check",
    "is_main",
    "join",
    "leave",
    "local_device",
    "place",
    "processes",
    "scale_to_norm",
    "shard",
    "sum_over_ranks",
    "total_norm",
]
