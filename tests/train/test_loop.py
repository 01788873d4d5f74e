"""The loop: resume bit for bit, the guard, accumulation, the balance bias, SIGTERM."""

import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kexa.train import TrainingDiverged, build_optimizers, fit, set_numerics, wsd
from kexa.train.checkpoint import CheckpointError, list_checkpoints
from tests.train.conftest import OPTIMIZATION, batch_at, loss_fn, tiny_model

STEPS = 10
SCHEDULE = functools.partial(wsd, steps=STEPS, warmup_share=0.2, decay_share=0.2)


def train(directory=None, take=STEPS, numerics="fp32", loss=loss_fn, **options):
    """Up to ``take`` records of a run, then walk away from it as a kill would."""
    model = tiny_model()
    set_numerics(model, numerics)
    steps = fit(
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
    records = list(itertools.islice(steps, take))
    return model, records


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


def test_finished_run_is_replayed_without_training(tmp_path):
    model, records = train(tmp_path)
    again, replayed = train(tmp_path, loss=None)
    assert replayed == records
    assert_same(model, again)


def test_only_two_checkpoints_are_kept(tmp_path):
    train(tmp_path)
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["step-00000009.ckpt", "step-00000010.ckpt"]


def test_damaged_checkpoint_is_refused_and_the_previous_one_still_works(tmp_path):
    model, records = train(tmp_path)
    newest = list_checkpoints(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-00000010.*damaged.*step-00000009"):
        train(tmp_path)
    newest.unlink()
    resumed, all_records = train(tmp_path)
    assert all_records == records
    assert_same(model, resumed)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path, identity="seed 0")
    with pytest.raises(CheckpointError, match="'seed 0'.*'seed 1'"):
        train(tmp_path, identity="seed 1")


@pytest.mark.parametrize("content", [b"", b"hello", b"[1]\n", b'{"format": "other"}\n'])
def test_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "step-00000003.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint.*start from the beginning"):
        train(tmp_path)


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


def test_sigterm_saves_and_ends_by_the_signal(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.train import test_loop as t;"
        "import kexa.train.loop as l; t.STEPS = 10**6; t.SCHEDULE = lambda step: 1.0;"
        "t.train(Path(sys.argv[1]), take=10**6)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    while not list_checkpoints(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    newest = int(list_checkpoints(tmp_path)[-1].stem.removeprefix("step-"))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == newest
