"""Checkpoints: what goes in comes out, whatever is not whole is refused, shards meet any mesh."""

import errno
import math
import os
import random
import resource
import shutil
import signal
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kexa.record import CannotWrite
from kexa.train import Interrupted, build_optimizers, checkpoint, fit
from kexa.train.checkpoint import (
    Background,
    CheckpointError,
    append_history,
    branch,
    list_checkpoints,
    load,
    read_history,
    resume,
    rng_states,
    save,
    set_rng_states,
)
from tests.train.conftest import OPTIMIZATION, batch_at, loss_fn, tiny_model


def state(seed: int = 0, size: int = 40) -> dict:
    weight, moment = torch.randn(2, size, 3, generator=torch.Generator().manual_seed(seed))
    return {
        "step": 7,
        "norms": [0.1, math.inf],
        "model": {"weight": weight, "count": torch.tensor(5)},
        "optimizers": [
            {"state": {"weight": {"moment": moment.bfloat16()}}, "betas": (0.9, 0.95)},
            {"state": {}, "nothing": None},
        ],
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def names(directory):
    return [path.name for path in list_checkpoints(directory)]


def test_what_goes_in_comes_out(tmp_path):
    assert resume(tmp_path, "run") is None
    path = save(tmp_path, 7, "run", state())
    assert_same(load(path, "run"), state())
    assert_same(resume(tmp_path, "run"), state())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_generators_go_on_where_they_were(tmp_path):
    save(tmp_path, 1, "run", {"rng": rng_states()})
    first = torch.rand(3), random.random()
    set_rng_states(resume(tmp_path, "run")["rng"])
    assert_same((torch.rand(3), random.random()), first)


def test_the_last_and_the_milestones_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, "run", {"step": step}, keep=2, milestones={3})
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]


def test_something_has_to_be_kept(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 1, "run", {}, keep=0)


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, "run", {"value": "old"})
    save(tmp_path, 1, "run", {"value": "new"})
    assert resume(tmp_path, "run") == {"value": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1 << where % 8
    path.write_bytes(data)


DAMAGE = {
    "flipped tensor": (lambda p: flip(p / "__0_0.distcp", 3000), "__0_0.distcp.*checksum"),
    "flipped table": (lambda p: flip(p / ".metadata", 50), ".metadata.*checksum"),
    "flipped values": (lambda p: flip(p / "values.pt", 500), "values.pt.*checksum"),
    "flipped manifest": (lambda p: flip(p / "manifest.json", 40), "manifest.json"),
    "blank in manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text() + " "),
        "manifest.json",
    ),
    "other bytes in manifest": (
        lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"),
        "manifest.json",
    ),
    "truncated": (
        lambda p: (p / "__0_0.distcp").write_bytes((p / "__0_0.distcp").read_bytes()[:-1]),
        "__0_0.distcp has .* bytes, not",
    ),
    "missing file": (lambda p: (p / "values.pt").unlink(), "values.pt is missing"),
    "half written": (lambda p: (p / "manifest.json").unlink(), "not a whole checkpoint"),
    "empty": (lambda p: [file.unlink() for file in p.iterdir()], "not a whole checkpoint"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("hello")), "not a whole checkpoint"),
    "renamed": (
        lambda p: (shutil.rmtree(p), shutil.copytree(p.with_name("step-00000003"), p)),
        "not what its name says.*step 3",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_and_the_previous_one_loads(tmp_path, kind):
    save(tmp_path, 3, "run", state(3))
    newest = save(tmp_path, 6, "run", state(6))
    damage, reason = DAMAGE[kind]
    damage(newest)
    with pytest.raises(CheckpointError, match=f"step-00000006.*{reason}.*step-00000003"):
        load(newest, "run")
    with pytest.warns(UserWarning, match=f"{reason}.*renamed.*resuming from step-00000003"):
        assert_same(resume(tmp_path, "run"), state(3))
    assert names(tmp_path) == ["step-00000003"]
    assert (tmp_path / "step-00000006.damaged").exists()
    assert_same(resume(tmp_path, "run"), state(3))


def test_a_run_does_not_start_over_by_itself(tmp_path):
    flip(save(tmp_path, 3, "run", state()) / "values.pt", 100)
    with pytest.raises(CheckpointError, match=r"no checkpoint.*step-00000003.*the beginning"):
        resume(tmp_path, "run")
    assert names(tmp_path) == ["step-00000003"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save(tmp_path, 3, "seed 0", state())
    for read in (lambda: load(path, "seed 1"), lambda: resume(tmp_path, "seed 1")):
        with pytest.raises(CheckpointError, match="'seed 0'.*'seed 1'"):
            read()


def test_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 3, "run", state())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CannotWrite, match=r"step-00000006.*too large.*step-00000003 is intact"):
            save(tmp_path, 6, "run", state(size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    assert_same(resume(tmp_path, "run"), state())


@pytest.fixture
def held_writes(monkeypatch):
    """An event for which every write of tensors waits."""
    go, write = threading.Event(), checkpoint._Writer.write_data

    def held(*arguments):
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint._Writer, "write_data", held)
    return go


def test_in_the_background_the_state_is_written_as_it_was(tmp_path, held_writes):
    changing = state()
    with Background(tmp_path, "run") as checkpoints:
        checkpoints.save(7, changing)
        assert names(tmp_path) == []  # training goes on before anything is on disk
        changing["model"]["weight"].zero_()
        changing["norms"].append(1.0)
        held_writes.set()
        checkpoints.wait()
        assert_same(load(tmp_path / "step-00000007", "run"), state())


def test_in_the_background_one_checkpoint_waits_for_another(tmp_path, held_writes):
    with Background(tmp_path, "run") as checkpoints:
        checkpoints.save(1, {"step": 1})
        threading.Timer(0.2, held_writes.set).start()
        checkpoints.save(2, {"step": 2})
        assert "step-00000001" in names(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_fails_in_the_background_is_told_at_the_next_checkpoint_or_the_end(tmp_path):
    save(tmp_path, 3, "run", state())
    told = r"step-00000006.*too large.*step-00000003 is intact"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with Background(tmp_path, "run") as checkpoints:
            checkpoints.save(6, state(size=100_000))
            with pytest.raises(CannotWrite, match=told):
                checkpoints.save(9, state())
        with pytest.raises(CannotWrite, match=told), Background(tmp_path, "run") as checkpoints:
            checkpoints.save(6, state(size=100_000))
        with pytest.raises(ZeroDivisionError), Background(tmp_path, "run") as checkpoints:
            checkpoints.save(6, state(size=100_000))
            _ = 1 / 0  # what went wrong first is told
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_what_a_kill_left_behind_is_removed(tmp_path):
    whole = save(tmp_path, 3, "run", state())
    shutil.copytree(whole, tmp_path / ".step-00000006.partial")
    shutil.copytree(whole, tmp_path / ".step-00000001.old")
    (tmp_path / ".history.jsonl.123.tmp").write_text("{")
    assert_same(resume(tmp_path, "run"), state())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_branch_begins_with_state_and_history_and_leaves_its_source(tmp_path):
    source, directory = tmp_path / "source", tmp_path / "branch"
    save(source, 2, "plan", state())
    append_history(source, [{"step": i} for i in range(4)])
    before = (source / "history.jsonl").read_bytes()
    branch(source, 2, "plan", directory, "branch")
    assert_same(resume(directory, "branch"), state())
    assert read_history(directory, 2) == [{"step": 0}, {"step": 1}]
    assert names(source) == ["step-00000002"]
    assert (source / "history.jsonl").read_bytes() == before
    save(directory, 3, "branch", state(1))
    branch(source, 2, "plan", directory, "branch")  # a second time: the branch goes on
    assert_same(resume(directory, "branch"), state(1))


def test_a_branch_off_another_run_or_a_damaged_checkpoint_is_refused(tmp_path):
    source, directory = tmp_path / "source", tmp_path / "branch"
    save(source, 2, "plan", state())
    append_history(source, [{"step": 0}, {"step": 1}])
    with pytest.raises(CheckpointError, match="belongs to another run"):
        branch(source, 2, "another", directory, "branch")
    with pytest.raises(CheckpointError, match="step-00000001 is not a whole checkpoint"):
        branch(source, 1, "plan", directory, "branch")
    assert not directory.exists()


def test_a_branch_whose_disk_is_full_begins_at_the_next_call(tmp_path, monkeypatch):
    source, directory = tmp_path / "source", tmp_path / "branch"
    save(source, 2, "plan", state())
    append_history(source, [{"step": 0}, {"step": 1}])
    with monkeypatch.context() as full:
        full.setattr("kexa.train.checkpoint._publish", no_space)
        with pytest.raises(CannotWrite, match="cannot write checkpoint step-00000002"):
            branch(source, 2, "plan", directory, "branch")
    assert names(directory) == []
    branch(source, 2, "plan", directory, "branch")
    assert_same(resume(directory, "branch"), state())


def no_space(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_history_with_a_broken_line_is_refused(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"st\n')
    with pytest.raises(CheckpointError, match="line 2 of history.jsonl"):
        read_history(tmp_path, 2)


def on_ranks(ranks: int, function, *arguments) -> None:
    """``function(rank, ranks, *arguments)`` in as many processes, which import torch once."""
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    mp.start_processes(function, (ranks, *arguments), nprocs=ranks, start_method="forkserver")


def sharded(rank: int, ranks: int, directory, result) -> None:
    """Saves 10 rows as shards, or reads them back as such."""
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting-{ranks}", rank=rank, world_size=ranks
    )
    mesh = init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(torch.arange(30.0).view(10, 3), mesh, [Shard(0)])
    moment = distribute_tensor(torch.arange(30.0).view(10, 3) * 2, mesh, [Shard(0)])
    whole = {
        "model": {"weight": weight, "bias": torch.arange(3.0)},
        "optimizers": [{"state": {"weight": {"moment": moment, "step": torch.tensor(4.0)}}}],
        "rng": rng_states(),
    }
    like = {name: torch.zeros_like(t) for name, t in whole["model"].items()}
    found = resume(directory, "run", like)
    if found is None:
        with Background(directory, "run") as checkpoints:
            checkpoints.save(2, whole)
            weight.to_local().zero_()
            dist.barrier()  # ranks talk while the thread does
    else:
        found_weight = found["model"]["weight"]
        found_moment = found["optimizers"][0]["state"]["weight"]["moment"]
        for tensor in (found_weight, found_moment):
            assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)
        assert torch.equal(found_weight.full_tensor(), weight.full_tensor())
        assert len(found["rng"]) == 2
        result.put(found_moment.full_tensor().tolist())
    dist.destroy_process_group()


def test_two_ranks_save_and_one_or_three_load(tmp_path):
    result = mp.get_context("forkserver").SimpleQueue()
    on_ranks(2, sharded, tmp_path, result)
    assert len(list((tmp_path / "step-00000002").glob("*.distcp"))) == 2
    alone = resume(tmp_path, "run")
    expected = torch.arange(30.0).view(10, 3)
    assert torch.equal(alone["model"]["weight"], expected)
    assert torch.equal(alone["optimizers"][0]["state"]["weight"]["moment"], expected * 2)
    assert alone["optimizers"][0]["state"]["weight"]["step"] == 4
    on_ranks(3, sharded, tmp_path, result)
    for _ in range(3):
        assert result.get() == (expected * 2).tolist()


def full_disk_on_one_rank(rank: int, ranks: int, directory) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=ranks
    )
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    mesh = init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(torch.zeros(1000, 1000), mesh, [Shard(0)])
    full = pytest.raises(CannotWrite, match="too large")
    with full:
        save(directory / "checkpoints", 2, "run", {"weight": weight})
    with full, Background(directory / "checkpoints", "run") as checkpoints:
        checkpoints.save(2, {"weight": weight})
    dist.barrier()
    assert not any((directory / "checkpoints").iterdir())
    dist.destroy_process_group()


def test_a_full_disk_on_one_rank_is_told_on_all(tmp_path):
    on_ranks(2, full_disk_on_one_rank, tmp_path)


def told_to_end(rank: int, ranks: int, directory, steps: int) -> None:
    """Trains; rank 1 alone gets SIGTERM after two steps, while others may be a moment ahead."""
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=ranks
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # the default would end the test's process
    model, seen = tiny_model(), []
    records = fit(
        model, build_optimizers(model, OPTIMIZATION), batch_at, loss_fn, steps, lambda step: 1.0,
        checkpoint_dir=directory / "checkpoints", checkpoint_every=1000,
    )  # fmt: skip
    last = min(3, steps)
    with pytest.raises(Interrupted, match=f"saved after step {last} of {steps}"):
        for step in records:
            seen.append(step.step)
            if (rank, step.step) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == list(range(last))
    dist.destroy_process_group()


@pytest.mark.parametrize(("steps", "saved"), [(1000, 3), (2, 2)])
def test_sigterm_on_one_rank_ends_all_after_the_same_step(tmp_path, steps, saved):
    """Where the step before the signal was the last one, too."""
    on_ranks(2, told_to_end, tmp_path, steps)
    assert names(tmp_path / "checkpoints") == [f"step-0000000{saved}"]
    assert len(read_history(tmp_path / "checkpoints", saved)) == saved
