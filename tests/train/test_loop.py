"""The loop: resume bit for bit, the guard, accumulation, the balance bias, SIGTERM."""

import dataclasses
import errno
import functools
import gc
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from kexa.kernels.costs import H100_FLOPS
from kexa.model.accounting import account, training_flops
from kexa.record import CannotWrite
from kexa.train import (
    Interrupted,
    Step,
    Stopwatch,
    TrainingDiverged,
    build_optimizers,
    checkpoint,
    exit_on_sigterm,
    fit,
    loop,
    set_numerics,
    wsd,
)
from kexa.train.checkpoint import CheckpointError, damage, list_checkpoints
from kexa.train.loop import overhead
from tests.train.conftest import OPTIMIZATION, batch_at, loss_fn, tiny_model

STEPS = 10
SCHEDULE = functools.partial(wsd, steps=STEPS, warmup_share=0.2, decay_share=0.2)


def train(directory=None, take=STEPS, numerics="fp32", loss=loss_fn, **options):
    """Up to ``take`` records of a run, then walk away from it as a kill would."""
    model = tiny_model()
    set_numerics(model, numerics)
    steps = trainer_steps(directory, model, loss, **options)
    return model, list(itertools.islice(steps, take))


def trainer_steps(directory, model=None, loss=loss_fn, **options):
    model = model or tiny_model()
    return fit(
        model,
        build_optimizers(model, OPTIMIZATION),
        batch_at,
        loss,
        STEPS,
        SCHEDULE,
        checkpoint_dir=directory,
        checkpoint_every=3,
        **options,
    )


def assert_same(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.mark.parametrize(
    "numerics, killed_after", [("fp32", 1), ("fp32", 5), ("fp32", 9), ("fp8", 7)]
)
def test_resumed_run_is_the_uninterrupted_run(tmp_path, numerics, killed_after):
    model, records = train(numerics=numerics)
    train(tmp_path, take=killed_after, numerics=numerics)
    torch.manual_seed(123)  # whatever happened in between
    resumed, all_records = train(tmp_path, numerics=numerics)
    assert all_records == records
    assert_same(model, resumed)


def test_a_resumed_run_does_not_hold_the_checkpoint_beside_its_state(tmp_path, monkeypatch):
    train(tmp_path, take=5)
    loaded, resume = [], checkpoint.resume

    def watched(*arguments):
        state = resume(*arguments)
        loaded.extend(weakref.ref(tensor) for tensor in state["model"].values())
        return state

    monkeypatch.setattr(checkpoint, "resume", watched)
    steps = trainer_steps(tmp_path)
    next(steps)
    gc.collect()
    assert loaded and not any(tensor() is not None for tensor in loaded)
    steps.close()


def test_finished_run_is_replayed_without_training(tmp_path):
    model, records = train(tmp_path)
    again, replayed = train(tmp_path, loss=None)
    assert replayed == records
    assert_same(model, again)


def probe(model):
    """The loss of a batch that training never sees; it draws from every generator as well."""
    assert not model.training and not torch.is_grad_enabled()
    random.random(), np.random.rand(), torch.rand(3)
    return {"loss": float(loss_fn(model, batch_at(1000)).next_token)}


def random_loss(model, batch):
    """A loss that depends on torch's generator: a tenth of the targets do not count."""
    return model.loss(batch["input_ids"], loss_mask_BT=torch.rand(4, 12) > 0.1)


@pytest.mark.parametrize("numerics", ["fp32", "fp8"])
def test_evaluation_changes_no_bit_of_training(numerics):
    options = {"numerics": numerics, "loss": random_loss, "metrics_every": 2}
    model, records = train(**options)
    evaluated, others = train(**options, evaluate=probe, evaluate_after={4, 7, STEPS})
    assert [dataclasses.replace(r, evaluation={}) for r in others] == records
    assert_same(model, evaluated)
    assert [r.step + 1 for r in others if r.evaluation] == [4, 7, STEPS]


def test_evaluation_is_of_the_model_after_the_step():
    model, records = train(take=4, evaluate=probe, evaluate_after={4})
    assert model.training
    with torch.no_grad():
        loss = loss_fn(model.eval(), batch_at(1000)).next_token
    assert records[3].evaluation == {"loss": float(loss)}


def test_a_resumed_run_replays_evaluations_and_makes_only_the_others(tmp_path):
    calls = []

    def counted(model):
        calls.append(1)
        return probe(model)

    options = {"evaluate": counted, "evaluate_after": {2, 5, STEPS}}
    _, records = train(**options)
    train(tmp_path, take=7, **options)  # saved after 3 and 6 steps
    calls.clear()
    _, resumed = train(tmp_path, **options)
    assert resumed == records and len(calls) == 1
    _, replayed = train(tmp_path, **options)
    assert replayed == records and len(calls) == 1


def steps_saved(directory):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]


def test_the_last_two_checkpoints_and_the_milestones_are_kept(tmp_path):
    train(tmp_path, milestones={4})
    assert steps_saved(tmp_path) == [4, 9, 10]


def test_a_damaged_checkpoint_is_told_and_the_run_goes_on_from_the_previous_one(tmp_path):
    model, records = train(tmp_path)
    values = list_checkpoints(tmp_path)[-1] / "values.pt"
    data = bytearray(values.read_bytes())
    data[-100] ^= 1
    values.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-00000010 is damaged.*resuming from step-00000009"):
        resumed, all_records = train(tmp_path)
    assert all_records == records
    assert_same(model, resumed)
    assert steps_saved(tmp_path) == [9, 10]


def test_a_run_on_a_full_disk_ends_with_the_reason_and_goes_on_later(tmp_path, monkeypatch):
    model, records = train()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patched,
        pytest.raises(CannotWrite, match=r"step-00000006 \(No space left.*step-00000003 is intact"),
    ):
        for step in trainer_steps(tmp_path):
            if step.step == 4:
                patched.setattr(FileSystemWriter, "write_data", full)
    assert steps_saved(tmp_path) == [3]
    resumed, all_records = train(tmp_path)
    assert all_records == records
    assert_same(model, resumed)


def test_a_run_goes_on_while_a_checkpoint_is_written_and_survives_a_kill_then(tmp_path):
    model, records = train()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reached = context.Queue()
    process = context.Process(target=stuck_disk, args=(tmp_path, reached))
    process.start()
    assert reached.get(timeout=120) == 7  # the next checkpoint waits for this one
    process.kill()
    process.join()
    assert steps_saved(tmp_path) == [3] and list(tmp_path.glob(".step-00000006.partial"))
    resumed, all_records = train(tmp_path)
    assert all_records == records
    assert_same(model, resumed)
    assert steps_saved(tmp_path) == [9, 10] and not list(tmp_path.glob(".*"))


def stuck_disk(directory, reached):
    """Trains on a disk that never ends writing the checkpoint after 6 steps."""
    torch.set_num_threads(1)  # as here: more threads sum in another order
    write = FileSystemWriter.write_data

    def stuck(*arguments):
        if (directory / ".step-00000006.partial").exists():
            time.sleep(600)
        return write(*arguments)

    FileSystemWriter.write_data = stuck
    for step in trainer_steps(directory):
        if step.step == 7:
            reached.put(step.step)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path, identity="seed 0")
    with pytest.raises(CheckpointError, match="'seed 0'.*'seed 1'"):
        train(tmp_path, identity="seed 1")


def test_missing_history_is_an_error(tmp_path):
    train(tmp_path, take=4)
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="0 of the 3 steps"):
        train(tmp_path)


def test_records(tmp_path):
    _, records = train()
    assert [r.step for r in records] == list(range(STEPS))
    assert [r.learning_rate for r in records] == [0.01 * SCHEDULE(t) for t in range(STEPS)]
    assert [r.tokens for r in records] == [48 * (t + 1) for t in range(STEPS)]
    assert set(records[0].losses) == {"total", "next_token", "mtp", "balance"}
    for record in records:
        assert [sum(layer) for layer in record.expert_load] == [48 * 2] * 3


def test_second_run_on_the_same_optimizers_starts_at_the_peak(model):
    optimizers = build_optimizers(model, OPTIMIZATION)
    run = functools.partial(fit, model, optimizers, batch_at, loss_fn, STEPS, SCHEDULE)
    first, second = list(run()), list(run())
    assert [r.learning_rate for r in second] == [r.learning_rate for r in first]


def test_two_microbatches_give_the_gradient_of_the_whole_batch():
    whole, _ = train(take=1)
    halves, _ = train(take=1, accumulate=2)
    for (name, a), b in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_batch_must_split_evenly():
    with pytest.raises(ValueError, match="4 sequences does not split into 3"):
        train(accumulate=3)


def test_gradients_are_clipped():
    model, records = train(take=1, clip=0.01)
    assert records[0].grad_norm > 0.01
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_balance_bias_moves_toward_the_starved_experts():
    model, records = train(take=1, balance_step=0.5)
    for layer, load in zip(model.moe_layers, records[0].expert_load, strict=True):
        mean = sum(load) / len(load)
        expected = [0.5 * ((mean > n) - (mean < n)) for n in load]
        assert layer.e_score_correction_bias.tolist() == expected
        assert layer.load_E.sum() == 0


def poison(at):
    """A loss that is not finite at the given steps; ``calls`` counts micro-batches."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = loss_fn(model, batch)
        return value._replace(total=value.total * math.nan) if len(calls) - 1 in at else value

    return loss


def test_a_step_that_is_not_finite_is_skipped():
    before, _ = train(take=4)
    model, records = train(take=5, loss=poison({4}))
    assert [r.skipped for r in records] == [False] * 4 + [True]
    for (name, a), b in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_only_skips_is_stopped_with_a_message():
    with pytest.raises(TrainingDiverged, match="10 updates in a row.*at step 9.*learning rate"):
        train(loss=poison(range(100)))


def test_a_spike_of_the_gradient_norm_is_skipped(model):
    def loss(model, batch):
        value = loss_fn(model, batch)
        return value._replace(total=value.total * (100.0 if len(seen) == 18 else 1.0))

    seen = []
    optimizers = build_optimizers(model, OPTIMIZATION)
    for step in fit(model, optimizers, batch_at, loss, 20, lambda step: 1.0):
        seen.append(step.skipped)
    assert seen == [False] * 18 + [True, False]


@pytest.fixture
def sigterm():
    """How often a handler that was there before got the signal."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    yield received
    signal.signal(signal.SIGTERM, previous)


def test_sigterm_ends_the_run_after_the_step_in_progress_with_a_checkpoint(tmp_path, sigterm):
    model, records = train()
    seen = []
    with pytest.raises(Interrupted, match="saved after step 5 of 10"):
        for step in trainer_steps(tmp_path):
            seen.append(step)
            if step.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == records[:5] and sigterm == [1]
    assert steps_saved(tmp_path) == [3, 5]
    resumed, all_records = train(tmp_path)
    assert all_records == records
    assert_same(model, resumed)


def test_sigterm_after_the_last_step_is_not_lost(tmp_path, sigterm):
    with pytest.raises(Interrupted, match="saved after step 10 of 10"):
        for step in trainer_steps(tmp_path):
            if step.step == STEPS - 1:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("saves", [True, False])
def test_sigterm_reaches_whoever_walks_away_or_saves_nothing(tmp_path, sigterm, saves):
    steps = trainer_steps(tmp_path if saves else None)
    next(steps)
    os.kill(os.getpid(), signal.SIGTERM)
    assert sigterm == ([] if saves else [1])
    steps.close()
    assert sigterm == [1]


def test_sigterm_does_not_hide_that_the_disk_is_full(tmp_path, sigterm, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(CannotWrite, match="No space left"):
        for step in trainer_steps(tmp_path):
            if step.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert sigterm == []


@pytest.mark.parametrize("command, code", [(True, 0), (False, -signal.SIGTERM)])
def test_sigterm_ends_a_command_with_0_and_another_process_by_the_signal(tmp_path, command, code):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=endless, args=(tmp_path, command))
    process.start()
    # once a line is there the run holds the signal back; the empty file is older than that
    while not history_lines(tmp_path):
        assert process.exitcode is None
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode == code
    newest = list_checkpoints(tmp_path)[-1]
    assert not damage(newest)
    assert len(history_lines(tmp_path)) == steps_saved(tmp_path)[-1]


def history_lines(directory):
    path = directory / "history.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def endless(directory, command):
    if command:
        exit_on_sigterm()
    model = tiny_model()
    optimizers = build_optimizers(model, OPTIMIZATION)
    steps = fit(
        model, optimizers, batch_at, loss_fn, 10**6, lambda step: 1.0,
        checkpoint_dir=directory, checkpoint_every=3,
    )  # fmt: skip
    list(steps)
    raise AssertionError("half a run was taken for a whole one")


def test_overhead_is_all_but_forward_backward_and_optimizers(model):
    def slow_loss(model, batch):
        time.sleep(0.1)
        return loss_fn(model, batch)

    def slow_batch(step):
        time.sleep(0.3 if step else 0.0)
        return batch_at(step)

    watch = Stopwatch()
    optimizers = build_optimizers(model, OPTIMIZATION)
    steps = fit(model, optimizers, slow_batch, slow_loss, 2, SCHEDULE, stopwatch=watch)
    begun = time.perf_counter()
    shares = []
    for share in overhead(steps, watch):
        shares.append(share)
        time.sleep(0.3)  # the caller's own time does not count
    wall = time.perf_counter() - begun
    assert 0.2 <= watch.seconds <= wall - 0.9
    assert 0 <= shares[0] < 1 - 0.1 / (wall - 0.9) and 0.3 / (wall - 0.6) < shares[1] < 1


def test_offloaded_states_change_no_bit_and_wait_in_host_memory(tmp_path, monkeypatch):
    model, records = train()
    train(tmp_path, take=5, offload_optimizer=True)
    again, all_records = train(tmp_path, offload_optimizer=True)
    assert all_records == records
    assert_same(model, again)

    monkeypatch.setattr(loop, "HOST", torch.device("meta"))  # what is moved there shows
    for directory in (None, tmp_path):  # after a step, and after loading a checkpoint
        model = tiny_model()
        optimizers = build_optimizers(model, OPTIMIZATION)
        next(
            fit(
                model, optimizers, batch_at, loss_fn, STEPS, SCHEDULE, offload_optimizer=True,
                checkpoint_dir=directory,
            )
        )  # fmt: skip
        states = [t for o in optimizers for s in o.state.values() for t in s.values() if t.dim()]
        assert len(states) > len(list(model.parameters())) and all(t.is_meta for t in states)


def test_mfu_is_a_share_of_the_peak_of_all_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(checkpoint, "ranks", lambda: 4)
    ticks = iter([10.0, 12.0])
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    model = tiny_model()
    trainer = SimpleNamespace(model=model, tokens=0, device=torch.device("cuda"))
    pace = loop._Pace(trainer)
    per_token = training_flops(account(model.config).active, tokens=1)
    at_a_tenth = int(2 * 0.1 * 4 * H100_FLOPS / per_token)  # tokens of two seconds
    record = Step(0, {"total": 1.0}, 0.0, 0.0, at_a_tenth, False, [])
    assert pace.shown(record)["MFU"] == "10.0%"


def test_the_progress_bar_shows_speed_and_skipped_updates(capsys):
    train(loss=poison({4}))
    line = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"10/10 .*loss=\d+\.\d+, tokens/s=[\d,]+, skipped=1", line)
