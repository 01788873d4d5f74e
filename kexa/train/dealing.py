"""Matrices of which every rank holds some rows, dealt out so that each is whole on one rank.

FSDP2 shards a parameter along dimension 0: of a matrix [m, n] rank r holds ceil(m / ranks) rows
(the last ranks fewer or none), as ``torch.chunk`` cuts them. Newton-Schulz needs whole matrices.
Gathering each of them everywhere would make all ranks do all the work; instead

    1. every matrix gets an owner: the costliest first, each to the rank with the least to do
    2. one all-to-all: all ranks send their rows of a matrix to its owner
    3. owners do their work
    4. one all-to-all back: owners send every rank its rows of the results

so that a rank sends and receives about 2 m n / ranks elements per matrix, does its share of the
work and holds no other matrix in whole. A stack [E, m, n] needs none of this: whatever cuts its
dimension 0 leaves the matrices whole.

chosen: no overlap of communication with work; the report does not say how Muon was sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, told without importing those, which takes half a second."""
    return hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor: the storage itself, to be written to."""
    return x.to_local() if is_distributed(x) else x


def row_group(p: Tensor) -> dist.ProcessGroup | None:
    """The ranks among which the rows of a matrix are cut; None when matrices are whole.

    Raises:
        ValueError: a sharding that cuts matrices in another way.
    """
    if not is_distributed(p):
        return None
    cuts = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    # FSDP2 on top of another cut of the same dimension has a placement of its own class
    dims = [getattr(p.placements[i], "dim", None) for i in cuts]
    if all(dim is not None and dim < p.ndim - 2 for dim in dims):
        return None
    if p.ndim == 2 and len(cuts) == 1 and p.placements[cuts[0]].is_shard(0):
        return p.device_mesh.get_group(cuts[0])
    raise ValueError(
        f"Muon cannot gather a parameter of shape {tuple(p.shape)} placed as {p.placements}: shard "
        "matrices along dimension 0 of one mesh dimension, stacks along dimension 0"
    )


def deal(costs: Sequence[int], ranks: int) -> list[int]:
    """The owner of each item: the costliest first, each to the rank with the least so far.

    Example: ``deal([5, 3, 3, 2], 2)`` is ``[0, 1, 1, 0]``.
    """
    load, owners = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


@dataclass(frozen=True)
class Dealing:
    """Which matrices, by size, belong to whom. All ranks of ``group`` make the same."""

    sizes: Sequence[tuple[int, int]]  # whole matrices [m, n]
    owners: Sequence[int]
    group: dist.ProcessGroup

    def gather(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The whole matrices that this rank owns, from every rank's rows of all of them.

        Args:
            rows: of each matrix, what this rank holds; one dtype and device.
        """
        ranks, me = range(self.group.size()), self.group.rank()
        sent = [[rows[i] for i in self._owned(r)] for r in ranks]
        mine = [self.sizes[i] for i in self._owned(me)]
        shapes = [[(self._height(m, r), n) for m, n in mine] for r in ranks]
        received = self._exchange(sent, shapes, rows[0])
        return [torch.cat(pieces) for pieces in zip(*received, strict=True)]

    def scatter(self, matrices: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """This rank's rows of every matrix, from the matrices that each rank owns.

        Args:
            matrices: this rank's, as :meth:`gather` ordered them.
            like: a tensor of their dtype and device, since a rank may own none.
        """
        ranks, me = range(self.group.size()), self.group.rank()
        heights = [[self._height(len(x), r) for r in ranks] for x in matrices]
        cut = [x.split(h) for x, h in zip(matrices, heights, strict=True)]
        sent = [[pieces[r] for pieces in cut] for r in ranks]
        sizes = [[self.sizes[i] for i in self._owned(r)] for r in ranks]
        shapes = [[(self._height(m, me), n) for m, n in each] for each in sizes]
        waiting = [iter(each) for each in self._exchange(sent, shapes, like)]
        return [next(waiting[owner]) for owner in self.owners]

    def _owned(self, rank: int) -> list[int]:
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    def _height(self, m: int, rank: int) -> int:
        """Rows of a matrix that a rank holds."""
        chunk = -(-m // self.group.size())
        return max(0, min(chunk, m - rank * chunk))

    def _exchange(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]], like: Tensor
    ) -> list[list[Tensor]]:
        """All-to-all of lists of matrices: ``sent[r]`` to rank r, ``shapes[r]`` from rank r."""
        outgoing = torch.cat([like.new_empty(0), *(x.flatten() for each in sent for x in each)])
        lengths = [[m * n for m, n in each] for each in shapes]
        incoming = outgoing.new_empty(sum(map(sum, lengths)))
        dist.all_to_all_single(
            incoming,
            outgoing,
            [sum(each) for each in lengths],
            [sum(x.numel() for x in each) for each in sent],
            group=self.group,
        )
        pieces = iter(incoming.split([length for each in lengths for length in each]))
        return [[next(pieces).view(shape) for shape in each] for each in shapes]
