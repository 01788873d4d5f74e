"""A decoding step in few operations is the layer's own forward pass, and runs only where it may."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from benchmarks.parity.configs import all_in_fp64
from kexa.model import generate, step
from kexa.train.fp8 import set_numerics

CHANGES = [
    {},
    {"use_qk_norm": False, "rope_layers": "all"},
    {"n_group": 3, "topk_group": 2, "num_shared_experts": 2, "norm_topk_prob": False},
]


def steps_taken():
    """Count the calls of :class:`kexa.model.step.LayerStep`."""
    return patch.object(step.LayerStep, "__call__", autospec=True, side_effect=CALL)


CALL = step.LayerStep.__call__


@torch.no_grad()
def decoded(model, x, sizes, back):
    """Hidden states and MTP states of calls of these sizes, from a ragged prompt of 7 columns."""
    documents = -(torch.arange(7) < torch.tensor([0, 3, 6])[:, None]).long()
    cache, mtp_cache = model.new_cache(3, chunk=3), model.new_mtp_cache(3, chunk=3)
    found = [model.hidden_states(x[:, :7], documents, cache)]
    model.mtp_hidden_states(x[:, 1:8], found[0], documents, mtp_cache)
    start = 7
    for i, size in enumerate(sizes):
        columns = slice(start, start + size)
        found.append(model.hidden_states(x[:, columns], cache=cache))
        found.append(model.mtp_hidden_states(x[:, columns], found[-1], cache=mtp_cache))
        if back and i % 3 == 2:  # rows part, then are of one length again
            for ragged in ([1, 0, 1], [0, 1, 0]):
                cache.roll_back(torch.tensor(ragged))
                mtp_cache.roll_back(torch.tensor(ragged))
                found.append(model.hidden_states(x[:, :1], cache=cache))
                found.append(model.mtp_hidden_states(x[:, :1], found[-1], cache=mtp_cache))
        start += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(("sizes", "back"), [([1] * 24, False), ([1, 2, 3] * 4, True)])
def test_a_step_is_the_forward_pass_over_window_wraps(build, ids, changes, sizes, back):
    with all_in_fp64():
        model, x = build(torch.float64, **changes), ids(3, 60)
        with steps_taken() as taken:
            found = decoded(model, x, sizes, back)
        assert taken.call_count >= 5 * len(sizes)  # four layers and the MTP block
        with patch.object(step, "applies", return_value=False), steps_taken() as taken:
            expected = decoded(model, x, sizes, back)
        assert taken.call_count == 0
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_fp32_agrees_within_its_rounding(build, ids):
    model, x = build(), ids(3, 60)
    found = decoded(model, x, [1, 2] * 6, True)
    with patch.object(step, "applies", return_value=False):
        expected = decoded(model, x, [1, 2] * 6, True)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_bf16_is_as_close_to_fp32_as_the_layer_is(build, ids):
    """On average: rounding to bf16 changes which experts are chosen now and then."""
    model, x = build(torch.bfloat16), ids(3, 60)
    found = decoded(model, x, [1, 2] * 6, True)
    with patch.object(step, "applies", return_value=False):
        ordinary = decoded(model, x, [1, 2] * 6, True)
        exact = decoded(model.float(), x, [1, 2] * 6, True)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() < 1.2 * (ordinary - exact).abs().mean()


def test_one_row_takes_its_experts_one_by_one(build, ids):
    with all_in_fp64(), torch.no_grad():
        model, x = build(torch.float64), ids(1, 30)
        cache = model.new_cache(1, chunk=1)
        found = [model(part, cache=cache) for part in x.split([9] + [1] * 21, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), model(x), atol=1e-10, rtol=0)


def test_a_policy_and_a_wanted_gradient_take_the_layer_itself(build, ids):
    model, x = build(), ids(2, 9)
    with steps_taken() as taken:
        cache = model.new_cache(2)
        model(x, cache=cache)
        assert model(x[:, :1], cache=cache).requires_grad
        assert taken.call_count == 0
        with torch.no_grad():
            model(x[:, :1], cache=cache)
        assert taken.call_count == 4
        set_numerics(model, "bf16")
        generate(model, x, 4, temperature=0)
        assert taken.call_count == 4


def test_weights_that_change_between_generations_count(build, ids):
    """Joined copies belong to a cache, so a later generation makes its own."""
    model, x = build(), ids(2, 9)
    generate(model, x, 6, temperature=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(torch.randn_like(parameter) * 0.2)
        known = x
        for _ in range(6):
            known = torch.cat((known, model(known)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, x, 6, temperature=0), known)
