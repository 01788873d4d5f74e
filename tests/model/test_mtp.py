"""The MTP block against a reference that shares no code with it: see ``mtp_reference.py``."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from benchmarks.parity.__main__ import errors, failed
from benchmarks.parity.cases import mtp_loss_meets_reference
from benchmarks.parity.configs import random_config
from kexa.model.mtp import MTPBlock

SEEDS = [seed for seed in range(16) if random_config(seed).num_nextn_predict_layers]


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_documents_their_loss_and_a_cache_meet_the_reference(seed):
    found = errors("mtp", seed)
    assert len(found) == 3
    assert {case: error for case, error in found.items() if failed("mtp", error)} == {}


def hidden_state_first(self, embedding_BTD, hidden_BTD, context, cache=None):
    pair = (self.pre_fc_norm_hidden(hidden_BTD), self.pre_fc_norm_embedding(embedding_BTD))
    return self.norm(self.layers[0](self.fc(torch.cat(pair, dim=-1)), context, cache))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_fault_is_found(seed):
    with patch.object(MTPBlock, "forward", hidden_state_first):
        assert all(failed("mtp", error) for error in errors("mtp", seed).values())


@torch.no_grad()
def test_the_loss_meets_the_reference_with_statistics_in_fp32(build, ids):
    """As the model is used: norms round to fp32, which bounds the agreement."""
    model, x = build(torch.float64), ids(1, 21)[0]
    assert mtp_loss_meets_reference(model, x, [9, 1, 4, 7]) < 1e-6
