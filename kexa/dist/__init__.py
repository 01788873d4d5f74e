"""More than one process: the mesh, FSDP2 and expert parallelism, all of it torch.distributed."""

from kexa.dist.loss import batch_loss
from kexa.dist.mesh import (
    ALONE,
    CannotMeet,
    Layout,
    check,
    divides,
    join,
    leave,
    local_device,
    meeting_place,
    processes,
)
from kexa.dist.reduce import scale_to_norm, sum_over_ranks, total_norm
from kexa.dist.shard import place, shard

__all__ = [
    "ALONE",
    "CannotMeet",
    "Layout",
    "batch_loss",
    "check",
    "divides",
    "join",
    "leave",
    "local_device",
    "meeting_place",
    "place",
    "processes",
    "scale_to_norm",
    "shard",
    "sum_over_ranks",
    "total_norm",
]
