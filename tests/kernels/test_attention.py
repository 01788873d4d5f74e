"""The attention definitions and the PyTorch path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexa.kernels import global_attention, window_attention
from kexa.kernels.attention import reference
from tests.kernels import kernel_checks as checks


@pytest.mark.parametrize("case", [c for c in checks.ATTENTION_CASES if "past a tile" not in c])
def test_reference_equals_the_loops(case):
    q, k, v, window, ids, _ = checks.attention_inputs(case, torch.float64)
    expected = checks.attention_by_loops(q, k, v, window, ids)
    torch.testing.assert_close(
        reference.attention(q, k, v, window, ids).detach(), expected, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", checks.ATTENTION_CASES)
def test_pytorch_path_equals_the_reference(case, dtype, tolerance):
    checks.check_attention(window_attention, reference.attention, case, dtype, tolerance)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 90),
    window=st.integers(1, 100),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    documents=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_window_and_global_on_any_shape(tokens, window, groups, share, documents, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": generator}
    q = torch.randn(2, groups * share, tokens, 6, **draw)
    k, v = torch.randn(2, 2, groups, tokens, 6, **draw)
    ids = torch.randint(-1, documents, (2, tokens), generator=generator) if documents else None
    for out, expected in (
        (window_attention(q, k, v, window, ids), reference.attention(q, k, v, window, ids)),
        (global_attention(q, k, v, ids), reference.attention(q, k, v, None, ids)),
    ):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_global_attention_past_a_query_chunk():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 600, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (2, 1, 1)
    )
    ids = torch.tensor([0] * 100 + [1] * 300 + [-1] * 200)[None]
    out, expected = global_attention(q, k, v, ids), reference.attention(q, k, v, None, ids)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip((out, *got), (expected, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_reach_exactly_the_window_and_the_document():
    T, window, query = 50, 8, 40
    k = torch.randn(1, 1, T, 4, requires_grad=True)
    ids = (torch.arange(T) >= 36).long()[None]
    for document_ids, first in ((None, query - window + 1), (ids, 36)):
        out = window_attention(torch.randn(1, 1, T, 4), k, k, window, document_ids)
        (gradient,) = torch.autograd.grad(out[0, 0, query].sum(), k)
        reached = gradient[0, 0].abs().sum(-1).nonzero().flatten().tolist()
        assert reached == list(range(first, query + 1))


def test_errors_say_what_to_do():
    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="window=0"):
        window_attention(q, k, k, 0)
    with pytest.raises(ValueError, match="H a multiple of G"):
        global_attention(q, k[:, :, :4], k[:, :, :4])
    with pytest.raises(ValueError, match="H a multiple of G"):
        global_attention(q[:, :3], k, k)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        global_attention(q, k.half(), k.half())
    with pytest.raises(ValueError, match="document_ids"):
        global_attention(q, k, k, torch.zeros(1, 4))
