"""What a kernel must satisfy, as functions that the tests and the planted faults share.

Each check takes the operation under test and raises ``AssertionError`` with the case and the error.
Inputs have unit scale (small inputs hide faults under any absolute tolerance), lie between fences
of NaN (a read outside shows), and outputs start as NaN (an unwritten number shows).

The definitions the checks trust, ``attention_by_loops``, ``grouped_gemm_by_loops`` and
``linear_cross_entropy_by_loops``, are written out number by number and share no code with the
package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

FENCE = 256  # numbers of NaN before and behind every input

# name: B, T, H, G, K, window, documents
ATTENTION_CASES = {
    "one token": (1, 1, 2, 1, 16, 4, False),
    "ragged documents, odd head size": (2, 63, 4, 2, 12, 7, True),
    "window 1": (1, 40, 2, 2, 16, 1, False),
    "window over two tiles": (1, 100, 2, 1, 16, 70, True),
    "one token past a tile": (1, 257, 2, 1, 16, 33, True),
    "global": (1, 100, 3, 1, 16, 100, False),
    "global, packed": (1, 130, 2, 1, 16, 130, True),
    "global, rows cut elsewhere": (2, 130, 2, 1, 16, 130, "elsewhere"),
    "global, documents that come back": (2, 100, 2, 1, 16, 100, "again"),
}

# name: rows, D, F, ends
GROUPED_CASES = {
    "one row": (1, 16, 16, (0, 1)),
    "empty first, middle and last": (63, 20, 33, (0, 40, 40, 63, 63)),
    "all rows in one expert": (100, 70, 65, (0, 0, 100, 100)),
    "ragged over tiles": (257, 37, 100, (1, 66, 129, 200, 257)),
    "one row each": (4, 16, 16, (1, 2, 3, 4)),
    "no rows": (0, 16, 16, (0, 0, 0)),
}

# name: rows, D, V, scale of the hidden states
CROSS_ENTROPY_CASES = {
    "one row, few words": (1, 16, 5, 1.0),
    "ragged everywhere": (63, 35, 100, 1.0),
    "one row and word past a tile, large logits": (65, 20, 257, 20.0),
    "many rows": (257, 33, 63, 1.0),
    "no rows": (0, 16, 33, 1.0),
}
WEIGHT = 0.7  # what the loss is multiplied by before its gradients are taken
Z_LOSS = 1e-2  # a hundred times what is usual, so that a wrong factor shows


def poison_outputs() -> None:
    """From here on every uninitialised floating tensor of this process is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).new_empty(3).isnan().all()


def fenced(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A differentiable tensor of unit scale between two fences of NaN."""
    count = math.prod(shape)
    buffer = torch.full((count + 2 * FENCE,), float("nan"), dtype=dtype)
    values = torch.randn(count, dtype=torch.float64, generator=generator)
    buffer[FENCE : FENCE + count] = values.to(dtype)
    return buffer[FENCE : FENCE + count].view(shape).requires_grad_()


def attention_inputs(case: str, dtype: torch.dtype):
    """``(q, k, v, window, document_ids, dO)`` of one case; q, k, v are head-transposed views."""
    B, T, H, G, K, window, documents = ATTENTION_CASES[case]
    generator = torch.Generator().manual_seed(T)
    q, k, v = (fenced(generator, B, T, n, K, dtype=dtype).transpose(1, 2) for n in (H, G, G))
    ids = None
    if documents == "again":  # runs of nine tokens, each of any document
        ids = torch.randint(-1, 4, (B, T), generator=generator)[:, torch.arange(T) // 9]
    elif documents == "elsewhere":
        ids = (torch.arange(T) >= torch.tensor([[T // 2 + 5], [10]])).long()
    elif documents:
        ids = torch.randint(-1, 4, (B, T), generator=generator).sort(1).values
    d_out = torch.randn(B, H, T, K, dtype=torch.float64, generator=generator).to(dtype)
    return q, k, v, window, ids, d_out


def grouped_inputs(case: str, dtype: torch.dtype):
    """``(x, w, offsets, dy)`` of one case."""
    rows, D, F, ends = GROUPED_CASES[case]
    generator = torch.Generator().manual_seed(rows)
    x = fenced(generator, rows, D, dtype=dtype)
    w = fenced(generator, len(ends), F, D, dtype=dtype)
    dy = torch.randn(rows, F, dtype=torch.float64, generator=generator).to(dtype)
    return x, w, torch.tensor(ends, dtype=torch.int32), dy


def cross_entropy_inputs(case: str, dtype: torch.dtype):
    """``(h, w, targets)`` of one case; the targets hold the first and the last word."""
    rows, D, V, scale = CROSS_ENTROPY_CASES[case]
    generator = torch.Generator().manual_seed(rows)
    h = fenced(generator, rows, D, dtype=dtype)
    with torch.no_grad():
        h.mul_(scale)
    w = fenced(generator, V, D, dtype=dtype)
    targets = torch.randint(0, V, (rows,), generator=generator)
    targets[:1], targets[1:2] = V - 1, 0
    return h, w, targets


def attention_by_loops(q, k, v, window: int, document_ids) -> torch.Tensor:
    """The definition in fp64, one query at a time."""
    q, k, v = q.detach().double(), k.detach().double(), v.detach().double()
    B, H, T, K = q.shape
    share = H // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [
                    s
                    for s in range(T)
                    if t - window < s <= t
                    and (document_ids is None or document_ids[b, s] == document_ids[b, t])
                ]
                scores = [float(q[b, h, t] @ k[b, h // share, s]) / math.sqrt(K) for s in seen]
                weights = [math.exp(x - max(scores)) for x in scores]
                for s, weight in zip(seen, weights, strict=True):
                    out[b, h, t] += weight / sum(weights) * v[b, h // share, s]
    return out


def grouped_gemm_by_loops(x, w, offsets) -> torch.Tensor:
    """The definition in fp64, one number at a time."""
    x, w = x.detach().double(), w.detach().double()
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for n in range(x.shape[0]):
        expert = next(e for e, end in enumerate(offsets.tolist()) if n < end)
        for f in range(w.shape[1]):
            y[n, f] = sum(float(a) * float(b) for a, b in zip(x[n], w[expert, f], strict=True))
    return y


def linear_cross_entropy_by_loops(h, w, targets) -> torch.Tensor:
    """The definition in fp64, one number at a time."""
    h, w = h.detach().double().tolist(), w.detach().double().tolist()
    nats = 0.0
    for row, target in zip(h, targets.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(row, word, strict=True)) for word in w]
        largest = max(logits)
        nats += largest + math.log(sum(math.exp(z - largest) for z in logits)) - logits[target]
    return torch.tensor(nats, dtype=torch.float64)


def assert_close(named: dict[str, tuple[torch.Tensor, torch.Tensor]], tolerance: float, case: str):
    """Every pair agrees to ``tolerance`` times the largest expected number (at least 1)."""
    for name, (got, expected) in named.items():
        if expected.numel() == 0:
            assert got.shape == expected.shape, f"{case}: {name} is {tuple(got.shape)}"
            continue
        got, expected = got.detach().double(), expected.detach().double()
        error = float((got - expected).abs().nan_to_num(nan=math.inf).max())
        bound = tolerance * max(1.0, float(expected.abs().max()))
        assert error <= bound, f"{case}: {name} is off by {error:.1e}, allowed {bound:.1e}"


def check_attention(
    op: Callable, reference: Callable, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Output and all three gradients of ``op(q, k, v, window, ids)`` against an fp64 reference."""
    q, k, v, window, ids, d_out = attention_inputs(case, dtype)
    out = op(q, k, v, window, ids)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*wide, window, ids)
    wanted = torch.autograd.grad(expected, wide, d_out.double())
    got, want = (out, *gradients), (expected, *wanted)
    names = ("output", "dq", "dk", "dv")
    assert_close(dict(zip(names, zip(got, want, strict=True), strict=True)), tolerance, case)


def check_grouped_gemm(
    op: Callable, reference: Callable, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Output and both gradients of ``op(x, w, offsets)`` against an fp64 reference."""
    x, w, offsets, dy = grouped_inputs(case, dtype)
    out = op(x, w, offsets)
    gradients = torch.autograd.grad(out, (x, w), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = reference(*wide, offsets)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    got, want = (out, *gradients), (expected, *wanted)
    names = ("output", "dx", "dw")
    assert_close(dict(zip(names, zip(got, want, strict=True), strict=True)), tolerance, case)


def check_cross_entropy(
    op: Callable, reference: Callable, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Loss and both gradients of ``op(h, w, targets, z_loss)`` against an fp64 reference."""
    h, w, targets = cross_entropy_inputs(case, dtype)
    wide = [t.detach().double().requires_grad_() for t in (h, w)]
    for z_loss in (0.0, Z_LOSS):
        out = op(h, w, targets, z_loss)
        gradients = torch.autograd.grad(WEIGHT * out, (h, w))
        expected = reference(*wide, targets, z_loss)
        wanted = torch.autograd.grad(WEIGHT * expected, wide)
        got, want = (out, *gradients), (expected, *wanted)
        pairs = dict(zip(("output", "dh", "dw"), zip(got, want, strict=True), strict=True))
        assert_close(pairs, tolerance, f"{case}, z_loss {z_loss}")
