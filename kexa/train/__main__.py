"""Pretraining as a command, on one process or many:

    python -m kexa.train --profile P
    torchrun --nproc-per-node 4 -m kexa.train --profile P --fsdp 2 --ep 2

runs the curriculum of ``[pretrain]`` and leaves in ``--out``

    tokens/         the corpus and the synthetic documents, encoded once by rank 0, and what the
                    model is evaluated on where a stage ends
    checkpoints/    where the same command goes on after any end, under any mesh
    metrics.jsonl   what kexa.train.metrics lists, of every step, and the evaluations
    results.json    losses at the end, evaluations, profile, seed, commit, device
    model/          the trained model as a Hugging Face folder, with its tokenizer; rank 0 gathers
                    it whole in host memory

With ``--decay STAGE`` a run that has come as far ends early: a branch with a decay of its own.
Its results and model are in ``decay-STAGE/``.

The tokenizer is stage 01's. Several machines need ``--out`` on a file system that all of them see.
On SIGTERM the step in progress is finished and saved. torchrun passes the signal on, kills after 30
seconds what still runs (``--shutdown-timeout`` where a step takes longer), and exits with 1 itself.
Exit codes: 0, 1 training diverged, or a rank was lost or never came, 2 a bad argument, config, mesh
or directory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from kexa import config as configs
from kexa import dist, lock, runtime, tokenizer
from kexa.config import ROOT, Config, ConfigError, as_dict
from kexa.data import load_corpus
from kexa.interop import save_hf
from kexa.model import KexaForCausalLM
from kexa.record import CannotWrite, Run, discard_log, read_json, write_atomic
from kexa.train.checkpoint import CheckpointError, list_checkpoints
from kexa.train.evaluation import load_evaluation, save_evaluation
from kexa.train.loop import Step, TrainingDiverged, exit_on_sigterm
from kexa.train.metrics import scalars
from kexa.train.pretrain import (
    Pretraining,
    stage_ends,
    stage_evaluation,
    start_curriculum,
    training_streams,
)

EVALUATION = "evaluation.pt"  # in the directory of the tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="kexa.train", description=__doc__.splitlines()[0].rstrip(":")
    )
    parser.add_argument("--profile", default="smoke", help="a file in configs/, or a .toml path")
    parser.add_argument("--fsdp", type=int, help="default: the processes that --ep leaves")
    parser.add_argument("--ep", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", default="", metavar="DIR", help="default: runs/<profile>/pretrain")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--decay", default="", metavar="STAGE",
        help="a branch: leave the run in DIR where STAGE begins and decay over that stage",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", default="", metavar="DIR",
        help="default: runs/<profile>/01_tokenizer/tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="another value of a config key: --set pretrain.accumulate=2",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ConfigError, CheckpointError, CannotWrite, lock.Busy) as error:
        return _say(error, 2)
    except (TrainingDiverged, dist.CannotMeet) as error:
        return _say(error, 1)
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        return _say(f"another rank was lost; run the same command again to go on ({error})", 1)
    return 0


def _run(options: argparse.Namespace) -> None:
    config = configs.load(options.profile, dict(map(override, options.overrides)))
    processes = dist.processes()
    fsdp = processes // max(1, options.ep) if options.fsdp is None else options.fsdp
    dist.check(fsdp, options.ep, processes, config.model.num_experts)
    dist.Layout(fsdp, options.ep).rows(config.pretrain.batch_size // config.pretrain.accumulate)
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = dataclasses.replace(
        config.runtime, threads=max(1, config.runtime.threads // on_machine)
    )
    device = dist.local_device(runtime.setup(share, options.seed).device)
    out = Path(options.out or ROOT / "runs" / config.profile / "pretrain")
    vocabulary = Path(
        options.tokenizer or ROOT / "runs" / config.profile / "01_tokenizer" / "tokenizer"
    )
    main_rank = os.environ.get("RANK", "0") == "0"
    with lock.hold(out, "pretrain") if main_rank else contextlib.nullcontext():
        with _settings():
            tokens = _tokens(config, options.seed, vocabulary, out, main_rank)
        layout = dist.join(fsdp, options.ep, device)
        _train(config, options.seed, options.decay, vocabulary, out, tokens, device, layout)
        dist.leave()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """A ValueError in here is about an argument, the config or a file; in training it is a fault.

    Raises:
        ConfigError: for every ValueError but a CheckpointError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _train(
    config: Config,
    seed: int,
    decay: str,
    vocabulary: Path,
    out: Path,
    tokens: dict[str, Any],
    device: torch.device,
    layout: dist.Layout,
) -> None:
    pretrain = config.pretrain
    run = Pretraining(
        pretrain.numerics, config.model, pretrain, seed, out / "tokens", tuple(tokens["streams"]),
        out / "checkpoints", load_evaluation(out / "tokens" / EVALUATION), decay, tokens["key"],
    )  # fmt: skip
    if decay:
        out = out / f"decay-{decay}"
    if layout.rank == 0:
        if saved := list_checkpoints(run.directory):
            print(f"going on from {saved[-1].name}, or the one before it that is whole")
        else:
            discard_log(out)
    with _settings():
        model, _, steps = start_curriculum(run, device, layout)
    record = Run("pretrain", config, seed, out) if layout.rank == 0 else None
    stages = {end: stage for stage, end in stage_ends(pretrain).items()}
    last = None
    for last in steps:
        if record:
            record.log("train", last.step, **scalars(last))
            if last.evaluation:
                _tell(record, last, stages[last.step + 1])
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if record:
        for name, value in last.losses.items():
            unit = "" if name == "balance" else "nats/token"
            record.value(f"training loss, {name}", value, unit=unit)
        record.value("tokens", last.tokens)
        record.value("ranks", f"fsdp {layout.fsdp} x ep {layout.ep}")
        with torch.device("meta"):
            trained = KexaForCausalLM(config.model)
        trained.load_state_dict(whole, assign=True)
        save_hf(trained, out / "model", tokenizer.load(vocabulary))
        record.finish()
        print(f"trained: {out / 'model'}")


def _tell(record: Run, step: Step, stage: str) -> None:
    """Print and record what was evaluated at the end of a stage."""
    figures = ", ".join(f"{name} {value:.3f}" for name, value in step.evaluation.items())
    tqdm.write(f"{stage} ends after {step.step + 1} steps: {figures}")
    for name, value in step.evaluation.items():
        unit = "bits/byte" if name.startswith("bits per byte") else "share right"
        record.value(f"{name}, after {stage}", value, unit=unit)


def tokens_key(config: Config, seed: int, vocabulary: Path) -> str:
    """A hash of everything that decides the encoded streams and what is evaluated."""
    pretrain = config.pretrain
    parts = [
        as_dict(config.data),
        pretrain.synthetic_documents,
        [pretrain.sequence_length, pretrain.validation_rows, pretrain.probes],
        seed,
        tokenizer.load(vocabulary).to_str(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokens(
    config: Config, seed: int, vocabulary: Path, out: Path, main_rank: bool
) -> dict[str, Any]:
    """ "key" and names of the "streams" in ``out/tokens``. Rank 0 writes what is missing."""
    key, done = tokens_key(config, seed, vocabulary), out / "tokens" / "streams.json"
    while read_json(done).get("key") != key:
        if main_rank:
            done.unlink(missing_ok=True)
            known = tokenizer.load(vocabulary), load_corpus(config.data), config.pretrain, seed
            save_evaluation(stage_evaluation(*known), done.parent / EVALUATION)
            streams = training_streams(*known, done.parent)
            write_atomic(done, json.dumps({"key": key, "streams": list(streams)}))
        else:
            time.sleep(0.2)
    return read_json(done)


def override(text: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``: a value of TOML, or else a word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r}: write it as KEY=VALUE, as in pretrain.accumulate=2")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because its partner is gone: by NCCL's class or gloo's words."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _say(what: object, code: int) -> int:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"kexa{rank}: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
