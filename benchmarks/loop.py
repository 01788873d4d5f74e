"""The training loop: what it costs beside forward, backward and optimizers; what a save costs.

python -m benchmarks.loop --profile laptop      writes results/<device>/loop-<profile>.json

The profile's model trains on packed rows of random documents. In turns, one training step, one save
and one load: a busy minute of the machine slows all three, so what counts are their quotients, told
as median and middle 80% over the rounds. ``overhead`` is the share of a step's wall clock outside
forward, backward and optimizers; ``share`` adds a save every ``checkpoint_every`` steps, which is
the most that saving can cost, since a run writes in the background.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.__main__ import device_name, results_of, spread
from kexa import runtime
from kexa.config import Config, load
from kexa.data import Mixture, TokenizedDocuments
from kexa.record import commit, write_atomic
from kexa.train import Stopwatch, build_optimizers, checkpoint, fit, set_numerics
from kexa.train.loop import overhead
from kexa.train.pretrain import new_model, training_loss

ROUNDS = 20
DOCUMENT = 300  # tokens
FIRST_ID = 64  # ids below are special tokens


def random_mixture(config: Config) -> Mixture:
    """Enough random documents for a batch, packed as the profile packs."""
    count = 4 * config.pretrain.batch_size * config.pretrain.sequence_length // DOCUMENT + 1
    drawn = np.random.default_rng(0).integers(
        FIRST_ID, config.model.vocab_size, count * DOCUMENT, dtype=np.int32
    )
    documents = TokenizedDocuments(drawn, np.arange(0, len(drawn) + 1, DOCUMENT))
    sizes = config.pretrain.sequence_length, config.pretrain.batch_size
    return Mixture({"random": documents}, {"random": 1.0}, *sizes, 0)


def measure(config: Config, rounds: int, folder: Path) -> dict:
    """Quotients over ``rounds`` rounds after one that warms up."""
    device = runtime.setup(config.runtime, 0).device
    model = new_model(config.model, 0).to(device)
    set_numerics(model, config.pretrain.numerics)
    optimizers = build_optimizers(model, config.pretrain)
    mixture = random_mixture(config)

    def batch_at(step: int) -> dict[str, Tensor]:
        input_ids, document_ids = mixture.batch(step)
        return {"input_ids": input_ids, "document_ids": document_ids}

    watch = Stopwatch()
    steps = fit(
        model, optimizers, batch_at, functools.partial(training_loss, config=config.pretrain),
        rounds + 1, lambda step: 1.0, accumulate=config.pretrain.accumulate, stopwatch=watch,
    )  # fmt: skip
    shares, saves, loads = [], [], []
    begun = time.perf_counter()
    for share in tqdm(overhead(steps, watch), total=rounds + 1, desc="rounds"):
        stepped = time.perf_counter() - begun
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict()["state"] for o in optimizers],
        }
        begun = time.perf_counter()
        path = checkpoint.save(folder, len(shares), "loop", state)
        saved = time.perf_counter() - begun
        begun = time.perf_counter()
        checkpoint.load(path, "loop")
        loaded = time.perf_counter() - begun
        shares.append(share)
        saves.append(saved / stepped)
        loads.append(loaded / stepped)
        begun = time.perf_counter()
    every = config.pretrain.checkpoint_every
    return {
        "overhead": spread(shares[1:]),
        "save_over_step": spread(saves[1:]),
        "load_over_step": spread(loads[1:]),
        "share": spread([s + q / every for s, q in zip(shares, saves, strict=True)][1:]),
        "checkpoint_megabytes": round(sum(f.stat().st_size for f in path.iterdir()) / 1e6, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description="Loop overhead.")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="default: the profile's")
    arguments = parser.parse_args()
    threads = {"runtime.threads": arguments.threads} if arguments.threads else {}
    config = load(arguments.profile, threads)
    device = runtime.device_of(config.runtime)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(config, arguments.rounds, Path(folder))
    found = {
        "device": device_name(device.type),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "profile": arguments.profile,
        "rounds": arguments.rounds,
        **measured,
    }
    folder = results_of(found["device"])
    write_atomic(folder / f"loop-{arguments.profile}.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
