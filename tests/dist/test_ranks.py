"""Two and four gloo ranks against one process, in fp32."""

import functools

import pytest
import torch

from kexa.train.pretrain import new_model
from tests.dist import small_run
from tests.dist.forked import run
from tests.train.conftest import CONFIG


@functools.cache
def alone(**options):
    return small_run.run(**options)


def assert_same_run(ranks, one):
    records, state = one
    for others, _ in ranks:
        assert len(others) == len(records)
        for a, b in zip(others, records, strict=True):
            assert a.losses == pytest.approx(b.losses, rel=1e-5)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
            assert a.expert_load == b.expert_load
            assert (a.step, a.tokens, a.skipped, a.learning_rate) == (
                b.step, b.tokens, b.skipped, b.learning_rate,
            )  # fmt: skip
    for _, other in ranks:
        assert other.keys() == state.keys()
        for name, tensor in state.items():
            if name.endswith("e_score_correction_bias"):
                assert torch.equal(other[name], tensor), name
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("fsdp, ep", [(2, 1), (1, 2), (2, 2)])
def test_a_mesh_trains_as_one_process(fsdp, ep):
    assert_same_run(run(small_run.run, fsdp * ep, fsdp, ep), alone())


def test_accumulation_and_recompute_on_a_mesh():
    ranks = run(functools.partial(small_run.run, take=4, recompute=True, accumulate=2), 2, 1, 2)
    assert_same_run(ranks, alone(take=4, accumulate=2))


@pytest.mark.parametrize("fsdp, ep", [(2, 1), (1, 2)])
def test_ranks_evaluate_as_one_process_and_train_on_as_without(fsdp, ep):
    one, _ = small_run.evaluated(1, 1)
    ranks = run(small_run.evaluated, 2, fsdp, ep)
    assert_same_run(ranks, alone())
    for records, _ in ranks:
        assert [r.step + 1 for r in records if r.evaluation] == [4, small_run.STEPS]
        for a, b in zip(records, one, strict=True):
            assert a.evaluation == pytest.approx(b.evaluation, rel=1e-5)


def test_a_rank_whose_experts_get_no_token():
    """The bias sends every token to the experts of the first rank."""
    assert_same_run(run(small_run.starved, 2, 1, 2, "fp32"), small_run.starved(1, 1, "fp32"))


def test_eight_bit_products_on_ranks():
    """Tiles of a weight's gradient hold other tokens on a rank, so only the first step agrees."""
    one, _ = small_run.starved(1, 1, "fp8")
    for records, _ in run(small_run.starved, 2, 1, 2, "fp8"):
        assert records[0].losses == pytest.approx(one[0].losses, rel=1e-5)
        assert records[1].losses == pytest.approx(one[1].losses, rel=1e-2)


def test_a_model_that_is_never_whole_starts_as_one_that_is():
    expected = new_model(CONFIG, 3).state_dict()
    for state in run(small_run.initial, 4, 2, 2):
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
