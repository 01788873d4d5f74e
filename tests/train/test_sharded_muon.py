"""Muon under FSDP2: gloo ranks do what one process does, and each only its share."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from kexa.config import ROOT
from kexa.train.dealing import deal, row_group
from tests.train import muon_ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process_and_share_the_work(tmp_path, ranks):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.muon_ranks", str(r), str(ranks), str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    results = [torch.load(tmp_path / f"{r}.pt") for r in range(ranks)]
    for nesterov in (True, False):
        model = muon_ranks.Toy()
        optimizer, elements = muon_ranks.trained(model, nesterov)
        for name, p in model.named_parameters():
            expected = {"p": p.detach(), "m": optimizer.state[p]["momentum"]}
            for result in results:
                for part, value in expected.items():
                    torch.testing.assert_close(
                        result[nesterov]["state"][f"{part}.{name}"], value, rtol=0, atol=1e-6
                    )
        shares = [result[nesterov]["elements"] for result in results]
        assert sum(shares) == elements  # no matrix is orthogonalised twice
        assert max(shares) < 0.75 * elements


def test_dealing_by_hand():
    assert deal([5, 3, 3, 2], 2) == [0, 1, 1, 0]
    assert deal([1, 1, 1], 3) == [0, 1, 2]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 5))
def test_no_rank_has_more_than_a_fair_share_and_one_matrix(costs, ranks):
    load = [0] * ranks
    for cost, owner in zip(costs, deal(costs, ranks), strict=True):
        load[owner] += cost
    assert max(load) <= sum(costs) / ranks + max(costs)


def test_a_sharding_that_cuts_columns_is_refused(one_rank):
    from torch.distributed.tensor import distribute_tensor

    with pytest.raises(ValueError, match=r"shape \(4, 6\).*dimension 0"):
        row_group(distribute_tensor(torch.zeros(4, 6), one_rank, [Shard(1)]))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 6\).*dimension 0"):
        row_group(distribute_tensor(torch.zeros(2, 4, 6), one_rank, [Shard(1)]))
    assert row_group(distribute_tensor(torch.zeros(2, 4, 6), one_rank, [Shard(0)])) is None
    cut_by_rows = distribute_tensor(torch.zeros(4, 6), one_rank, [Shard(0)])
    assert row_group(cut_by_rows) is one_rank.get_group()


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
