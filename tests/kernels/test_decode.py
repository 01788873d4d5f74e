"""Decode attention's definition, which is also the path CPUs take."""

from __future__ import annotations

import pytest
import torch

from kexa.kernels import decode_attention
from kexa.kernels.decode.reference import visible_slots
from tests.kernels import decode_checks as checks


def without_nan(q, k, v, *rest):
    """PyTorch's product reads every slot, and 0 * NaN is NaN."""
    return decode_attention(q, k.nan_to_num(), v.nan_to_num(), *rest)


@pytest.mark.parametrize("case", checks.CASES)
def test_reference_equals_the_loops(case):
    checks.check(without_nan, case, torch.float64, 1e-10)


def test_what_a_ring_slot_holds_by_hand():
    """Five slots, window 3, queries at 6 and 7: slots hold 5, 6, 7, 3, 4; padding up to 4."""
    position, start = torch.tensor([[6, 7]]), torch.tensor([5])
    seen = visible_slots(position, start, 5, window=3)
    assert seen[0, 0].tolist() == [
        [True, True, False, False, False],
        [True, True, True, False, False],
    ]
    seen = visible_slots(position, torch.tensor([0]), 5, window=3)
    assert seen[0, 0].tolist() == [
        [True, True, False, False, True],
        [True, True, True, False, False],
    ]


def test_a_mask_at_hand_and_a_gradient_change_nothing():
    q, k, v, position, start, window = checks.inputs("ring over two tiles", torch.float32)
    k, v = k.nan_to_num(), v.nan_to_num()
    plain = decode_attention(q, k, v, position, start, window)
    mask = visible_slots(position, start, k.shape[2], window)
    assert torch.equal(decode_attention(q, k, v, position, start, window, mask), plain)
    q.requires_grad_()
    out = decode_attention(q, k, v, position, start, window)
    torch.testing.assert_close(out, plain)
    assert out.sum().backward() is None and q.grad.isfinite().all()


def test_errors_say_what_to_do():
    q, k = torch.zeros(2, 3, 1, 8), torch.zeros(2, 2, 9, 8)
    with pytest.raises(ValueError, match="H a multiple of G"):
        decode_attention(q, k, k, torch.zeros(2, 1), torch.zeros(2), 8)
    with pytest.raises(ValueError, match=r"v \(2, 1, 9, 8\)"):
        decode_attention(q, k, k[:, :1], torch.zeros(2, 1), torch.zeros(2), 8)
