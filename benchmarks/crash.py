"""Never losing a step: a run is killed, its checkpoints are damaged, and it is told to end.

python -m benchmarks.crash                 50 kills and 200 damages; writes results/crash.json

    kills    a run is ended with SIGKILL at random moments (while it starts, trains, or saves) and
             started again each time; then everything it leaves equals what an uninterrupted run
             leaves, bit for bit: weights, optimizers, generators, the guard's norms, history.jsonl
             and metrics.jsonl
    damages  one flipped bit, or a truncation, at a random place in a random file of the newest
             checkpoint: loading it is refused, and resuming goes on from the previous one
    SIGTERM  the process saves and exits with 0, and goes on later to the same end

The model has a few thousand parameters and saves every few steps, so that kills fall into saves
as often as into steps. Its loss depends on the generators of python, numpy and torch, so that a
generator that is not restored shows. Exits with 1 unless all holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.__main__ import RESULTS
from kexa.config import load
from kexa.model import KexaForCausalLM, Loss
from kexa.record import Run, commit, write_atomic
from kexa.train import build_optimizers, checkpoint, exit_on_sigterm, fit, wsd

STEPS = 150
SAVE_EVERY = 2
WHILE_STARTING = 0.2  # share of kills before the first step: while importing, building, loading
IDENTITY = "crash"
BEGUN = "begun"  # a file that says that the first step has begun
SIZES = {  # of the model, where the smoke profile has others
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "sliding_window_pattern": "LG",
    "layer_types": (),
    "hidden_size": 16,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_experts": 4,
}


def batch_at(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(SIZES["vocab_size"], (4, 16), generator=generator)}


def noisy_loss(model: KexaForCausalLM, batch: Mapping[str, Tensor]) -> Loss:
    """The model's loss times a number that the three generators draw."""
    loss = model.loss(batch["input_ids"])
    drawn = random.random() + np.random.random() + float(torch.rand(()))
    return loss._replace(total=loss.total * (1 + 0.1 * drawn))


def train(directory: str, steps: int) -> None:
    """The training command: goes on from what ``directory`` holds; exits with 0 on SIGTERM."""
    exit_on_sigterm()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    config = load("smoke")
    model = KexaForCausalLM(dataclasses.replace(config.model, **SIZES))
    optimizers = build_optimizers(model, config.pretrain)
    schedule = functools.partial(wsd, steps=steps, warmup_share=0.1, decay_share=0.3)
    run = Run("crash", config, 0, Path(directory))
    begun = run.dir / BEGUN

    def marked_batch_at(step: int) -> dict[str, Tensor]:
        begun.touch()
        return batch_at(step)

    records = fit(
        model, optimizers, marked_batch_at, noisy_loss, steps, schedule,
        checkpoint_dir=run.dir / "checkpoints", checkpoint_every=SAVE_EVERY, identity=IDENTITY,
    )  # fmt: skip
    for step in records:
        run.log("train", step.step, grad_norm=step.grad_norm, **step.losses)


def start(directory: Path, steps: int) -> BaseProcess:
    """:func:`train` in a process of its own, forked from one that has imported all it needs."""
    (directory / BEGUN).unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.__main__", "kexa.train"])
    process = context.Process(target=train, args=(str(directory), steps))
    os.environ["TQDM_DISABLE"] = "1"  # over there
    process.start()
    del os.environ["TQDM_DISABLE"]
    return process


def finish(directory: Path, steps: int) -> float:
    """Train to the end; returns the seconds it took.

    Raises:
        RuntimeError: the process failed.
    """
    begun = time.perf_counter()
    process = start(directory, steps)
    process.join()
    _refuse_failure(process, directory)
    return time.perf_counter() - begun


def _refuse_failure(process: BaseProcess, directory: Path) -> None:
    if process.exitcode:
        raise RuntimeError(f"training in {directory.name} ended with code {process.exitcode}")


def newest_step(directory: Path) -> int:
    found = checkpoint.list_checkpoints(directory / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit; types and dtypes count."""
    if isinstance(a, Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def differences(a: Path, b: Path) -> list[str]:
    """Which of the things that two finished runs leave are not equal."""
    states = [
        checkpoint.load(checkpoint.list_checkpoints(d / "checkpoints")[-1], IDENTITY)
        for d in (a, b)
    ]
    found = [key for key in states[0] | states[1] if not same(*(s.get(key) for s in states))]
    logs = ("metrics.jsonl", "checkpoints/history.jsonl")
    return found + [name for name in logs if (a / name).read_bytes() != (b / name).read_bytes()]


def kill_often(
    whole: Path, directory: Path, kills: int, steps: int, seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Kill a run ``kills`` times, let it end, and compare it with the run in ``whole``.

    A run that ends before it was killed often enough is compared too, and followed by another.

    Args:
        seconds: what the whole run took; moments are drawn so that kills spread over it.
    """
    starting = finish(whole, steps)  # finds itself finished: what a start costs
    after, saving, found, runs = [], 0, [], 1
    for done in tqdm(range(kills), desc="kills"):
        while True:
            left = (1 - newest_step(directory) / steps) * seconds
            process = start(directory, steps)
            if rng.random() < WHILE_STARTING:
                process.join(rng.uniform(0, starting))
            else:
                while not (directory / BEGUN).exists() and process.exitcode is None:
                    time.sleep(0.002)
                process.join(rng.uniform(0, 2 * left / (kills - done)))
            if process.exitcode is None:
                break
            _refuse_failure(process, directory)
            found += differences(whole, directory)
            shutil.rmtree(directory)
            runs += 1
        process.kill()
        process.join()
        after.append(newest_step(directory))
        saving += any((directory / "checkpoints").glob(".step-*"))
    finish(directory, steps)
    return {
        "kills": kills,
        "runs": runs,
        "killed_while_saving": saving,
        "newest_checkpoint_at_kill": after,
        "differences": found + differences(whole, directory),
    }


def damage_often(whole: Path, directory: Path, times: int, rng: random.Random) -> dict[str, Any]:
    """Damage copies of a run's newest checkpoint; count what is refused and what loads instead."""
    source = whole / "checkpoints"
    previous, newest = checkpoint.list_checkpoints(source)[-2:]
    expected = checkpoint.load(previous, IDENTITY)
    found: dict[str, Any] = {"flips": 0, "truncations": 0, "refused": 0, "previous_loaded": 0}
    missed = []
    for _ in tqdm(range(times), desc="damages"):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        file = rng.choice(sorted((directory / newest.name).iterdir()))
        data = bytearray(file.read_bytes())
        place = rng.randrange(len(data))
        kind = rng.choice(["flips", "truncations"])
        if kind == "flips":
            data[place] ^= 1 << rng.randrange(8)
        else:
            del data[place:]
        file.write_bytes(data)
        found[kind] += 1
        try:
            checkpoint.load(directory / newest.name, IDENTITY)
            missed.append(f"{kind} at byte {place} of {file.name}")
        except checkpoint.CheckpointError:
            found["refused"] += 1
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            found["previous_loaded"] += same(checkpoint.resume(directory, IDENTITY), expected)
    return found | {"missed": missed}


def terminate_once(whole: Path, directory: Path, steps: int, rng: random.Random) -> dict[str, Any]:
    """SIGTERM a run after its first checkpoint, then let it go on to its end."""
    process = start(directory, steps)
    while not newest_step(directory) and process.exitcode is None:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    begun = time.perf_counter()
    process.terminate()
    process.join()
    seconds = time.perf_counter() - begun
    path = checkpoint.list_checkpoints(directory / "checkpoints")[-1]
    result = {
        "exit_code": process.exitcode,
        "seconds": round(seconds, 2),
        "saved_step": newest_step(directory),
        "checkpoint_is_whole": not checkpoint.damage(path),
    }
    finish(directory, steps)
    return result | {"differences": differences(whole, directory)}


def crash(folder: Path, kills: int, flips: int, steps: int = STEPS, seed: int = 0) -> dict:
    """All three, in ``folder``; ``holds`` says whether everything is as it must be."""
    rng = random.Random(seed)
    whole = folder / "whole"
    seconds = finish(whole, steps)
    killed = kill_often(whole, folder / "killed", kills, steps, seconds, rng)
    damaged = damage_often(whole, folder / "damaged", flips, rng)
    ended = terminate_once(whole, folder / "ended", steps, rng)
    holds = (
        not killed["differences"]
        and damaged["refused"] == damaged["previous_loaded"] == flips
        and ended["exit_code"] == 0
        and ended["seconds"] < 30
        and 0 < ended["saved_step"] < steps
        and ended["checkpoint_is_whole"]
        and not ended["differences"]
    )
    return {"steps": steps, "killed": killed, "damaged": damaged, "ended": ended, "holds": holds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description="Crash tests.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=200, help="flips and truncations together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    arguments = parser.parse_args()
    about = {"torch": torch.__version__, "commit": commit(), "seed": arguments.seed}
    with tempfile.TemporaryDirectory() as folder:
        found = about | crash(Path(folder), arguments.kills, arguments.flips, seed=arguments.seed)
    write_atomic(RESULTS / "crash.json", json.dumps(found, indent=1) + "\n")
    for name in ("killed", "damaged", "ended"):
        print(f"{name}: {json.dumps(found[name])}")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
