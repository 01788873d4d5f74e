"""Is the path that this machine takes right? ``python -m kexa.kernels.check`` says so in seconds.

Each operation runs forward and backward on a deliberately odd shape (nothing divides a tile;
packed documents; empty experts) and is compared with its reference in fp64. What is allowed:

    float32                 1e-5 of the largest expected number
    float16, bfloat16       twice the error of the plain reference in the same dtype, plus one
                            rounding of the largest expected number

FP8 is judged on its products, of equal codes. They are BF16 on a GPU, whose FP8 tensor cores keep
fewer bits of a sum than fp32, so float32 is not asked for there.

The second rule calibrates itself: a kernel may reorder sums, but not be worse than PyTorch is.
On a GPU this runs the Triton kernels; on a CPU the PyTorch path, or with ``TRITON_INTERPRET=1`` the
same kernels interpreted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kexa.kernels import (
    Scaled,
    decode_attention,
    expert_down,
    expert_up,
    fp8,
    global_attention,
    grouped_gemm,
    linear_cross_entropy,
    rms_norm,
    route,
    swiglu,
    use_triton,
    window_attention,
)
from kexa.kernels.attention import reference as attention_reference
from kexa.kernels.cross_entropy import reference as cross_entropy_reference
from kexa.kernels.decode import reference as decode_reference
from kexa.kernels.experts import reference as experts_reference
from kexa.kernels.fp8 import reference as fp8_reference
from kexa.kernels.glu import reference as glu_reference
from kexa.kernels.grouped import reference as grouped_reference
from kexa.kernels.norm import reference as norm_reference
from kexa.kernels.routing import reference as routing_reference

TOKENS, WINDOW = 67, 37
ENDS = (0, 5, 5, 67, 131)  # the first and third of five experts get nothing


@dataclass(frozen=True)
class Check:
    """Largest error of each result, and the largest allowed, in units of that result."""

    operation: str
    path: str  # "triton" or "pytorch"
    dtype: torch.dtype
    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def holds(self) -> bool:
        """Every error is a number and within its bound."""
        return all(self.errors[name] <= self.allowed[name] for name in self.errors)

    def __str__(self) -> str:
        share = max(self.errors[name] / self.allowed[name] for name in self.errors)
        return (
            f"{self.operation:20s} {self.path}, {str(self.dtype).removeprefix('torch.')}: "
            f"{'right' if self.holds else 'WRONG'}, errors up to {share:.2f} of what is allowed"
        )


def compare(
    op: Callable, reference: Callable, inputs: Sequence[torch.Tensor], d_out: torch.Tensor | None
) -> tuple[dict[str, float], dict[str, float]]:
    """``(errors, allowed)`` of output and gradients, in the inputs' dtype, by the rule above.

    ``d_out=None``: of the output alone.
    """
    dtype = inputs[0].dtype
    results = []
    for function, kind in ((reference, torch.float64), (op, dtype), (reference, dtype)):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves)
        gradients = () if d_out is None else torch.autograd.grad(out, leaves, d_out.to(kind))
        results.append([out.detach(), *gradients])
    errors, allowed = {}, {}
    names = ("output", *(f"gradient {i}" for i in range(len(inputs))))
    for name, exact, got, plain in zip(names, *results, strict=d_out is not None):
        largest = float(exact.abs().max())
        errors[name] = float((got.double() - exact).abs().max())
        if dtype == torch.float32:
            allowed[name] = 1e-5 * largest
        else:
            plain_error = float((plain.double() - exact).abs().max())
            allowed[name] = 2 * plain_error + torch.finfo(dtype).eps / 2 * largest
    return errors, allowed


def check(operation: str, device: str, dtype: torch.dtype) -> Check:
    """Check one of :data:`OPERATIONS`."""
    op, reference, inputs, d_out = OPERATIONS[operation](device, dtype)
    errors, allowed = compare(op, reference, inputs, d_out)
    path = "triton" if use_triton(inputs[0]) else "pytorch"
    return Check(operation, path, dtype, errors, allowed)


def _attention(window: int | None) -> Callable:
    def build(device: str, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, n, TOKENS, 40) for n in (2, 1, 1, 2))
        q, k, v, d_out = (_normal(generator, s, device, dtype) for s in shapes)
        ids = torch.randint(-1, 3, (1, TOKENS), generator=generator).sort(1).values.to(device)

        def op(q, k, v):
            if window is None:
                return global_attention(q, k, v, ids)
            return window_attention(q, k, v, window, ids)

        def reference(q, k, v):
            return attention_reference.attention(q, k, v, window, ids)

        return op, reference, (q, k, v), d_out

    return build


def _grouped(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((ENDS[-1], 72), (len(ENDS), 88, 72), (ENDS[-1], 88))
    x, w, d_out = (_normal(generator, s, device, dtype) for s in shapes)
    ends = torch.tensor(ENDS, dtype=torch.int32, device=device)

    def op(x, w):
        return grouped_gemm(x, w, ends)

    def reference(x, w):
        return grouped_reference.grouped_gemm(x, w, ends)

    return op, reference, (x, w), d_out


def _experts(device: str, dtype: torch.dtype):
    """From tokens to tokens, two of five experts each; the first and third get nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, 72), (TOKENS, 2), (5, 2 * 88, 72), (5, 72, 88), (TOKENS, 72))
    *inputs, d_out = (_normal(generator, s, device, dtype) for s in shapes)
    keys = _normal(generator, (TOKENS, 5), device, torch.float32)
    keys[:, [0, 2]] = -torch.inf
    places = route(keys, keys, 2, True, 1.0)

    def op(x, gates, w_up, w_down):
        routing = places._replace(gates_NK=gates)
        return expert_down(expert_up(x, w_up, routing), w_down, routing)

    def reference(x, gates, w_up, w_down):
        routing, product = places._replace(gates_NK=gates), grouped_reference.grouped_gemm
        h = experts_reference.expert_up(x, w_up, routing, product)
        return experts_reference.expert_down(h, w_down, routing, product)

    return op, reference, inputs, d_out


def _fp8(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((ENDS[-1], 172), (len(ENDS), 88, 172), (ENDS[-1], 88))
    inputs = [_normal(generator, s, device, dtype) for s in shapes]
    ends = torch.tensor(ENDS, dtype=torch.int32, device=device)

    def products(module):
        def three(x, w, dy):
            """y, dx and dw in one row."""
            blocks = Scaled(*module.quantize_blocks(w))
            parts = (
                module.scaled_gemm(module.quantize_rows(x), blocks, ends, x.dtype),
                module.scaled_gemm(module.quantize_rows(dy), fp8.transposed(blocks), ends, x.dtype),
                module.scaled_weight_gemm(
                    module.quantize_tokens(dy, ends), module.quantize_tokens(x, ends), ends, x.dtype
                ),
            )
            return torch.cat([part.flatten() for part in parts])

        return three

    return products(fp8), products(fp8_reference), inputs, None


def _decode(device: str, dtype: torch.dtype):
    """Two rows, one with padding inside its window, on a ring that wrapped."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 40), *[(2, 2, WINDOW + 8, 40)] * 2)
    inputs = [_normal(generator, s, device, dtype) for s in shapes]
    position = torch.tensor([[40], [TOKENS]], device=device) + torch.arange(3, device=device)
    where = position, torch.tensor([20, 0], device=device)

    @torch.no_grad()
    def op(q, k, v):
        return decode_attention(q, k, v, *where, WINDOW)

    def reference(q, k, v):
        mask = decode_reference.visible_slots(*where, k.shape[2], WINDOW)
        return decode_reference.decode_attention(q, k, v, mask)

    return op, reference, inputs, None


def _cross_entropy(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    h, w = (_normal(generator, (n, 40), device, dtype) for n in (TOKENS, 131))
    targets = torch.randint(0, 131, (TOKENS,), generator=generator).to(device)

    def op(h, w):
        return linear_cross_entropy(h, w, targets)

    def reference(h, w):
        return cross_entropy_reference.linear_cross_entropy(h, w, targets)

    return op, reference, (h, w), torch.tensor(0.75, device=device)


def _norm(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, 3, 40), (40,), (TOKENS, 3, 40))
    x, w, d_out = (_normal(generator, s, device, dtype) for s in shapes)

    def apply(norm):
        return lambda x, w: norm(x.transpose(0, 1), w, 1e-5).transpose(0, 1)

    return apply(rms_norm), apply(norm_reference.rms_norm), (x, w), d_out


def _glu(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up, d_out = (_normal(generator, (TOKENS, n), device, dtype) for n in (202, 101))

    def apply(glu):
        return lambda gate_up: glu(*gate_up.chunk(2, dim=-1))

    return apply(swiglu), apply(glu_reference.swiglu), (gate_up,), d_out


def _routing(device: str, dtype: torch.dtype):
    """Gates as a matrix of tokens and experts, put there by way of the sorted places."""
    generator = torch.Generator().manual_seed(0)
    scores = _normal(generator, (TOKENS, 100), device, dtype).sigmoid()
    keys = _normal(generator, scores.shape, device, torch.float32)
    d_out = _normal(generator, scores.shape, device, dtype)

    def apply(route):
        def gates(scores):
            _, gates_NK, order_P, inverse_P, offsets_E = route(scores, keys, 5, True, 2.5)
            token_P = order_P[inverse_P] // 5
            expert_P = torch.searchsorted(offsets_E, inverse_P.int(), right=True)
            return torch.zeros_like(scores).index_put((token_P, expert_P), gates_NK.flatten())

        return gates

    return apply(route), apply(routing_reference.route), (scores,), d_out


def _normal(generator: torch.Generator, shape, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


OPERATIONS = {
    "window attention": _attention(WINDOW),
    "global attention": _attention(None),
    "grouped GEMM": _grouped,
    "experts": _experts,
    "FP8 GEMM": _fp8,
    "decode attention": _decode,
    "linear cross-entropy": _cross_entropy,
    "RMSNorm": _norm,
    "SwiGLU": _glu,
    "routing": _routing,
}


def main() -> int:
    """Check every operation in the dtypes this device computes in; 1 if one is wrong."""
    on_gpu = torch.cuda.is_available()
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    checks = [
        check(operation, "cuda" if on_gpu else "cpu", dtype)
        for operation in OPERATIONS
        for dtype in dtypes
        if not (on_gpu and operation == "FP8 GEMM" and dtype == torch.float32)
    ]
    print(*checks, sep="\n")
    return 0 if all(c.holds for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
