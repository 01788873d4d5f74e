"""A run begun on four ranks goes on with two and ends on one as if nothing had happened."""

import pytest
import torch

from kexa.train.checkpoint import CheckpointError
from tests.dist import small_run
from tests.dist.forked import run
from tests.dist.test_ranks import assert_same_run


def test_four_ranks_save_two_resume_one_ends(tmp_path):
    run(small_run.part, 4, 2, 2, 4, tmp_path)  # saved after 3 steps, walked away after 4
    run(small_run.part, 2, 1, 2, 7, tmp_path)
    assert_same_run([small_run.part(1, 1, small_run.STEPS, tmp_path)], small_run.run())


def test_one_rank_saves_and_two_resume(tmp_path):
    records, state = small_run.part(1, 1, 3, tmp_path)
    (again, other), _ = run(small_run.part, 2, 2, 1, 3, tmp_path)
    assert again == records
    for name, tensor in state.items():
        assert torch.equal(other[name], tensor), name


def test_ranks_refuse_the_checkpoint_of_another_run(tmp_path):
    run(small_run.part, 2, 1, 2, 4, tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        small_run.run(directory=tmp_path, take=1, identity="other")
