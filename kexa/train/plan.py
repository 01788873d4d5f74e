"""Where a model fits and what it costs there, from its config and a mesh alone.

    rank       rows of its own; experts of E / ep, dealt over "fsdp"; 1 / (fsdp ep) of the rest
    memory     :func:`kexa.train.memory.memory`
    traffic    per step and rank, sent, for n ranks that share B bytes:
                   gather, scatter      B (n - 1) / n      units forward and back; gradients
                   exchange             rows (n - 1) / n   tokens to their experts and back
    work       3 forward passes, 4 with recomputation; Newton-Schulz and the head's second logits
               are left out

A micro-batch gathers, scatters and exchanges for itself, so more rows at a time mean less traffic;
what Muon exchanges, once per step and outside the experts, is left out. Everything that travels is
fp32, as parameters, gradients and activations are. The mesh is that of
:mod:`kexa.dist`: "ep" is the inner axis, so with 8 ranks on a machine an "ep" of 8 stays inside it.
Of what a group of ranks gathers or scatters, a machine receives the others' part once, shared by
its members; what is exchanged goes to every other rank of the group evenly.

Listed are the meshes that :mod:`kexa.dist` runs. chosen: the optimizers' states wait in host memory
where a layout fits only without them. They cross to the GPU and back once per step, beside the
gathers of every micro-batch; that is left out.

chosen: of the layouts that fit, the best moves the fewest bytes, those within a machine counted at
a ninth (an H100's data sheet: 450 GB/s by NVLink, 50 by InfiniBand); then the fewest FLOPs. chosen:
a layout fits if its peak leaves a tenth of the memory, for the context, NCCL's buffers and what
the allocator cannot use. Estimates of bytes, not of time: nothing here was measured on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from kexa import dist
from kexa.config import Config, ConfigError, ModelConfig, PretrainConfig
from kexa.model.accounting import account, forward_flops
from kexa.train.memory import Memory, memory
from kexa.train.operations import FP32, Work, units

MACHINE = 8  # ranks on one machine
USABLE = 0.9  # of a device's memory
INSIDE = 1 / 9  # weight of a byte that stays inside a machine
GIB = 2**30


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per step, and how many of them leave its machine."""

    gather: float
    scatter: float
    exchange: float
    across: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.gather + self.scatter + self.exchange

    @property
    def cost(self) -> float:
        """Bytes across machines, those inside at a ninth."""
        return self.across + INSIDE * (self.total - self.across)


@dataclass(frozen=True)
class Plan:
    """One layout of one model: ``fsdp * ep`` ranks, ``rows`` sequences per micro-batch and rank."""

    fsdp: int
    ep: int
    rows: int
    accumulate: int
    recompute: bool
    offload: bool
    memory: Memory
    traffic: Traffic
    flops: float  # of all ranks, per step

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.fsdp * self.ep

    def fits(self, capacity: float) -> bool:
        """Whether the peak leaves room on a device of ``capacity`` bytes."""
        return self.memory.peak <= USABLE * capacity


def plan(
    model: ModelConfig,
    pretrain: PretrainConfig,
    fsdp: int,
    ep: int,
    rows: int = 1,
    recompute: bool = False,
    offload: bool = False,
    device: str = "cuda",
) -> Plan:
    """Memory, traffic and work of one layout.

    Args:
        rows: sequences that a rank computes at a time.
        offload: whether the optimizers' states wait in host memory.

    Raises:
        ConfigError: experts that the mesh does not divide, rows that do not divide the batch.
    """
    ranks = fsdp * ep
    if min(fsdp, ep, rows) < 1:
        raise ConfigError(f"fsdp={fsdp}, ep={ep}, rows={rows}: each must be at least 1")
    dist.check(fsdp, ep, ranks, model.num_experts)
    if pretrain.batch_size % (ranks * rows):
        raise ConfigError(
            f"pretrain.batch_size={pretrain.batch_size} does not split over {ranks} ranks with "
            f"{rows} rows each; use a multiple of {ranks * rows}"
        )
    accumulate = pretrain.batch_size // (ranks * rows)
    work = Work(rows, pretrain.sequence_length, pretrain.numerics, device, recompute, ep)
    return Plan(
        fsdp=fsdp,
        ep=ep,
        rows=rows,
        accumulate=accumulate,
        recompute=recompute,
        offload=offload,
        memory=memory(model, work, accumulate, ranks, fsdp, offload),
        traffic=_traffic(model, work, accumulate, fsdp, ep),
        flops=pretrain.batch_size * _row_flops(model, pretrain.sequence_length, recompute),
    )


def plans(
    model: ModelConfig,
    pretrain: PretrainConfig,
    ranks: int,
    capacity: float,
    device: str = "cuda",
) -> list[Plan]:
    """Every mesh of ``ranks`` ranks, without and with recomputation.

    Each with the most rows at a time that fit in ``capacity`` bytes, or with one if none do; with
    states in host memory where one does not fit otherwise.

    Raises:
        ConfigError: ranks that do not divide the batch.
    """
    if ranks < 1 or pretrain.batch_size % ranks:
        raise ConfigError(
            f"{ranks} GPUs do not divide pretrain.batch_size={pretrain.batch_size}; use a divisor"
        )
    found = []
    divisors = (n for n in range(1, ranks + 1) if ranks % n == 0)
    for ep in (n for n in divisors if dist.divides(ranks // n, n, model.num_experts)):
        for recompute in (False, True):
            make = functools.partial(
                plan, model, pretrain, ranks // ep, ep, recompute=recompute, device=device
            )
            if not make(rows=1).fits(capacity):
                make = functools.partial(make, offload=True)
            best, rows = make(rows=1), 2
            while pretrain.batch_size % (ranks * rows) == 0:
                wider = make(rows=rows)
                if not wider.fits(capacity):
                    break
                best, rows = wider, 2 * rows
            found.append(best)
    return found


def best(layouts: list[Plan], capacity: float) -> Plan | None:
    """The one to run, ``None`` if none fits; the rule is in the module header."""
    fitting = [layout for layout in layouts if layout.fits(capacity)]
    return min(fitting, key=lambda x: (x.traffic.cost, x.flops), default=None)


def launch_line(layout: Plan, profile: str) -> str:
    """The command that runs a layout: the same on each of its machines.

    Several meet at HOST and see the folder DIR, with stage 01's tokenizer in it.
    """
    each = max(n for n in range(1, MACHINE + 1) if layout.ranks % n == 0)
    start, out = f"--nproc-per-node {each}", ""
    if layout.ranks > each:
        meet = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
        start = f"--nnodes {layout.ranks // each} {start} {meet}"
        out = "--out DIR --tokenizer DIR/tokenizer "
    return (
        f"torchrun {start} -m kexa.train --profile {profile} --fsdp {layout.fsdp} --ep {layout.ep} "
        f"{out}--set pretrain.accumulate={layout.accumulate} "
        f"--set pretrain.recompute={str(layout.recompute).lower()} "
        f"--set pretrain.offload_optimizer={str(layout.offload).lower()}"
    )


def table(layouts: list[Plan]) -> list[str]:
    """One line per layout under a line of heads; memory in GiB, traffic in GB per step."""
    heads = (
        "fsdp", "ep", "recompute", "offload", "rows", "micro", "param", "grad", "optim",
        "kept", "peak", "sent", "across", "PFLOP",
    )  # fmt: skip
    lines = ["".join(f"{head:>10}" for head in heads)]
    for x in layouts:
        m = x.memory
        optimizer = m.momentum + m.moments
        sizes = (m.parameters, m.gradients, optimizer, m.activations, m.peak)
        traffic = (x.traffic.total / 1e9, x.traffic.across / 1e9)
        lines.append(
            f"{x.fsdp:>10}{x.ep:>10}{_yes(x.recompute):>10}{_yes(x.offload):>10}"
            f"{x.rows:>10}{x.accumulate:>10}"
            + "".join(f"{size / GIB:>10.1f}" for size in sizes)
            + "".join(f"{size:>10,.0f}" for size in traffic)
            + f"{x.flops / x.ranks / 1e15:>10.1f}"
        )
    return lines


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def report(config: Config, profile: str, ranks: int, capacity: float) -> Iterator[str]:
    """Every layout of a profile on ``ranks`` GPUs of ``capacity`` bytes, and what to run.

    Where none fits, the smallest number of GPUs, doubled, on which one does.

    Raises:
        ConfigError: ranks that do not divide the batch.
    """
    model, pretrain = config.model, config.pretrain
    layouts = plans(model, pretrain, ranks, capacity)
    counts = account(model)
    yield (
        f"{profile}: {(counts.total + counts.mtp) / 1e9:.2f}B parameters, {pretrain.numerics}, "
        f"{pretrain.batch_size} rows of {pretrain.sequence_length} tokens per step"
    )
    yield (
        f"per rank of {ranks}, memory in GiB (parameters, gradients, optimizer, kept activations, "
        "peak), traffic in GB and work per step"
    )
    yield ""
    yield from table(layouts)
    yield ""
    wanted = f"{USABLE:.0%} of {capacity / GIB:.0f} GiB"
    fitting = [layout for layout in layouts if layout.fits(capacity)]
    if not fitting:
        least = min(layouts, key=lambda x: x.memory.peak)
        yield (
            f"none of them fits {wanted}: the least, fsdp {least.fsdp} ep {least.ep}, needs "
            f"{least.memory.peak / GIB:.1f} at {least.memory.where}"
        )
        while not fitting:
            ranks *= 2
            if pretrain.batch_size % ranks:
                yield (
                    f"nor does any of {ranks // 2} GPUs (--ep above 1 runs where fsdp x ep divides "
                    f"the {model.num_experts} experts): use shorter rows or larger GPUs"
                )
                return
            fitting = [x for x in plans(model, pretrain, ranks, capacity) if x.fits(capacity)]
        yield ""
        yield f"{ranks} GPUs would do:"
        yield from table(fitting)
        yield ""
    else:
        yield f"{len(fitting)} of {len(layouts)} fit {wanted}"
    chosen = best(fitting, capacity)
    yield f"best: fsdp {chosen.fsdp} ep {chosen.ep}, with its peak at {chosen.memory.where}"
    yield (
        f"host memory of each of its ranks: {chosen.memory.host / GIB:.1f} GiB, and "
        f"{chosen.memory.saved / GIB:.1f} more while a checkpoint is written"
    )
    yield launch_line(chosen, profile)


def _traffic(model: ModelConfig, work: Work, accumulate: int, fsdp: int, ep: int) -> Traffic:
    ranks = fsdp * ep
    parts = units(model, work)
    # a root unit stays gathered from forward to backward, a layer is gathered for each
    dense = FP32 * sum(unit.dense * (1 if unit.root else 2) for unit in parts)
    gradients = FP32 * sum(unit.dense for unit in parts)
    experts = FP32 * sum(unit.experts for unit in parts) / ep
    sparse = sum(unit.experts > 0 for unit in parts)
    pairs = FP32 * work.tokens * model.num_experts_per_tok * model.hidden_size
    passes = 3 if work.recompute else 2  # of forward and backward, each there and back
    over_all, over_fsdp = _shared(ranks, 1), _shared(fsdp, ep)
    travel = 2 * passes * sparse * pairs
    near = min(ep, MACHINE)
    gather = [dense * a + 2 * experts * b for a, b in zip(over_all, over_fsdp, strict=True)]
    scatter = [gradients * a + experts * b for a, b in zip(over_all, over_fsdp, strict=True)]
    exchange = [travel * (ep - 1) / ep, travel * (ep - near) / ep]
    total, across = zip(gather, scatter, exchange, strict=True)
    return Traffic(*(accumulate * x for x in total), accumulate * sum(across))


def _shared(ranks: int, stride: int) -> tuple[float, float]:
    """Parts of B bytes that a rank of a group sends in all, and across machines.

    The group's ranks lie ``stride`` apart; those on one machine share what comes from others.
    """
    near = max(1, min(ranks, MACHINE // stride))
    machines = ranks / near
    return (ranks - 1) / ranks, (machines - 1) / machines / near


@functools.cache
def _row_flops(model: ModelConfig, length: int, recompute: bool) -> float:
    """FLOPs of one sequence, forward and backward, the MTP loss among them."""
    forward = [forward_flops(model, context) for context in range(length)]
    passes = 3 * sum(flops["main"] + flops["mtp"] for flops in forward)
    if not recompute:
        return passes
    counts = account(model)
    heads = 2.0 * counts.head * length * (2 if counts.mtp else 1)
    return passes + passes / 3 - heads
