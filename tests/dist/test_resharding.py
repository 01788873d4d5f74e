"""A run begun on four ranks goes on with two and ends on one as if nothing had happened."""

import dataclasses

import numpy as np
import pytest
import torch

from kexa.config import load
from kexa.train.checkpoint import CheckpointError
from kexa.train.pretrain import Pretraining
from tests.dist import small_run
from tests.dist.forked import run
from tests.dist.test_ranks import assert_same_run
from tests.train.conftest import CONFIG


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


def test_a_sharded_pretraining_goes_on_without_drawing_its_parameters(tmp_path):
    tokens = tmp_path / "tokens" / "en"
    tokens.mkdir(parents=True)
    np.random.default_rng(0).integers(2, 64, 4000, dtype=np.int32).tofile(tokens / "tokens.bin")
    np.save(tokens / "offsets.npy", np.arange(0, 4001, 40, dtype=np.int64))
    stages = {"foundation": 4, "domain": 2, "reasoning": 2}
    config = dataclasses.replace(
        load("smoke").pretrain, numerics="fp32", sequence_length=12, batch_size=8,
        stage_steps=stages, mixtures={stage: {"en": 1.0} for stage in stages},
        synthetic_documents={}, checkpoint_every=3,
    )  # fmt: skip
    whole = Pretraining("fp32", CONFIG, config, 0, tmp_path / "tokens", ("en",), tmp_path / "whole")
    killed = dataclasses.replace(whole, checkpoints=tmp_path / "killed")
    (records, state, drawn), _ = run(small_run.curriculum, 2, whole, 2, 1, 8)
    assert len(records) == 8 and drawn > 0
    run(small_run.curriculum, 2, killed, 2, 1, 5)
    (again, other, drawn), _ = run(small_run.curriculum, 2, killed, 2, 1, 8)
    assert again == records and drawn == 0
    for name, tensor in state.items():
        assert torch.equal(other[name], tensor), name


def test_ranks_refuse_the_checkpoint_of_another_run(tmp_path):
    run(small_run.part, 2, 1, 2, 4, tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        small_run.run(directory=tmp_path, take=1, identity="other")
