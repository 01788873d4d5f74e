"""What is measured: each operation with its rivals and shapes, as data.

A rival computes the same numbers another way that people use. ``build(shape, device)`` returns the
candidates by name, ours first; each is a function of no argument that runs forward and backward
(decoding: forward) and returns the output.

Legend: B batch, T tokens, H query heads, G key/value heads, K head size, W window, N rows, D input
and F output features, E experts, C experts chosen per token, V vocabulary, S slots of a cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kexa.kernels import (
    decode_attention,
    expert_down,
    expert_up,
    global_attention,
    grouped_gemm,
    linear_cross_entropy,
    rms_norm,
    route,
    swiglu,
    window_attention,
)
from kexa.kernels.attention.reference import visible
from kexa.kernels.decode.reference import visible_slots
from kexa.train.fp8 import fp8_grouped_gemm, fp8_matmul

Candidates = dict[str, Callable[[], torch.Tensor] | None]  # None: not installed here
Shape = dict[str, int]


@dataclass(frozen=True)
class Operation:
    """One row group of the table. ``check`` names the operation in ``kexa.kernels.check``."""

    name: str
    check: str
    build: Callable[[Shape, str], Candidates]
    cpu: tuple[Shape, ...]
    cuda: tuple[Shape, ...]  # the published sizes


def window_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, the dense window mask (what a plain implementation does), full causal attention, and on
    a GPU FlexAttention, which has no backward on a CPU."""
    q, k, v, d_out = _heads(shape, device)
    window = shape["W"]
    mask = visible(shape["T"], window).to(device)[:, None]
    candidates = {
        "kexa": _step(lambda: window_attention(q, k, v, window), (q, k, v), d_out),
        "SDPA, dense window mask": _step(lambda: _sdpa(q, k, v, mask), (q, k, v), d_out),
        "SDPA, causal without window": _step(lambda: _sdpa(q, k, v, None), (q, k, v), d_out),
    }
    if device == "cuda":

        def sees(b, h, i, j):
            return (j <= i) & (j > i - window)

        candidates["FlexAttention, compiled"] = _step(_flex(q, k, v, sees, None), (q, k, v), d_out)
    return candidates


def global_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, the dense mask, and on a GPU FlexAttention, on rows that pack four documents."""
    q, k, v, d_out = _heads(shape, device)
    ids = torch.arange(shape["T"], device=device).mul(4).div(shape["T"]).int()
    ids = ids.expand(shape["B"], -1).contiguous()
    mask = visible(shape["T"], None, ids)[:, None]
    candidates = {
        "kexa": _step(lambda: global_attention(q, k, v, ids), (q, k, v), d_out),
        "SDPA, dense document mask": _step(lambda: _sdpa(q, k, v, mask), (q, k, v), d_out),
    }
    if device == "cuda":

        def sees(b, h, i, j):
            return (j <= i) & (ids[b, i] == ids[b, j])

        rows = shape["B"]
        candidates["FlexAttention, compiled"] = _step(_flex(q, k, v, sees, rows), (q, k, v), d_out)
    return candidates


def grouped_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, PyTorch's grouped product, indexing the stack in a loop, and one dense product."""
    N, D, out, E = (shape[n] for n in "NDFE")
    x, w, d_out = (
        _normal(device, N, D),
        _normal(device, E, out, D),
        _normal(device, N, out).detach(),
    )
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, E, (N,), generator=generator).bincount(minlength=E).cumsum(0)
    offsets, bounds = ends.int().to(device), [0, *ends.tolist()]

    def indexed():
        parts = zip(range(E), bounds, bounds[1:], strict=False)
        return torch.cat([x[start:end] @ w[e].T for e, start, end in parts])

    return {
        "kexa": _step(lambda: grouped_gemm(x, w, offsets), (x, w), d_out),
        "F.grouped_mm": _step(
            lambda: F.grouped_mm(x, w.transpose(1, 2), offs=offsets), (x, w), d_out
        ),
        "loop over w[e]": _step(indexed, (x, w), d_out),
        "dense product of equal FLOPs": _step(lambda: x @ w[0].T, (x, w), d_out),
    }


def experts_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, the same operations one by one, and a loop over experts that adds into the tokens."""
    N, D, inner, E, C = (shape[n] for n in "NDFEC")
    x, d_out = _normal(device, N, D), _normal(device, N, D).detach()
    w_up, w_down = (
        (_normal(device, E, out, given).detach() / given**0.5).requires_grad_()
        for out, given in ((2 * inner, D), (D, inner))
    )
    keys = torch.randn(N, E, generator=torch.Generator().manual_seed(0)).to(device)
    routing = route(keys.sigmoid(), keys, C, True, 2.5)
    leaves = (x, w_up, w_down, routing.gates_NK.requires_grad_())
    bounds = [0, *routing.offsets_E.tolist()]

    def fused():
        return expert_down(expert_up(x, w_up, routing), w_down, routing)

    def separate():
        rows = grouped_gemm(x[routing.order_P // C], w_up, routing.offsets_E)
        rows = grouped_gemm(swiglu(*rows.chunk(2, dim=-1)), w_down, routing.offsets_E)
        rows = rows[routing.inverse_P].unflatten(0, (N, C))
        return (routing.gates_NK[..., None] * rows).sum(1).to(x.dtype)

    def loop():
        y, gates = torch.zeros_like(x), routing.gates_NK.flatten()
        for up, down, start, end in zip(w_up, w_down, bounds, bounds[1:], strict=False):
            pairs = routing.order_P[start:end]
            gate, up = (x[pairs // C] @ up.T).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ down.T * gates[pairs, None]
            y.index_add_(0, pairs // C, rows.to(y.dtype))
        return y

    return {
        "kexa": _step(fused, leaves, d_out),
        "separate operations": _step(separate, leaves, d_out),
        "loop over experts, index_add": _step(loop, leaves, d_out),
    }


def fp8_candidates(shape: Shape, device: str) -> Candidates:
    """Ours (emulated on a CPU), the product without FP8, and PyTorch's FP8 product."""
    x, w = _normal(device, shape["N"], shape["D"]), _normal(device, shape["F"], shape["D"])
    d_out = _normal(device, shape["N"], shape["F"]).detach()
    return {
        "kexa": _step(lambda: fp8_matmul(x, w), (x, w), d_out),
        "product without FP8": _step(lambda: x @ w.T, (x, w), d_out),
        "torch._scaled_mm, a scale per row": _step(lambda: _ScaledMm.apply(x, w), (x, w), d_out),
    }


def fp8_grouped_candidates(shape: Shape, device: str) -> Candidates:
    """Ours (on a CPU emulated) and the grouped product that rounds nothing to FP8."""
    N, D, out, E = (shape[n] for n in "NDFE")
    x, w, d_out = _normal(device, N, D), _normal(device, E, out, D), _normal(device, N, out)
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, E, (N,), generator=generator).bincount(minlength=E).cumsum(0)
    offsets, d_out = ends.int().to(device), d_out.detach()
    return {
        "kexa": _step(lambda: fp8_grouped_gemm(x, w, offsets), (x, w), d_out),
        "grouped GEMM without FP8": _step(lambda: grouped_gemm(x, w, offsets), (x, w), d_out),
    }


def decode_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, and PyTorch's attention to all slots under the same mask. Without W a global layer."""
    B, T, H, G, K, S = (shape[n] for n in "BTHGKS")
    window = shape.get("W")
    q = _normal(device, B, T, H, K).detach().transpose(1, 2)
    k, v = (_normal(device, B, G, S, K).detach() for _ in "kv")
    position = torch.full((B, 1), S - T, device=device) + torch.arange(T, device=device)
    start = torch.zeros(B, dtype=torch.int64, device=device)
    mask = visible_slots(position, start, S, window)
    return {
        "kexa": lambda: decode_attention(q, k, v, position, start, window, mask),
        "SDPA, same mask": lambda: _sdpa(q, k, v, mask),
    }


def cross_entropy_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, all logits at once, slices of 256 rows (autograd keeps them all), and Liger."""
    N, D, V = (shape[n] for n in "NDV")
    generator = torch.Generator().manual_seed(0)
    h, w = _normal(device, N, D), (_normal(device, V, D).detach() / D**0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator).to(device)
    one = torch.ones((), device=device)

    def plain(h, targets):
        return F.cross_entropy((h @ w.T).float(), targets, reduction="sum")

    def slices():
        return sum(plain(x, y) for x, y in zip(h.split(256), targets.split(256), strict=True))

    return {
        "kexa": _step(lambda: linear_cross_entropy(h, w, targets), (h, w), one),
        "logits, F.cross_entropy": _step(lambda: plain(h, targets), (h, w), one),
        "slices of logits": _step(slices, (h, w), one),
        **_liger(
            device,
            "fused_linear_cross_entropy",
            "LigerFusedLinearCrossEntropyFunction",
            lambda fused: _step(
                lambda: fused(h, w, targets, None, None, -100, 0.0, 0.0, "sum")[0], (h, w), one
            ),
        ),
    }


def norm_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, PyTorch's own (rounds once, after the weight), the norm written out, and Liger."""
    x, w = _normal(device, shape["N"], shape["D"]), _normal(device, shape["D"])
    d_out = _normal(device, *x.shape).detach()

    def written_out():
        wide = x.float()
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    return {
        "kexa": _step(lambda: rms_norm(x, w, 1e-5), (x, w), d_out),
        "F.rms_norm": _step(lambda: F.rms_norm(x, w.shape, w, 1e-5), (x, w), d_out),
        "written out": _step(written_out, (x, w), d_out),
        **_liger(
            device,
            "rms_norm",
            "LigerRMSNormFunction",
            # not in place: that would overwrite d_out, which every round uses again
            lambda norm: _step(lambda: norm(x, w, 1e-5, 0.0, "llama", False), (x, w), d_out),
        ),
    }


def swiglu_candidates(shape: Shape, device: str) -> Candidates:
    """Ours, two operations, and Liger, on the halves of the experts' up product."""
    gate_up = _normal(device, shape["N"], 2 * shape["F"])
    d_out = _normal(device, shape["N"], shape["F"]).detach()

    def halves(glu):
        return _step(lambda: glu(*gate_up.chunk(2, dim=-1)), (gate_up,), d_out)

    return {
        "kexa": halves(swiglu),
        "F.silu * up": halves(lambda gate, up: F.silu(gate) * up),
        **_liger(device, "swiglu", "LigerSiLUMulFunction", halves),
    }


def routing_candidates(shape: Shape, device: str) -> Candidates:
    """Ours and PyTorch's top-k with argsort and scatter, in fp32 as routers are."""
    N, E, C = (shape[n] for n in "NEC")
    generator = torch.Generator().manual_seed(0)
    scores, keys = torch.randn(2, N, E, generator=generator).sigmoid().to(device)
    scores, d_out = scores.requires_grad_(), _normal(device, N, C).detach().float()

    def topk_argsort():
        chosen = keys.topk(C, dim=-1, sorted=False).indices
        gates = scores.gather(1, chosen)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20) * 2.5
        order = chosen.flatten().argsort(stable=True)
        hits = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
        hits.sum(0).long().cumsum(0).to(torch.int32)
        torch.empty_like(order).scatter_(0, order, torch.arange(N * C, device=device))
        return gates

    ours = _step(lambda: route(scores, keys, C, True, 2.5).gates_NK, (scores,), d_out)
    return {"kexa": ours, "topk, argsort": _step(topk_argsort, (scores,), d_out)}


OPERATIONS = (
    Operation(
        "window attention",
        "window attention",
        window_candidates,
        cpu=(
            {"B": 16, "T": 128, "H": 4, "G": 2, "K": 32, "W": 16},
            {"B": 1, "T": 4096, "H": 4, "G": 2, "K": 32, "W": 128},
        ),
        cuda=(
            {"B": 1, "T": 8192, "H": 64, "G": 8, "K": 128, "W": 128},
            {"B": 1, "T": 32768, "H": 64, "G": 8, "K": 128, "W": 128},
        ),
    ),
    Operation(
        "global attention, packed",
        "global attention",
        global_candidates,
        cpu=(
            {"B": 16, "T": 128, "H": 4, "G": 2, "K": 32},
            {"B": 1, "T": 2048, "H": 4, "G": 2, "K": 32},
        ),
        cuda=({"B": 1, "T": 8192, "H": 64, "G": 8, "K": 128},),
    ),
    Operation(
        "grouped GEMM",
        "grouped GEMM",
        grouped_candidates,
        cpu=(
            {"N": 4096, "D": 128, "F": 128, "E": 8},
            {"N": 4096, "D": 512, "F": 512, "E": 128},
        ),
        cuda=({"N": 65536, "D": 6144, "F": 2048, "E": 128},),
    ),
    Operation(
        "experts",
        "experts",
        experts_candidates,
        cpu=({"N": 1024, "D": 128, "F": 128, "E": 16, "C": 4},),
        cuda=({"N": 8192, "D": 6144, "F": 2048, "E": 128, "C": 8},),
    ),
    Operation(
        "FP8 GEMM",
        "FP8 GEMM",
        fp8_candidates,
        cpu=({"N": 4096, "D": 512, "F": 512},),
        cuda=({"N": 8192, "D": 6144, "F": 8192},),
    ),
    Operation(
        "FP8 grouped GEMM",
        "FP8 GEMM",
        fp8_grouped_candidates,
        cpu=({"N": 4096, "D": 128, "F": 128, "E": 8},),
        cuda=({"N": 65536, "D": 6144, "F": 2048, "E": 128},),
    ),
    Operation(
        "decode attention",
        "decode attention",
        decode_candidates,
        cpu=(
            {"B": 16, "T": 1, "H": 8, "G": 2, "K": 32, "S": 136, "W": 128},
            {"B": 1, "T": 1, "H": 8, "G": 2, "K": 32, "S": 65536},
        ),
        cuda=(
            {"B": 16, "T": 1, "H": 64, "G": 8, "K": 128, "S": 136, "W": 128},
            {"B": 16, "T": 1, "H": 64, "G": 8, "K": 128, "S": 65536},
        ),
    ),
    Operation(
        "linear cross-entropy",
        "linear cross-entropy",
        cross_entropy_candidates,
        cpu=({"N": 2048, "D": 128, "V": 6144}, {"N": 2048, "D": 256, "V": 4096}),
        cuda=({"N": 4096, "D": 6144, "V": 153600},),
    ),
    Operation(
        "RMSNorm",
        "RMSNorm",
        norm_candidates,
        cpu=({"N": 2048, "D": 256}, {"N": 16384, "D": 32}),
        cuda=({"N": 8192, "D": 6144}, {"N": 524288, "D": 128}),
    ),
    Operation(
        "SwiGLU",
        "SwiGLU",
        swiglu_candidates,
        cpu=({"N": 8192, "F": 128},),
        cuda=({"N": 65536, "F": 2048},),
    ),
    Operation(
        "routing",
        "routing",
        routing_candidates,
        cpu=({"N": 2048, "E": 16, "C": 4}, {"N": 2048, "E": 128, "C": 8}),
        cuda=({"N": 8192, "E": 128, "C": 8},),
    ),
)


class _ScaledMm(torch.autograd.Function):
    """The three products of ``x w^T`` by PyTorch's FP8 product with a scale per row, in BF16."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return _scaled_mm(x, w)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return _scaled_mm(dy, w.T), _scaled_mm(dy.T, x.T)


def _scaled_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b^T``, both quantised here."""
    codes, scales = [], []
    for x in (a, b):
        scales.append(x.abs().amax(1, keepdim=True).float().clamp(min=2.0**-100) / 448)
        codes.append((x / scales[-1]).to(torch.float8_e4m3fn).contiguous())
    y = torch._scaled_mm(codes[0], codes[1].T, scales[0], scales[1].T, out_dtype=torch.bfloat16)
    return y.to(a.dtype)


def _normal(device: str, *shape: int) -> torch.Tensor:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()


def _heads(shape: Shape, device: str) -> list[torch.Tensor]:
    """q, k, v as a model hands them over (views of token-major projections), and dO."""
    B, T, K = shape["B"], shape["T"], shape["K"]
    q, k, v, d_out = (_normal(device, B, T, shape[n], K).transpose(1, 2) for n in "HGGH")
    return [*(x.detach().requires_grad_() for x in (q, k, v)), d_out.detach()]


def _sdpa(q, k, v, mask) -> torch.Tensor:
    """PyTorch's attention; with a mask its memory-saving kernel wants a key head per query head."""
    if mask is not None and q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


def _flex(q, k, v, sees: Callable, rows: int | None) -> Callable[[], torch.Tensor]:
    """FlexAttention of pairs that ``sees(b, h, i, j)``; ``rows``: None if alike in every row."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[2]
    mask = create_block_mask(sees, rows, None, T, T, device=q.device)
    attention = torch.compile(flex_attention)
    return lambda: attention(q, k, v, block_mask=mask, enable_gqa=True)


def _liger(device: str, module: str, name: str, step: Callable) -> Candidates:
    """The step with one of Liger's functions, which need a GPU; None where it is not installed."""
    if device != "cuda":
        return {}
    try:
        function = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except ModuleNotFoundError:
        return {"Liger": None}
    return {"Liger": step(function.apply)}


def _step(forward: Callable, leaves: tuple, d_out: torch.Tensor) -> Callable[[], None]:
    def run() -> torch.Tensor:
        out = forward()
        torch.autograd.grad(out, leaves, d_out)
        return out

    return run
