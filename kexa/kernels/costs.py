"""FLOPs and bytes of an operation before any kernel is written: the bound a kernel is judged by.

A product of [m, k] and [k, n] is 2mkn FLOPs; bytes are those that must cross the memory bus once.
Their quotient, the arithmetic intensity, against the chip's own (peak FLOP/s over bytes/s) says
whether arithmetic or memory sets the least possible time:

    least time = max(flops / peak flops, bytes / bandwidth)

H100 SXM figures are NVIDIA's data sheet: 989 TFLOP/s dense bf16, 1979 in FP8, 3.35 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

H100_FLOPS = 989e12  # bf16, dense, per second
H100_FP8_FLOPS = 1979e12  # FP8, dense, per second
H100_BYTES = 3.35e12  # per second


@dataclass(frozen=True)
class Cost:
    """Work of one call in FLOPs and bytes."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def least_seconds(self, flops: float = H100_FLOPS, bandwidth: float = H100_BYTES) -> float:
        """No kernel on a chip with these peaks can be faster."""
        return max(self.flops / flops, self.bytes / bandwidth)


def attention(
    tokens: int, heads: int, kv_heads: int, head_dim: int, window: int, item: int = 2
) -> Cost:
    """Forward pass of one row; ``window >= tokens`` is global attention; ``item`` bytes per number.

    Counts the pairs a query may see: sum over t of min(t + 1, window). Reads q, k, v, writes o.
    """
    full = min(window, tokens)
    pairs = full * (full + 1) // 2 + (tokens - full) * full
    moved = tokens * head_dim * item * (2 * heads + 2 * kv_heads)
    return Cost(flops=4.0 * heads * pairs * head_dim, bytes=float(moved))


def grouped_gemm(rows: int, inputs: int, outputs: int, experts_used: int, item: int = 2) -> Cost:
    """Forward pass: every used expert's matrix is read once, every row read and written once."""
    moved = item * (experts_used * inputs * outputs + rows * (inputs + outputs))
    return Cost(flops=2.0 * rows * inputs * outputs, bytes=float(moved))


def expert_up(
    tokens: int, top_k: int, inputs: int, inner: int, experts_used: int, item: int = 2
) -> Cost:
    """Forward pass in training: reads a token's row for each of its pairs, writes gate, up and h.

    The int64 order is read once; SwiGLU is five FLOPs a number.
    """
    pairs = tokens * top_k
    numbers = experts_used * 2 * inner * inputs + pairs * (inputs + 3 * inner)
    flops = 4.0 * pairs * inputs * inner + 5.0 * pairs * inner
    return Cost(flops=flops, bytes=float(item * numbers + 8 * pairs))


def expert_down(
    tokens: int, top_k: int, inner: int, outputs: int, experts_used: int, item: int = 2
) -> Cost:
    """Forward pass: the weighed rows of the pairs are written, and read again to be summed.

    The int64 order and the fp32 gates are read once.
    """
    pairs = tokens * top_k
    numbers = experts_used * outputs * inner + pairs * (inner + 2 * outputs) + tokens * outputs
    flops = 2.0 * pairs * inner * outputs + 2.0 * pairs * outputs
    return Cost(flops=flops, bytes=float(item * numbers + 12 * pairs))


def scaled_gemm(rows: int, inputs: int, outputs: int, experts_used: int) -> Cost:
    """Product of FP8 codes (1 byte; 4 bytes of scale per row, or block, of 128) into BF16 rows."""
    weights = experts_used * inputs * outputs * (1 + 4 / 128**2)
    moved = weights + rows * inputs * (1 + 4 / 128) + 2 * rows * outputs
    return Cost(flops=2.0 * rows * inputs * outputs, bytes=moved)


def linear_cross_entropy(rows: int, inputs: int, vocabulary: int, item: int = 2) -> Cost:
    """Forward pass: hidden states and the head's matrix are read once, no logit is written."""
    moved = item * inputs * (rows + vocabulary)
    return Cost(flops=2.0 * rows * inputs * vocabulary, bytes=float(moved))


def rms_norm(rows: int, features: int, item: int = 2) -> Cost:
    """Forward pass: square, add, scale and weigh every number; read it once, write it once."""
    return Cost(flops=4.0 * rows * features, bytes=float(item * features * (2 * rows + 1)))


def swiglu(rows: int, features: int, item: int = 2) -> Cost:
    """Forward pass: reads gate and up, writes one number; an exponential counts as one FLOP."""
    return Cost(flops=5.0 * rows * features, bytes=float(item * 3 * rows * features))
