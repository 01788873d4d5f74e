"""What each operation of a training step keeps and holds, in bytes.

``kept`` is what an operation leaves for its backward pass. ``forward`` and ``backward`` are what
lives only while it runs, its result and incoming gradients among it. Counted is what ``kexa.model``
and ``kexa.kernels`` save, so this table changes when they do; a test compares it with autograd.
Activations are fp32 under every numerics policy (:mod:`kexa.train.fp8` rounds values, not storage)
but for what a GPU holds in BF16 (operands of attention, the head) or E4M3 (weights). Two paths
differ:

    cpu     PyTorch: rounded weights are fp32 copies, windows are tiles of keys with a mask of
            numbers, SwiGLU keeps silu(gate), the head keeps its gradients
    cuda    Triton kernels: codes, no mask, no silu(gate), the head keeps its operands

The cuda column is derived in the same way and has not been compared with a GPU's allocator yet.

Legend (counts of numbers): N tokens, P = N K pairs of token and expert, D hidden size, Q and G
features of all query and of all key heads, F inner size, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kexa.config import ModelConfig
from kexa.kernels.attention.banded import QUERY_CHUNK
from kexa.kernels.cross_entropy import sliced

FP32 = 4
INDEX = 8  # int64
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
    """The head's loss. A CPU forms the gradients beside the loss, a GPU the logits twice.

    A CPU that multiplies BF16 as it is adds what a slice gives dw in BF16, converted whole.
    """
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
    logits = FP32 * min(sliced.ROWS, N) * V
    forward = FP32 * rows + logits
    if rounded:
        added = (FP32 + 2) * table if sliced.has_bf16_products() else 0
        forward += logits / 2 + (FP32 + 2) * (rows + table) + added
    backward = FP32 * (2 * rows + table) + (FP32 + 2) / 2 * table * rounded
    return Op("loss", kept, forward, backward, table)
