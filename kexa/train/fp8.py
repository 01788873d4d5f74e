"""Numerics of the matrix products: FP8 and BF16, applied to a model from outside.

A linear layer has three products, and each rounds its operands and its result:

    y  = x w^T      fprop     contracts over D
    dx = dy w       dgrad     contracts over F
    dw = dy^T x     wgrad     contracts over tokens

FP8: every operand becomes E4M3 with one scale per tile:

    scale = max(amax(tile), 2^-100) / 448,   code = E4M3(x / scale),   value = code * scale

    policy            a tile of x or dy                          a tile of w
    fp8               1 x 128, long along the contracted axis    128 x 128
    fp8-rowwise       the whole contracted axis of one row       likewise
    fp8-tensorwise    the whole matrix                           the whole matrix, per expert

Scales come from the tensor at hand (no history), products accumulate in fp32, results are rounded
to BF16. Tokens of different experts never share a tile, except tensorwise. Master weights,
gradients of weights and optimizer states stay fp32.

"bf16": operands and results rounded to BF16, fp32 accumulation. "fp32": nothing is rounded.

reported: native FP8 training with a loss curve comparable to BF16. not reported: which FP8.
chosen: DeepSeek-V3's recipe (arXiv 2412.19437), "fp8"; the coarser two are there to compare with.
chosen: embedding and norms are not matrix products and stay fp32, the router too (reported); head
and MTP projection use BF16 products; attention itself stays fp32 on a CPU and is BF16 on a GPU,
where fp32 would take most of a step (its softmax and sums are fp32 either way). The training loss
never stores the head's logits and so does not round them (:mod:`kexa.kernels.cross_entropy`).
chosen: x and dy are quantised from their original values for wgrad, not requantised from the codes
of the other two products.

Chips with FP8 (:func:`kexa.runtime.has_fp8`) run "fp8" with the kernels of ``kexa.kernels.fp8``.
Elsewhere FP8 is emulated, and so are the other two recipes everywhere (chosen: they are compared by
their loss, not their speed): operands are rounded to the values of the very same codes and
multiplied decoded. CPUs multiply in fp32, but for the head's gradients, whose BF16 operands they
take as they are; GPUs in BF16, which is exact for BF16 operands and rounds decoded FP8 ones by
2^-9, beside the format's 2^-4.

Legend: N tokens, D inputs, F outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexa.kernels import (
    Scaled,
    grouped_gemm,
    linear_cross_entropy,
    quantize_blocks,
    quantize_rows,
    quantize_tokens,
    scaled_gemm,
    scaled_weight_gemm,
    transposed,
)
from kexa.kernels.fp8.emulated import TILE, quantize, quantize_ragged
from kexa.model.attention import Attention, unchanged
from kexa.model.linear import Head, Linear
from kexa.model.moe import SparseMoE
from kexa.runtime import has_fp8


def round_bf16(x: Tensor) -> Tensor:
    """Round to the nearest BF16 value, keeping the dtype."""
    return x.bfloat16().to(x.dtype)


class _Blockwise:
    """How emulated "fp8" rounds each operand."""

    @staticmethod
    def weights(w: Tensor) -> tuple[Tensor, Tensor]:
        """As fprop and as dgrad reads them."""
        rounded = quantize(w, TILE, TILE)
        return rounded, rounded

    @staticmethod
    def rows(x_ND: Tensor) -> Tensor:
        """x of fprop, dy of dgrad: contracted along a row."""
        return quantize(x_ND, 1, TILE)

    @staticmethod
    def tokens(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """x and dy of wgrad: contracted along the tokens of each expert."""
        return quantize_ragged(x_ND, counts) if len(counts) > 1 else quantize(x_ND, TILE, 1)

    @staticmethod
    def both(x_ND: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``rows`` and ``tokens`` of one tensor."""
        return _Blockwise.rows(x_ND), _Blockwise.tokens(x_ND, counts)


class _Rowwise:
    """How "fp8-rowwise" does: a scale for all that one sum runs over."""

    @staticmethod
    def weights(w: Tensor) -> tuple[Tensor, Tensor]:
        F, D = w.shape[-2:]
        return quantize(w, 1, D), quantize(w, F, 1)

    @staticmethod
    def rows(x_ND: Tensor) -> Tensor:
        return quantize(x_ND, 1, x_ND.shape[1])

    @staticmethod
    def tokens(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        return quantize_ragged(x_ND, counts, tile=max(counts))

    @staticmethod
    def both(x_ND: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return _Rowwise.rows(x_ND), _Rowwise.tokens(x_ND, counts)


class _Tensorwise:
    """How "fp8-tensorwise" does: one scale, so all products read the same codes."""

    @staticmethod
    def weights(w: Tensor) -> tuple[Tensor, Tensor]:
        rounded = quantize(w, *w.shape[-2:])
        return rounded, rounded

    @staticmethod
    def rows(x_ND: Tensor) -> Tensor:
        return quantize(x_ND, *x_ND.shape) if len(x_ND) else x_ND

    @staticmethod
    def tokens(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        return _Tensorwise.rows(x_ND)

    @staticmethod
    def both(x_ND: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        rounded = _Tensorwise.rows(x_ND)
        return rounded, rounded


class _Bf16:
    """How BF16 rounds each operand: alike."""

    rows = staticmethod(round_bf16)

    @staticmethod
    def weights(w: Tensor) -> tuple[Tensor, Tensor]:
        rounded = round_bf16(w)
        return rounded, rounded

    @staticmethod
    def tokens(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        return round_bf16(x_ND)

    @staticmethod
    def both(x_ND: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        rounded = round_bf16(x_ND)
        return rounded, rounded


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of rounded operands: fp32 accumulation, BF16 result."""
    if a.is_cuda:
        return (a.bfloat16() @ b.bfloat16()).float()
    return round_bf16(a @ b)


def _grouped_product(x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`_product` of every expert."""
    if x_ND.is_cuda:
        return grouped_gemm(x_ND.bfloat16(), w_EFD.bfloat16(), offsets_E).float()
    return round_bf16(grouped_gemm(x_ND, w_EFD, offsets_E))


class _Matmul(torch.autograd.Function):
    """The three products of ``y = x w^T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_FD: Tensor, rounding: type) -> Tensor:
        w_hat, w_back = rounding.weights(w_FD)
        ctx.rounding = rounding
        ctx.save_for_backward(x, w_back)
        y_NF = _product(rounding.rows(x.flatten(0, -2)), w_hat.T)
        return y_NF.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, w_back = ctx.saved_tensors
        x_ND = x.flatten(0, -2)
        counts = [len(x_ND)]
        dy_rows, dy_tokens = ctx.rounding.both(dy.flatten(0, -2), counts)
        dx = _product(dy_rows, w_back).view_as(x)
        dw = _product(dy_tokens.T, ctx.rounding.tokens(x_ND, counts))
        return dx, dw, None


class _GroupedMatmul(torch.autograd.Function):
    """The three products of every expert."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor, rounding: type) -> Tensor:
        w_hat, w_back = rounding.weights(w_EFD)
        ctx.rounding = rounding
        ctx.save_for_backward(x_ND, w_back, offsets_E)
        return _grouped_product(rounding.rows(x_ND), w_hat, offsets_E)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> tuple:
        x_ND, w_back, offsets_E = ctx.saved_tensors
        counts = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
        dy_rows, dy_tokens = ctx.rounding.both(dy_NF, counts)
        x_tokens = ctx.rounding.tokens(x_ND, counts)
        dx = _grouped_product(dy_rows, w_back.mT, offsets_E)
        pairs = zip(dy_tokens.split(counts), x_tokens.split(counts), strict=True)
        dw = torch.stack([_product(dy.T, x) for dy, x in pairs])
        return dx, dw, None, None


class _Fp8Kernels(torch.autograd.Function):
    """The three products of every expert, as codes, with the kernels."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
        w = quantize_blocks(w_EFD)
        ctx.save_for_backward(x_ND, *w, offsets_E)
        return scaled_gemm(quantize_rows(x_ND), w, offsets_E).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> tuple:
        x_ND, codes, scales, offsets_E = ctx.saved_tensors
        w = transposed(Scaled(codes, scales))
        dx = scaled_gemm(quantize_rows(dy_NF), w, offsets_E)
        dy, x = quantize_tokens(dy_NF, offsets_E), quantize_tokens(x_ND, offsets_E)
        dw = scaled_weight_gemm(dy, x, offsets_E)
        return dx.to(x_ND.dtype), dw.to(x_ND.dtype), None


def fp8_matmul(x: Tensor, w_FD: Tensor) -> Tensor:
    """``x w^T`` in FP8, forward and backward: fp32 ``[..., D]`` and ``[F, D]`` to ``[..., F]``."""
    if has_fp8(x.device):
        x_ND = x.flatten(0, -2)
        end = torch.full((1,), len(x_ND), dtype=torch.int32, device=x.device)
        return _Fp8Kernels.apply(x_ND, w_FD[None], end).unflatten(0, x.shape[:-1])
    return _Matmul.apply(x, w_FD, _Blockwise)


def fp8_grouped_gemm(x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`kexa.kernels.grouped_gemm` in FP8, forward and backward."""
    if has_fp8(x_ND.device):
        return _Fp8Kernels.apply(x_ND, w_EFD, offsets_E)
    return _GroupedMatmul.apply(x_ND, w_EFD, offsets_E, _Blockwise)


def rowwise_matmul(x: Tensor, w_FD: Tensor) -> Tensor:
    """:func:`fp8_matmul` with the rowwise recipe."""
    return _Matmul.apply(x, w_FD, _Rowwise)


def rowwise_grouped_gemm(x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`fp8_grouped_gemm` with the rowwise recipe."""
    return _GroupedMatmul.apply(x_ND, w_EFD, offsets_E, _Rowwise)


def tensorwise_matmul(x: Tensor, w_FD: Tensor) -> Tensor:
    """:func:`fp8_matmul` with the tensorwise recipe."""
    return _Matmul.apply(x, w_FD, _Tensorwise)


def tensorwise_grouped_gemm(x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`fp8_grouped_gemm` with the tensorwise recipe."""
    return _GroupedMatmul.apply(x_ND, w_EFD, offsets_E, _Tensorwise)


def bf16_matmul(x: Tensor, w_FD: Tensor) -> Tensor:
    """``x w^T`` in BF16, forward and backward."""
    return _Matmul.apply(x, w_FD, _Bf16)


def bf16_grouped_gemm(x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`kexa.kernels.grouped_gemm` in BF16, forward and backward."""
    return _GroupedMatmul.apply(x_ND, w_EFD, offsets_E, _Bf16)


def bf16_cross_entropy(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    z_loss: float = 0.0,
    penalties: list[Tensor] | None = None,
) -> Tensor:
    """:func:`kexa.kernels.linear_cross_entropy` in BF16, forward and backward."""
    return linear_cross_entropy(h_ND.bfloat16(), w_VD.bfloat16(), targets_N, z_loss, penalties)


def bf16_on_gpu(x: Tensor) -> Tensor:
    """Queries, keys or values as attention reads them."""
    return x.bfloat16() if x.is_cuda else x


@dataclass(frozen=True)
class _Policy:
    """What each kind of module computes with."""

    linear: Callable
    experts: Callable
    high: Callable  # the linears that stay high
    cross_entropy: Callable  # of the head
    attention: Callable  # what q, k and v pass through


def _rounded(matmul: Callable, experts: Callable) -> _Policy:
    """A policy that lowers these products and leaves the rest to BF16."""
    return _Policy(matmul, experts, bf16_matmul, bf16_cross_entropy, bf16_on_gpu)


POLICIES = {
    "fp8": _rounded(fp8_matmul, fp8_grouped_gemm),
    "fp8-rowwise": _rounded(rowwise_matmul, rowwise_grouped_gemm),
    "fp8-tensorwise": _rounded(tensorwise_matmul, tensorwise_grouped_gemm),
    "bf16": _rounded(bf16_matmul, bf16_grouped_gemm),
    "fp32": _Policy(F.linear, grouped_gemm, F.linear, linear_cross_entropy, unchanged),
}

_FP8_ROUNDINGS = {
    fp8_matmul: _Blockwise,
    fp8_grouped_gemm: _Blockwise,
    rowwise_matmul: _Rowwise,
    rowwise_grouped_gemm: _Rowwise,
    tensorwise_matmul: _Tensorwise,
    tensorwise_grouped_gemm: _Tensorwise,
}


def fp8_operands(
    product: Callable, counts: Sequence[int]
) -> dict[str, Callable[[Tensor], Tensor]] | None:
    """How an FP8 product rounds the operands of its three GEMMs, to measure what that costs.

    Args:
        product: a policy's, as modules hold it. counts: rows of each expert; one number if dense.

    Returns:
        By operand, from ``x [N, D]``, ``w [..., F, D]`` or ``dy [N, F]`` to the decoded values,
        whatever path the product takes. None for a product that is not FP8.
    """
    rounding = _FP8_ROUNDINGS.get(product)
    if rounding is None:
        return None
    return {
        "fprop x": rounding.rows,
        "fprop w": lambda w: rounding.weights(w)[0],
        "dgrad dy": rounding.rows,
        "dgrad w": lambda w: rounding.weights(w)[1],
        "wgrad dy": lambda dy: rounding.tokens(dy, counts),
        "wgrad x": lambda x: rounding.tokens(x, counts),
    }


def stays_high(name: str) -> bool:
    """Whether FP8 leaves this linear to BF16."""
    return name in ("lm_head", "mtp.fc")


def set_numerics(model: nn.Module, policy: str) -> dict[str, list[str]]:
    """Make every matrix product of a model follow ``policy``, one of the module header's.

    Parameters are not touched. Returns the module names by kind: "linear", "experts", "high".

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"numerics {policy!r}: use one of {', '.join(POLICIES)}")
    chosen = POLICIES[policy]
    changed: dict[str, list[str]] = {"linear": [], "experts": [], "high": []}
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE):
            module.grouped_gemm = chosen.experts
            changed["experts"].append(name)
        elif isinstance(module, Linear):
            module.matmul = chosen.high if stays_high(name) else chosen.linear
            changed["high" if stays_high(name) else "linear"].append(name)
            if isinstance(module, Head):
                module.cross_entropy = chosen.cross_entropy
        elif isinstance(module, Attention):
            module.operand = chosen.attention
    return changed
