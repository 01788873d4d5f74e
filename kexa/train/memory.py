"""What the tensors of one training step take, operation by operation.

A step is a walk down the operations of the model and back up. Going down, an operation leaves what
its backward pass will read; coming back it drops that and leaves the gradient of its weights:

    down    held += kept(op)      peak >= held + forward(op)
    back    peak >= held + backward(op)      held += gradient(op) - kept(op)

``forward`` and ``backward`` are what lives only while the operation runs, its result and incoming
gradients among it. With recomputation a layer keeps its input alone on the way down; on the way
back it first goes down again. The optimizers come after the walk: gradients and states, and what
Newton-Schulz needs beside them.

Counted is what ``kexa.model`` and ``kexa.kernels`` save, so the table below changes when they do;
``python -m benchmarks.memory`` compares it with the allocator. Activations are fp32 under every
numerics policy (:mod:`kexa.train.fp8` rounds values, not storage) but for what a GPU holds in BF16
(operands of attention, the head) or E4M3 (weights). Two paths differ:

    cpu     PyTorch: rounded weights are fp32 copies, windows are tiles of keys with a mask
            of numbers, SwiGLU keeps silu(gate), the head keeps its gradients
    cuda    Triton kernels: codes, no mask, no silu(gate), the head keeps its operands

The cuda column is derived in the same way and has not been compared with a GPU's allocator yet.

Legend (counts of numbers): N tokens, P = N K pairs of token and expert, D hidden size, Q and G
features of all query and of all key heads, F inner size, E experts, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from kexa.config import ModelConfig
from kexa.kernels.attention.banded import QUERY_CHUNK
from kexa.kernels.cross_entropy.sliced import ROWS
from kexa.model.accounting import account

FP32 = 4
INDEX = 8  # int64
MUON_BATCH = 2**27  # numbers that Muon orthogonalises at once
HEAD_CHUNK = 64 * 128  # words whose gradients of logits a GPU holds at a time
TILE = 128  # of FP8


class Op(NamedTuple):
    """Bytes of one operation, see the module header; ``weights`` counts its parameters."""

    name: str
    kept: float
    forward: float
    backward: float
    weights: int = 0


class Unit(NamedTuple):
    """Operations that are gathered and recomputed together: a layer, or an end piece.

    ``dense`` and ``experts`` count its parameters, ``checkpoint`` the bytes that recomputation
    keeps of it (0: it is not recomputed). Units of the ``root`` stay gathered for the whole step.
    """

    name: str
    ops: tuple[Op, ...]
    dense: int
    experts: int = 0
    checkpoint: float = 0.0
    root: bool = False


@dataclass(frozen=True)
class Work:
    """One micro-batch of one rank and how it is computed.

    Args:
        rows, length: sequences, and tokens of each.
        numerics: "fp8", "bf16" or "fp32". device: "cpu" or "cuda".
        recompute: whether layers are recomputed in the backward pass.
        expert_ranks: ranks that share the experts; with balanced load as many pairs arrive as go.
    """

    rows: int
    length: int
    numerics: str = "fp32"
    device: str = "cpu"
    recompute: bool = False
    expert_ranks: int = 1

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.length

    @property
    def kernels(self) -> bool:
        """Whether the Triton kernels run."""
        return self.device == "cuda"

    @property
    def operand(self) -> int:
        """Bytes of a number that attention and the head read."""
        return 2 if self.kernels and self.numerics != "fp32" else FP32

    @property
    def codes(self) -> bool:
        """Whether FP8 is stored as codes rather than emulated."""
        return self.kernels and self.numerics == "fp8"

    def rounded_weights(self, D: int, F: int, matrices: float = 1) -> float:
        """Bytes of the rounded weights that a product keeps beside the parameters."""
        if self.numerics == "fp32":
            return 0.0
        if self.codes:
            return matrices * D * F * (1 + FP32 / TILE**2)
        if self.numerics == "fp8":  # views of whole tiles
            D, F = _whole_tiles(D), _whole_tiles(F)
        return FP32 * matrices * D * F

    def rounded_rows(self, rows: float, width: int) -> float:
        """Bytes of a rounded copy of rows, alive during a product only."""
        if self.numerics == "fp32":
            return 0.0
        if self.codes:
            return rows * width * (1 + FP32 / TILE)
        return FP32 * rows * (_whole_tiles(width) if self.numerics == "fp8" else width)

    def rounding(self, rows: float, width: int) -> float:
        """Bytes while rows are rounded: the emulation's copy beside its exponents."""
        copies = 2 if self.numerics == "fp8" and not self.codes else 1
        return copies * self.rounded_rows(rows, width)

    def unfinished(self, weights: float) -> float:
        """Bytes beside the gradient of a weight while it is made.

        Emulation stacks the experts' gradients; kernels transpose codes and convert from BF16.
        """
        if self.numerics == "fp32":
            return 0.0
        return (3 if self.codes else FP32) * weights


def _whole_tiles(count: int) -> int:
    return -(-count // TILE) * TILE


def units(config: ModelConfig, work: Work, mtp: bool = True) -> list[Unit]:
    """The model from embedding to loss, in the order of the forward pass.

    Args:
        mtp: whether the loss of the MTP block is computed; a model without one ignores it.
    """
    c, N, D = config, work.tokens, config.hidden_size
    layers = [
        _layer(c, work, kind, index >= c.first_k_dense_replace)
        for index, kind in enumerate(c.layer_types)
    ]
    table = c.vocab_size * D
    ids = 2 * INDEX * N  # tokens and documents of the batch
    mtp = mtp and bool(c.num_nextn_predict_layers)
    # A table used twice gets one gradient, first from the use that comes last.
    rows_of_table = Op("embedding", ids, 0, FP32 * (table + N * D), table)
    loss = _loss(c, work)
    again = 0 if mtp or c.tie_word_embeddings else table
    found = [
        Unit("embedding", (rows_of_table._replace(weights=again),), table, root=True),
        *layers,
        Unit(
            "head",
            (_norm("norm", work, D), loss._replace(weights=0 if mtp else table)),
            D + (0 if c.tie_word_embeddings else table),
            root=True,
        ),
    ]
    if mtp:
        layer = _layer(c, work, "full_attention", sparse=False)
        first = 0 if c.tie_word_embeddings else table
        entry = (
            rows_of_table._replace(kept=FP32 * N * D, weights=first),
            _norm("norm of embedding", work, D, kept=0),
            _norm("norm of hidden", work, D, kept=0),
            _linear("fc", work, 2 * D, D),
        )
        found += [
            Unit("mtp", entry, 2 * D * D + 2 * D),
            layer._replace(name="mtp layer"),
            Unit("mtp head", (_norm("norm", work, D), loss), D),
        ]
    return found


def _layer(c: ModelConfig, work: Work, kind: str, sparse: bool) -> Unit:
    """One pre-norm layer. Its checkpoint is the residual stream at its door."""
    N, D = work.tokens, c.hidden_size
    attention = 2 * D * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    shared = c.moe_intermediate_size * c.num_shared_experts
    ops = [
        _norm("input norm", work, D),
        *_attention(c, work, kind),
        _norm("post-attention norm", work, D),
    ]
    dense, experts = attention + 2 * D + (2 * c.head_dim if c.use_qk_norm else 0), 0
    if sparse:
        ops += [*_experts(c, work), *_swiglu(work, D, shared, "shared ", reads=False)]
        experts = 3 * c.num_experts * D * c.moe_intermediate_size
        dense += c.num_experts * D + 3 * D * shared
    else:
        ops += _swiglu(work, D, c.intermediate_size, "", reads=True)
        dense += 3 * D * c.intermediate_size
    return Unit("layer", tuple(ops), dense, experts, FP32 * N * D)


def _norm(name: str, work: Work, D: int, kept: float = 1) -> Op:
    """Keeps its input, which is the residual stream or a product of its own.

    Backward holds the residual gradient, the incoming one, its product with x and the result.
    """
    rows = FP32 * work.tokens * D
    scales = FP32 * work.tokens if work.kernels else 0
    return Op(name, kept * rows + scales, 2 * rows, 4 * rows, D)


def _linear(
    name: str, work: Work, D: int, *outputs: int, reads: bool = True, flow: float = 0
) -> Op:
    """One product, or several of one input: D numbers in, each of ``outputs`` out.

    ``reads``: its input is not kept by another operation already. ``flow`` is what passes by
    meanwhile: residual stream, other branches.
    """
    N, F = work.tokens, sum(outputs)
    rows, out = FP32 * N * D, FP32 * N * F
    forward = out + work.rounding(N, D) + flow + (2 * N * F if work.codes else 0)  # in BF16 first
    backward = out + rows + 2 * work.rounded_rows(N, F) + work.rounding(N, D) + flow
    kept = reads * rows + sum(work.rounded_weights(D, each) for each in outputs)
    if work.codes:
        backward += work.unfinished(D * F)
    return Op(name, kept, forward, backward + FP32 * D * F, D * F)


def _attention(c: ModelConfig, work: Work, kind: str) -> list[Op]:
    N, D, rows = work.tokens, c.hidden_size, FP32 * work.tokens * c.hidden_size
    size, heads = c.head_dim, c.num_attention_heads
    Q, G = heads * size, c.num_key_value_heads * size
    qkv = FP32 * N * (Q + 2 * G)
    window = min(c.sliding_window, work.length) if kind == "sliding_attention" else work.length
    rope = c.rope_layers == "all" or (c.rope_layers == "sliding" and kind == "sliding_attention")
    # Attention.forward holds normed queries and keys until it returns, roped or not.
    flow = rows + (FP32 * N * (Q + G) if rope and c.use_qk_norm else 0)
    kept, forward, backward = _scores(c, work, window)
    found = [
        _linear("q, k, v", work, D, Q, G, G, flow=rows),
    ]
    if c.use_qk_norm:
        normed = FP32 * N * (Q + G)
        found.append(Op("q, k norm", normed, 2 * qkv + rows, 2 * qkv + normed + rows, 2 * size))
    if rope:
        found.append(
            Op("rope", 0, rows + 2 * qkv + 2 * FP32 * N * Q, rows + qkv + 3 * FP32 * N * Q)
        )
    # The output projection keeps its input, unless that is attention's own result as it lies.
    if work.kernels:
        as_it_lies = work.operand == FP32
    else:
        # PyTorch's own linear copies what is cut out of whole windows
        whole = work.length % window == 0 or work.numerics != "fp32"
        as_it_lies = window < work.length and whole
    found.append(Op("attention", kept, forward + flow, backward + rows))
    found.append(_linear("o", work, Q, D, reads=not as_it_lies, flow=flow))
    return found


def _scores(c: ModelConfig, work: Work, window: int) -> tuple[float, float, float]:
    """Bytes that attention itself keeps, and holds forward and backward, all operands counted."""
    N, T, size = work.tokens, work.length, c.head_dim
    Q, G = c.num_attention_heads * size, c.num_key_value_heads * size
    sums = FP32 * N * c.num_attention_heads  # log-sum-exp
    if work.kernels:
        kept = work.operand * N * (2 * Q + 2 * G) + sums
        return kept, FP32 * N * (Q + 2 * G), (FP32 + work.operand) * N * (Q + 2 * G) + sums
    if window < T:  # tiles of one window of queries against two of keys
        padded = work.rows * -(-T // window) * window
        tiles = FP32 * padded * 2 * G
        mask = FP32 * padded * 2 * window
        kept = FP32 * padded * 2 * Q + 2 * tiles + mask + sums
        forward = FP32 * N * (Q + 2 * G) + max(1.5 * tiles, mask / 4 * 2)
        return kept, forward, FP32 * padded * 3 * Q + 4 * tiles
    ends = [min(T, start + QUERY_CHUNK) for start in range(0, T, QUERY_CHUNK)]
    mask = FP32 * work.rows * sum(QUERY_CHUNK * end for end in ends[:-1])
    mask += FP32 * work.rows * (T - QUERY_CHUNK * (len(ends) - 1)) * T
    kept = FP32 * N * (2 * Q + 2 * G) + mask + sums
    return kept, FP32 * N * Q, FP32 * N * (4 * Q + 6 * G)


def _swiglu(work: Work, D: int, F: int, name: str, reads: bool) -> list[Op]:
    """Gate, up and down of a dense block; the shared expert reads what the router kept."""
    N = work.tokens
    inner, rows = FP32 * N * F, FP32 * N * D
    silu = 0 if work.kernels else inner
    up = _linear(f"{name}gate, up", work, D, F, F, reads=reads, flow=rows)
    return [
        up._replace(backward=up.backward + rows),
        Op(f"{name}swiglu", 2 * inner + silu, inner + rows, 3 * inner + rows),
        _linear(f"{name}down", work, F, D, flow=rows),
    ]


def _experts(c: ModelConfig, work: Work) -> list[Op]:
    """Router and routed experts. As many pairs arrive as leave: load is taken as balanced.

    Between ranks, pairs are gathered twice, before and after they travel, and weighed twice, by one
    where they are computed and by their gate at home (:mod:`kexa.dist.experts`).
    """
    N, D, E, K = work.tokens, c.hidden_size, c.num_experts, c.num_experts_per_tok
    F, P, held = c.moe_intermediate_size, work.tokens * K, c.num_experts // work.expert_ranks
    rows, pairs, inner = FP32 * N * D, FP32 * P * D, FP32 * P * F
    scores, travel = FP32 * N * E, pairs * (work.expert_ranks > 1)
    fused = work.kernels and work.numerics == "fp32"
    silu = 0 if work.kernels else inner
    # ParallelExperts.forward holds the rows that leave and those that arrive until it returns.
    down_flow, back_flow = 2 * rows + 2 * travel, 2 * rows + travel
    kept = rows + scores + 4 * INDEX * P + FP32 * P
    router = Op("router", kept, 2 * rows + 3 * scores, 2 * rows + 4 * scores, E * D)

    weights = 2 * F * D * held
    rounding = max(work.rounding(P, D), work.rounded_rows(P, D) + work.unfinished(weights))
    up = Op(
        "experts gate, up",
        (0 if fused else pairs) + work.rounded_weights(D, 2 * F, held),
        down_flow + 2 * inner + work.rounding(P, D),
        back_flow + 2 * inner + pairs + 2 * work.rounded_rows(P, 2 * F) + rounding + FP32 * weights,
        weights,
    )
    swiglu = Op("experts swiglu", 2 * inner + silu, down_flow + inner, back_flow + 3 * inner)
    weights = F * D * held
    rounding = max(work.rounding(P, F), work.rounded_rows(P, F) + work.unfinished(weights))
    down = Op(
        "experts down",
        inner + work.rounded_weights(F, D, held),
        down_flow + pairs + work.rounding(P, F),
        back_flow + pairs + inner + 2 * work.rounded_rows(P, D) + rounding + FP32 * weights,
        weights,
    )
    mixed = (0 if fused else pairs) + travel
    mix = Op("mix", mixed, down_flow + 2 * pairs + travel, back_flow + 2 * pairs)
    return [router, up, swiglu, down, mix]


def _loss(c: ModelConfig, work: Work) -> Op:
    """The head's loss. A CPU forms the gradients beside the loss, a GPU the logits twice."""
    N, D, V = work.tokens, c.hidden_size, c.vocab_size
    rows, table = N * D, V * D
    rounded = work.numerics != "fp32"
    if work.kernels:
        kept = work.operand * (rows + table * rounded) + FP32 * N
        parts = FP32 * N * V / TILE  # one log-sum-exp per tile of words
        gradients = (FP32 + work.operand * rounded) * (rows + table)
        logits = work.operand * N * min(V, HEAD_CHUNK)
        return Op("loss", kept, FP32 * rows + parts, gradients + logits, table)
    kept = FP32 * (rows + table)
    logits = FP32 * min(ROWS, N) * V
    forward = FP32 * rows + logits + (logits / 2 + (FP32 + 2) * (rows + table) if rounded else 0)
    backward = FP32 * (2 * rows + table) + (FP32 + 2) / 2 * table * rounded
    return Op("loss", kept, forward, backward, table)


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

    ``activations`` are those kept when the forward pass ends; ``temporary`` is what the peak holds
    beyond the five others.
    """

    parameters: float
    gradients: float
    momentum: float  # Muon
    moments: float  # AdamW: two
    activations: float
    peak: float
    where: str

    @property
    def states(self) -> float:
        """What lives from step to step."""
        return self.parameters + self.momentum + self.moments

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
) -> Memory:
    """The peak of one training step.

    Args:
        accumulate: micro-batches per step; from the second on all gradients are held throughout.
        dense_ranks: ranks that share every parameter outside the experts.
        expert_shards: ranks that share each expert, beside ``work.expert_ranks``.
    """
    trained = parameters(config)
    expert_ranks = work.expert_ranks * expert_shards
    experts, dense = trained.experts / expert_ranks, trained.muon - trained.experts
    adamw = trained.adamw / dense_ranks
    count = experts + dense / dense_ranks + adamw
    momentum = experts + dense / dense_ranks
    states = FP32 * (count + momentum + 2 * adamw)

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
        held = top.down(unit, held, here + after, work.recompute)
    activations = held - top.start
    for i, unit in reversed(list(enumerate(parts))):
        # parameters of this unit and, on their way, of the next; gradients of the last one leave
        on_the_way = sum(gathered[max(0, i - 1) : i + 2])
        held = top.back(unit, held, on_the_way, work.recompute, sharded or accumulate == 1)
        if sharded and not unit.root:
            top.see(held + 2 * gathered[i], f"{unit.name}, reduce-scatter")
            experts = unit.experts / work.expert_ranks
            held -= FP32 * (unit.dense + experts)
            if accumulate == 1:
                held += FP32 * (unit.dense / dense_ranks + experts / expert_shards)
    top.see(
        states + FP32 * count + _newton_schulz(trained, work, dense_ranks, expert_ranks), "Muon"
    )
    return Memory(
        parameters=FP32 * count,
        gradients=FP32 * count,
        momentum=FP32 * momentum,
        moments=2 * FP32 * adamw,
        activations=activations,
        peak=top.bytes,
        where=top.where,
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


def _newton_schulz(trained: Parameters, work: Work, dense_ranks: int, expert_ranks: int) -> float:
    """Bytes beside gradients and states while Muon steps through its largest group.

    The updates of the group, the results so far, and one batch of matrices [M, N], M <= N, of equal
    size: its input, two products of that size and the result, or four [M, M]. A batch ends after
    ``MUON_BATCH`` numbers but never within a parameter. A GPU iterates in BF16. The Gram form holds
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
        batch = min(size, MUON_BATCH + stacks[group, m, n])
        gram = batch * m / n
        iteration = number * max(4 * batch + gram, 2 * batch + 4 * gram)
        results = number * (groups[group] - batch)
        most = max(most, FP32 * groups[group] + results + max(iteration, 2 * FP32 * batch))
    return most
