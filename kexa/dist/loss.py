"""The loss of a batch whose rows are spread over ranks, equal to one process's.

One process takes the mean over all counted targets of a batch. Rows hold different numbers of them,
so the mean of the ranks' means is another number. Every rank has the ids of the whole batch and
counts its targets alone:

    share_r = (sum over the targets of rank r's rows) / (number of targets in the whole batch)
    loss    = sum over ranks of share_r, and its gradient is the sum of the shares' gradients

The MTP loss has its own counts; the balance loss is a mean over rows, of which every rank has
equally many. What is returned has the global value and the gradient of this rank's share, so that a
training loop needs not know.

Legend: B rows of the whole batch, T tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kexa.dist.mesh import Layout
from kexa.model import KexaForCausalLM, Loss, counted_targets


def batch_loss(
    model: KexaForCausalLM,
    input_ids_BT: Tensor,
    document_ids_BT: Tensor | None,
    layout: Layout,
    balance_weight: float = 1e-4,
    **weights: float,
) -> Loss:
    """:meth:`kexa.model.KexaForCausalLM.loss` of a batch that every rank gives whole.

    Args:
        model: sharded by :func:`kexa.dist.shard`.
        input_ids_BT, document_ids_BT: as there; the same on all ranks.
        balance_weight, weights: as there: all the weights of its parts.

    Raises:
        ConfigError: the ranks do not divide B.
    """
    if layout.size == 1:
        return model.loss(input_ids_BT, document_ids_BT, balance_weight=balance_weight, **weights)
    rows = layout.rows(len(input_ids_BT))
    counts = [
        int(counted_targets(input_ids_BT, document_ids_BT, None, ahead).sum()) for ahead in (1, 2)
    ]
    mine = model.loss(
        input_ids_BT[rows],
        None if document_ids_BT is None else document_ids_BT[rows],
        balance_weight=balance_weight / layout.size,
        counts=(counts[0], counts[1]),
        **weights,
    )
    shares = mine._replace(balance=mine.balance / layout.size)
    values = torch.stack([share.detach() for share in shares])
    dist.all_reduce(values)
    return Loss(*(value + (s - s.detach()) for value, s in zip(values, shares, strict=True)))
