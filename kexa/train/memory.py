"""The peak memory of one training step, from a config alone.

A step is a walk down the operations of the model and back up. Going down, an operation leaves what
its backward pass will read; coming back it drops that and leaves the gradient of its weights:

    down    held += kept(op)                 peak >= held + forward(op)
    back    peak >= held + backward(op)      held += gradient(op) - kept(op)

with the bytes of :mod:`kexa.train.operations`. With recomputation a layer keeps its input alone on
the way down; on the way back it first goes down again. The optimizers come after the walk:
gradients and states, and what Newton-Schulz needs beside them. States that wait in host memory are
there for the walk, and while the other optimizer steps.

Parameters, gradients and states are fp32. On several ranks (:mod:`kexa.dist`) each holds its share
of them; a layer's parameters are gathered while it runs, the next layer's on their way, and its
gradients are whole until they leave; embedding, final norm and head stay whole for the step.
``python -m benchmarks.memory`` compares one process with the allocator.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from kexa.config import ModelConfig
from kexa.model.accounting import account
from kexa.train.newton_schulz import BATCH
from kexa.train.operations import FP32, Unit, Work, units


class Matrices(NamedTuple):
    """``count`` matrices [m, n] of one of Muon's groups, ``stack`` of them in each parameter."""

    group: str
    m: int
    n: int
    count: int
    stack: int = 1
    expert: bool = False


@dataclass(frozen=True)
class Parameters:
    """What is trained, by optimizer and by how it is spread over ranks."""

    adamw: int  # embedding, head, norms, routers
    matrices: tuple[Matrices, ...]

    @property
    def experts(self) -> int:
        """Parameters of the routed experts."""
        return sum(x.m * x.n * x.count for x in self.matrices if x.expert)

    @property
    def muon(self) -> int:
        """Parameters of all matrices, the experts' among them."""
        return sum(x.m * x.n * x.count for x in self.matrices)


def parameters(config: ModelConfig) -> Parameters:
    """All trained parameters, MTP included; with the bias of the routers they are the model's."""
    c, D, mtp = config, config.hidden_size, config.num_nextn_predict_layers
    counts = account(c)
    dense = min(c.first_k_dense_replace, c.num_hidden_layers)
    sparse, layers = c.num_hidden_layers - dense, c.num_hidden_layers + mtp
    Q, G = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    F, shared = c.moe_intermediate_size, c.moe_intermediate_size * c.num_shared_experts
    E = c.num_experts
    matrices = (
        Matrices("matrix", Q, D, 2 * layers),
        Matrices("matrix", G, D, 2 * layers),
        Matrices("matrix", c.intermediate_size, D, 3 * (dense + mtp)),
        Matrices("matrix", shared, D, 3 * sparse),
        Matrices("matrix", 2 * D, D, mtp),
        Matrices("matrix", F, D, E * sparse, E, expert=True),
        Matrices("gate_up", F, D, 2 * E * sparse, 2 * E, expert=True),
    )
    matrices = tuple(x for x in matrices if x.count * x.m)
    trained = counts.total + counts.mtp - sparse * c.num_experts
    return Parameters(trained - sum(x.m * x.n * x.count for x in matrices), matrices)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. ``peak`` is what the allocator must hold at once, at ``where``.

    ``activations`` are those kept when the forward pass ends; ``host`` of momentum and moments wait
    in host memory; ``temporary`` is what the peak holds beyond states on the device and gradients.
    """

    parameters: float
    gradients: float
    momentum: float  # Muon
    moments: float  # AdamW: two
    activations: float
    peak: float
    where: str
    host: float

    @property
    def states(self) -> float:
        """What lives on the device from step to step."""
        return self.parameters + self.momentum + self.moments - self.host

    @property
    def saved(self) -> float:
        """What a checkpoint holds of this rank, and the copy that it is written from."""
        return self.states + self.host

    @property
    def temporary(self) -> float:
        """At the peak, beyond states and gradients."""
        return self.peak - self.states - self.gradients


def memory(
    config: ModelConfig,
    work: Work,
    accumulate: int = 1,
    dense_ranks: int = 1,
    expert_shards: int = 1,
    offload: bool = False,
) -> Memory:
    """The peak of one training step.

    Args:
        accumulate: micro-batches per step; from the second on all gradients are held throughout.
        dense_ranks: ranks that share every parameter outside the experts.
        expert_shards: ranks that share the experts of each of ``work.expert_ranks``. Experts are
            not cut: where ranks are more than experts, some hold one and some none, and the bytes
            are those of one that holds one.
        offload: whether the optimizers' states wait in host memory between steps.
    """
    trained = parameters(config)
    expert_ranks = work.expert_ranks * expert_shards
    if config.num_experts:
        expert_ranks = config.num_experts / math.ceil(config.num_experts / expert_ranks)
    experts, dense = trained.experts / expert_ranks, trained.muon - trained.experts
    adamw = trained.adamw / dense_ranks
    count = experts + dense / dense_ranks + adamw
    momentum = experts + dense / dense_ranks
    moments = 2 * adamw
    host = FP32 * (momentum + moments) if offload else 0
    states = FP32 * (count + momentum + moments) - host

    sharded = dense_ranks > 1
    parts = units(config, work)
    gathered = [
        _gathered(unit, work.expert_ranks, expert_shards) if sharded and not unit.root else 0
        for unit in parts
    ]
    held = states + (FP32 * count if accumulate > 1 else 0)
    held += FP32 * sum(unit.dense for unit in parts if unit.root and sharded)
    top = _Peak(held)
    for unit, here, after in zip(parts, gathered, [*gathered[1:], 0], strict=True):
        # parameters as they came and as they are used; the next ones on their way
        held = top.down(unit, held, 2 * here + after, work.recompute)
    activations = held - top.start
    around = [0, 0, *gathered, 0]
    for i, unit in reversed(list(enumerate(parts))):
        before_next, before, here, behind = around[i : i + 4]
        # parameters of this unit and, on their way, of the next; gradients of the last one leave
        held = top.back(
            unit, held, before + here + behind, work.recompute, sharded or accumulate == 1
        )
        if sharded and not unit.root:
            # the next unit begins before this one's gradients leave
            door = here + behind + 2 * before + before_next
            top.see(held + door, f"{unit.name}, before its gradients leave")
            experts = unit.experts / work.expert_ranks
            held -= FP32 * (unit.dense + experts)
            if accumulate == 1:
                held += FP32 * (unit.dense / dense_ranks + unit.experts / expert_ranks)
    beside = FP32 * momentum if offload else 0
    schulz = _newton_schulz(trained, work, dense_ranks, expert_ranks)
    top.see(states + FP32 * count + beside + schulz, "Muon")
    return Memory(
        parameters=FP32 * count,
        gradients=FP32 * count,
        momentum=FP32 * momentum,
        moments=FP32 * moments,
        activations=activations,
        peak=top.bytes,
        where=top.where,
        host=host,
    )


def _gathered(unit: Unit, expert_ranks: int, expert_shards: int) -> float:
    """Bytes of a unit's parameters while it runs, beyond the rank's own shard."""
    return FP32 * (unit.dense + (unit.experts / expert_ranks if expert_shards > 1 else 0))


class _Peak:
    """The walk: the largest number of bytes seen, and where."""

    def __init__(self, start: float):
        self.start = self.bytes = start
        self.where = "between steps"

    def see(self, bytes_: float, where: str) -> None:
        if bytes_ > self.bytes:
            self.bytes, self.where = bytes_, where

    def down(self, unit: Unit, held: float, extra: float, recompute: bool) -> float:
        start = held
        for op in unit.ops:
            self.see(held + op.kept + op.forward + extra, f"{unit.name}, {op.name}, forward")
            held += op.kept
        return start + unit.checkpoint if recompute and unit.checkpoint else held

    def back(self, unit: Unit, held: float, extra: float, recompute: bool, grows: bool) -> float:
        if recompute and unit.checkpoint:
            held = self.down(unit, held - unit.checkpoint, extra, recompute=False)
        for op in reversed(unit.ops):
            self.see(held + op.backward + extra, f"{unit.name}, {op.name}, backward")
            held += (FP32 * op.weights if grows else 0) - op.kept
        return held


def _newton_schulz(trained: Parameters, work: Work, dense_ranks: int, expert_ranks: float) -> float:
    """Bytes beside gradients and states while Muon steps through its largest group.

    The updates of the group, the results so far, and one batch of matrices [M, N], M <= N, of equal
    size: what the first step got, the input of this one, two products of that size and the result;
    or the first two, the result and four [M, M]. A batch ends after
    ``BATCH`` numbers but never within a parameter. A GPU iterates in BF16. The Gram form holds
    less; dealt-out matrices, of which a rank has few, are taken as its rows.
    """
    groups: dict[str, float] = defaultdict(float)
    sizes: dict[tuple[str, int, int], float] = defaultdict(float)
    stacks: dict[tuple[str, int, int], float] = defaultdict(float)
    for x in trained.matrices:
        ranks = expert_ranks if x.expert else dense_ranks
        key, matrix = (x.group, min(x.m, x.n), max(x.m, x.n)), x.m * x.n / ranks
        groups[x.group] += x.count * matrix
        sizes[key] += x.count * matrix
        stacks[key] = max(stacks[key], x.stack * matrix)
    number = 2 if work.kernels else FP32
    most = 0.0
    for (group, m, n), size in sizes.items():
        batch = min(size, BATCH + stacks[group, m, n])
        gram = batch * m / n
        iteration = number * max(5 * batch + gram, 3 * batch + 4 * gram)
        results = number * (groups[group] - batch)
        most = max(most, FP32 * groups[group] + results + max(iteration, 2 * FP32 * batch))
    return most
