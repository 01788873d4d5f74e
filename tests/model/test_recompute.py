"""Recompute: same bits, a token counted once, less memory between forward and backward."""

import torch

from kexa.model import set_recompute
from tests.train.conftest import tiny_model


def backward(recompute):
    model = tiny_model().train()
    set_recompute(model, recompute)
    ids = torch.randint(2, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(ids, balance_weight=0.1)
    loss.total.backward()
    return model, loss, kept


def test_recompute_changes_no_bit_and_counts_no_token_twice():
    (plain, loss, kept), (model, again, kept_less) = backward(False), backward(True)
    assert [float(x.detach()) for x in loss] == [float(x.detach()) for x in again]
    assert torch.equal(plain.expert_load(), model.expert_load())
    assert model.expert_load().sum() == 3 * 3 * 12 * 2  # layers, rows, tokens, experts per token
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert kept_less < kept / 2


def test_layers_count_again_after_a_recomputed_pass():
    model, _, _ = backward(True)
    before = model.expert_load()
    model.loss(torch.full((1, 4), 5))
    assert model.expert_load().sum() == before.sum() + 3 * 4 * 2
