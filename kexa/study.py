"""Studies: questions that need many seeds, answered by many runs of one micro-model.

``configs/studies.toml`` holds a table per study: variants, each a change of the common ``[trial]``,
and a number of seeds. :func:`run` makes one run after the other and appends a line to
``studies/NAME.jsonl`` when one has finished; a run that is there with the same settings is not
repeated, so a study killed at any moment goes on from its last finished run. A line holds settings,
seed, commit, versions, device and figures; no wall clock.

Runs are paired: for one seed all variants start from the same values and see the same batches in
the same order; other seeds change both. A study with ``rates`` first tries every optimizer with
each of them on one more seed and gives each the rate of its lowest final loss.

Lines of a CPU and of a GPU may stand in one file and are read apart (:func:`by_device`): the recipe
"fp8" is emulated on one and multiplied on the other. The coarser recipes are emulated on both.

What is measured is the next-token loss on held-out rows, the same in all runs, in nats per token,
at evenly spaced steps. :func:`evaluate` turns the lines into intervals:

    gap(v)    = mean over seeds of (loss(v) - loss(base)) / loss(base)     base: the first variant
    reseed    = deviation of the relative difference of two runs that differ in the seed alone
    tokens(o) = mean over seeds of the share of the base's tokens with which optimizer o reaches the
                base's final loss

The last one reads whole schedules of several lengths, each at its end, where the learning rate has
decayed: inside a longer run the rate is still high and the loss too. Between two lengths the loss
is taken as linear in the logarithm of the tokens. Where the shortest run is already below the base,
its length counts, which overstates the share.

chosen: all of it; the report gives no comparisons of its optimizer or its numerics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kexa import config as configs
from kexa import runtime
from kexa.config import ROOT, ConfigError, ModelConfig, RuntimeConfig
from kexa.data import Mixture, TokenizedDocuments, encode, load_corpus
from kexa.lock import hold
from kexa.record import device_name, environment, write_atomic, writing
from kexa.statistics import Interval, mean_interval
from kexa.tokenizer import train_tokenizer
from kexa.train.evaluation import HeldOut, held_out, pooled, validate
from kexa.train.fp8 import POLICIES, set_numerics
from kexa.train.loop import TrainingDiverged, fit
from kexa.train.optim import build_optimizers
from kexa.train.pretrain import new_model, stage_weights
from kexa.train.schedule import wsd

FILE = ROOT / "configs" / "studies.toml"
RESULTS = ROOT / "studies"
CHECK_STEPS = 8  # of the longest schedule in a check; the others in proportion


class Unfinished(ValueError):
    """Too few runs for an interval; the message says which study, and what makes the others."""


@dataclass(frozen=True)
class Trial:
    """Everything that makes a run, but for its seed and its text."""

    numerics: str  # one of kexa.train.fp8.POLICIES
    optimizer: str  # of matrices: "muon" or "adamw"
    learning_rate: float
    steps: int
    batch_size: int  # sequences per step
    sequence_length: int
    warmup_share: float
    decay_share: float
    weight_decay: float
    balance_weight: float
    balance_step: float
    validation_rows: int  # held-out sequences per category
    points: int  # held-out losses along the run, the last at its end
    model: ModelConfig


@dataclass(frozen=True)
class Table:
    """A study as configs/studies.toml has it; ``variants`` are changes of its ``trial``."""

    question: str
    profile: str
    trial: dict  # changes of the common trial
    seeds: int
    rates: tuple[float, ...]  # empty: the trial's own
    variants: dict[str, dict]


@dataclass(frozen=True)
class _File:
    threads: int
    trial: Trial
    studies: dict[str, Table]


@dataclass(frozen=True)
class Study:
    """One study, ready to run."""

    name: str
    question: str
    seeds: tuple[int, ...]
    tuning_seed: int  # not among the seeds, so that no rate is chosen on a run it is judged by
    rates: tuple[float, ...]
    trial: Trial
    variants: dict[str, Trial]  # learning rates before tuning
    profile: str
    threads: int


@dataclass(frozen=True)
class Text:
    """What a study's runs read."""

    streams: Mapping[str, TokenizedDocuments]
    weights: Mapping[str, float]
    sets: Mapping[str, HeldOut]


@dataclass(frozen=True)
class Outcome:
    """A study's lines, read: only seeds that every variant has finished. Losses in nats per token.

    A seed with which any variant diverged is in ``diverged`` and in nothing else. ``curves`` holds
    tokens [P] and losses [S, P]; ``tokens`` is None for an optimizer that does not reach the base's
    final loss with one of the seeds.
    """

    seeds: list[int]
    losses: dict[str, list[float]]  # final, by variant
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    gaps: dict[str, Interval]  # of each variant against the first, relative
    reseed: float
    tuning: dict[str, dict[float, float]]  # final loss by optimizer and rate; inf: diverged
    tokens: dict[str, Interval | None]  # by optimizer other than the base's
    diverged: dict[str, list[int]]  # the seeds with which a variant did, by variant


def load(name: str) -> Study:
    """A study of configs/studies.toml.

    Raises:
        ConfigError: no such study; a key that is unknown, missing or of the wrong type; a study
            that could not end with an interval.
    """
    file = configs.build(_File, configs.read_toml(FILE), "")
    if name not in file.studies:
        raise ConfigError(f"no study {name!r} in {FILE.name}: use {', '.join(file.studies)}")
    table = file.studies[name]
    base = configs.as_dict(file.trial) | table.trial
    variants = {
        variant: configs.build(Trial, base | changes, f"studies.{name}.variants.{variant}")
        for variant, changes in table.variants.items()
    }
    for variant, trial in variants.items():
        where = f"studies.{name}.variants.{variant}"
        if trial.numerics not in POLICIES:
            raise ConfigError(f"{where}: numerics {trial.numerics!r}; use {', '.join(POLICIES)}")
        if trial.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"{where}: optimizer {trial.optimizer!r}; use muon or adamw")
        if not 1 <= trial.points <= trial.steps:
            raise ConfigError(f"{where}: points={trial.points} must lie in 1..steps={trial.steps}")
    if table.seeds < 2 or len(variants) < 2:
        raise ConfigError(
            f"studies.{name}: {table.seeds} seeds of {len(variants)} variants; an interval of a "
            "difference needs two of each"
        )
    return Study(
        name, table.question, tuple(range(table.seeds)), table.seeds, table.rates,
        configs.build(Trial, base, f"studies.{name}.trial"), variants, table.profile, file.threads,
    )  # fmt: skip


def shortened(study: Study) -> Study:
    """The same study with two seeds, two rates, a handful of steps and few rows: a check."""
    scale = CHECK_STEPS / max(trial.steps for trial in study.variants.values())

    def short(trial: Trial) -> Trial:
        steps = math.ceil(trial.steps * scale)
        return dataclasses.replace(trial, steps=steps, points=2, validation_rows=2)

    return dataclasses.replace(
        study,
        seeds=study.seeds[:2],
        rates=study.rates[:2],
        trial=short(study.trial),
        variants={name: short(trial) for name, trial in study.variants.items()},
    )


def read_text(study: Study) -> Text:
    """The profile's corpus in tokens of a tokenizer trained on it, and its held-out rows."""
    profile = configs.load(study.profile, {"tokenizer.vocab_size": study.trial.model.vocab_size})
    corpus = load_corpus(profile.data)
    texts = {category: [d.text for d in documents] for category, documents in corpus.train.items()}
    tokenizer = train_tokenizer(texts, profile.tokenizer)
    streams = {
        category: encode(tokenizer, documents) for category, documents in corpus.train.items()
    }
    weights = stage_weights(profile.pretrain, "foundation", streams)
    trial = study.trial
    sets = held_out(tokenizer, corpus.heldout, trial.sequence_length, trial.validation_rows, seed=0)
    return Text(streams, weights, sets)


def kept_text(study: Study, path: Path) -> Text:
    """:func:`read_text`, kept in a file: for a machine without the corpus, or many short calls.

    Raises:
        ConfigError: the file holds the text of other settings, or something else.
    """
    profile = configs.load(study.profile)
    trial, pretrain = study.trial, profile.pretrain
    settings = json.dumps([
        study.profile, configs.as_dict(profile.data), configs.as_dict(profile.tokenizer),
        pretrain.mixtures, pretrain.language_temperature, trial.model.vocab_size,
        trial.sequence_length, trial.validation_rows,
    ])  # fmt: skip
    if not path.is_file():
        text = read_text(study)
        data = io.BytesIO()
        torch.save(_as_tensors(text) | {"settings": settings}, data)
        write_atomic(path, data.getvalue())
    try:
        kept = torch.load(path)
        of = kept["settings"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        raise ConfigError(f"{path.name} is not the text of a study: name another file") from error
    if of != settings:
        raise ConfigError(
            f"{path.name} holds the text of other settings than study {study.name!r} has now: "
            "remove it, or name another file"
        )
    return _as_text(kept)


def _as_tensors(text: Text) -> dict[str, Any]:
    return {
        "streams": {
            name: (torch.from_numpy(stream.tokens), torch.from_numpy(stream.offsets))
            for name, stream in text.streams.items()
        },
        "weights": dict(text.weights),
        "sets": {
            name: (rows.input_ids, rows.document_ids, rows.bytes_per_token)
            for name, rows in text.sets.items()
        },
    }


def _as_text(kept: Mapping[str, Any]) -> Text:
    return Text(
        {
            name: TokenizedDocuments(tokens.numpy(), offsets.numpy())
            for name, (tokens, offsets) in kept["streams"].items()
        },
        kept["weights"],
        {name: HeldOut(*rows) for name, rows in kept["sets"].items()},
    )


def run(study: Study, text: Text, directory: Path, jobs: int = 1) -> list[dict[str, Any]]:
    """Make the runs that ``directory/NAME.jsonl`` does not hold yet; returns this device's lines.

    Args:
        jobs: how many runs are made at a time, each in a process of its own with the study's
            threads. The lines do not depend on it, but for their order.

    Raises:
        kexa.lock.Busy: another process runs this study into the same directory.
        concurrent.futures.BrokenExecutor: a process was ended from outside; what has finished is
            kept.
    """
    path = directory / f"{study.name}.jsonl"
    with hold(directory, study.name):
        tuning = [
            (f"tune {trial.optimizer} {rate:g}", study.tuning_seed, trial)
            for tried in _tuning_trials(study).values()
            for rate, trial in tried.items()
        ]
        _finish(study, tuning, text, path, jobs)
        trials = _tuned(study, _tuning(study, _own_lines(path)))
        wanted = [(name, seed, trial) for seed in study.seeds for name, trial in trials.items()]
        _finish(study, wanted, text, path, jobs)
        return _own_lines(path)


def _finish(
    study: Study, wanted: Sequence[tuple[str, int, Trial]], text: Text, path: Path, jobs: int
) -> None:
    """Make and keep those of the wanted runs that are missing."""
    known = {_key(**line) for line in _own_lines(path)}
    missing = [each for each in wanted if _key(*each) not in known]
    jobs = min(jobs, len(missing))
    if jobs < 2:
        for each in missing:
            append_line(path, _line(study, text, *each))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin_job, (study, text)) as pool:
        for done in as_completed([pool.submit(_job_line, *each) for each in missing]):
            append_line(path, done.result())


def _begin_job(study: Study, text: Text) -> None:
    """What a process of :func:`_finish` keeps for all of its runs."""
    global _job
    os.environ["TQDM_DISABLE"] = "1"
    _job = study, text


def _job_line(variant: str, seed: int, trial: Trial) -> dict[str, Any]:
    return _line(*_job, variant, seed, trial)


def _line(study: Study, text: Text, variant: str, seed: int, trial: Trial) -> dict[str, Any]:
    """Make one run; returns its line."""
    config = RuntimeConfig(threads=study.threads, device="auto", tensorboard=False)
    device = runtime.setup(config, 0).device
    source = environment(configs.load(study.profile), 0)
    del source["seed"]  # every line has its own
    figures = measure(trial, text, seed, device, f"{study.name}: {variant}, seed {seed}")
    settings = {"variant": variant, "seed": seed, "trial": configs.as_dict(trial)}
    return settings | {"figures": figures, "environment": source}


def _own_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that come from a device like this one."""
    return by_device(read_lines(path)).get(_kind(device_name()), [])


def by_device(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Lines apart by where they come from: "CPU", or the name of a GPU."""
    apart: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        apart.setdefault(_kind(line["environment"]["device"]), []).append(line)
    return apart


def _kind(device: str) -> str:
    return "CPU" if device.startswith("CPU") else device


def measure(
    trial: Trial, text: Text, seed: int, device: torch.device, description: str = "train"
) -> dict[str, Any]:
    """Train one micro-model; returns its figures, ready for JSON.

    ``tokens`` and ``losses`` are the curve of held-out loss; ``final`` is its end, None where the
    training diverged, which ``diverged`` then describes.
    """
    model = new_model(trial.model, seed).to(device)
    set_numerics(model, trial.numerics)
    mixture = Mixture(text.streams, text.weights, trial.sequence_length, trial.batch_size, seed)

    def batch_at(step: int) -> dict[str, torch.Tensor]:
        return dict(zip(("input_ids", "document_ids"), mixture.batch(step), strict=True))

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]):
        weights = {"mtp_weight": 0.0, "balance_weight": trial.balance_weight}
        return model.loss(batch["input_ids"], batch["document_ids"], **weights)

    schedule = functools.partial(
        wsd, steps=trial.steps, warmup_share=trial.warmup_share, decay_share=trial.decay_share
    )
    due = {round(trial.steps * (i + 1) / trial.points) for i in range(trial.points)}
    optimizers = build_optimizers(model, trial, trial.optimizer)
    steps = fit(
        model, optimizers, batch_at, loss_fn, trial.steps, schedule,
        balance_step=trial.balance_step, description=description,
    )  # fmt: skip
    figures: dict[str, Any] = {"tokens": [], "losses": [], "skipped": 0}
    try:
        for step in steps:
            figures["skipped"] += step.skipped
            if step.step + 1 in due:
                figures["tokens"].append(step.tokens)
                figures["losses"].append(pooled(validate(model, text.sets), text.sets))
    except TrainingDiverged as error:  # a result of a rate that is too high, not a fault
        return {**figures, "final": None, "diverged": str(error)}
    return {**figures, "final": figures["losses"][-1]}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a results file; one that a kill cut short does not count."""
    data = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line and wait for the disk. Half a line that a kill left at the end is removed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def evaluate(study: Study, lines: Sequence[Mapping[str, Any]]) -> Outcome:
    """Read a study's results: losses, curves and intervals over seeds.

    Args:
        lines: of ``studies/NAME.jsonl``; those of other settings than the study's do not count.

    Raises:
        Unfinished: fewer than two seeds are finished, without diverging, with every variant.
    """
    found = {_key(**line): line for line in lines}
    tuning = _tuning(study, lines)
    trials = _tuned(study, tuning)
    seeds = [
        seed
        for seed in study.seeds
        if all(_key(variant, seed, trial) in found for variant, trial in trials.items())
    ]
    diverged = {
        variant: [s for s in seeds if math.isinf(_final(found[_key(variant, s, trial)]))]
        for variant, trial in trials.items()
    }
    diverged = {variant: lost for variant, lost in diverged.items() if lost}
    seeds = [seed for seed in seeds if not any(seed in lost for lost in diverged.values())]
    if len(seeds) < 2:
        raise Unfinished(
            f"study {study.name!r} has {len(seeds)} seeds that every variant has finished: an "
            f"interval needs two; run `kexa study {study.name}`"
        )
    rows = {
        variant: [found[_key(variant, seed, trial)] for seed in seeds]
        for variant, trial in trials.items()
    }
    losses = {variant: [_final(line) for line in row] for variant, row in rows.items()}
    curves = {
        variant: (
            np.array(row[0]["figures"]["tokens"]),
            np.array([line["figures"]["losses"] for line in row]),
        )
        for variant, row in rows.items()
    }
    base, *others = study.variants
    at_base = np.array(losses[base])
    gaps = {other: mean_interval(np.array(losses[other]) / at_base - 1) for other in others}
    reseed = math.sqrt(2) * float(at_base.std(ddof=1) / at_base.mean())
    tokens = {
        optimizer: _tokens(study, losses, optimizer)
        for optimizer in _optimizers(study)
        if optimizer != study.variants[base].optimizer
    }
    return Outcome(seeds, losses, curves, gaps, reseed, tuning, tokens, diverged)


def committed(name: str) -> tuple[Study, dict[str, Outcome]]:
    """A study and what its lines in ``studies/`` say by device, where they suffice for an interval.

    Raises:
        ConfigError: as :func:`load`.
    """
    study, outcomes = load(name), {}
    for device, lines in by_device(read_lines(RESULTS / f"{name}.jsonl")).items():
        with contextlib.suppress(Unfinished):
            outcomes[device] = evaluate(study, lines)
    return study, outcomes


def _tokens(study: Study, losses: Mapping[str, list[float]], optimizer: str) -> Interval | None:
    """The share of the base's tokens with which an optimizer reaches the base's final loss."""
    base = next(iter(study.variants))
    lengths = {
        trial.steps / study.variants[base].steps: losses[variant]
        for variant, trial in study.variants.items()
        if trial.optimizer == optimizer
    }
    shares = []
    for i, goal in enumerate(losses[base]):
        share = share_to_reach(goal, {length: each[i] for length, each in lengths.items()})
        if share is None:
            return None
        shares.append(share)
    return mean_interval(shares)


def share_to_reach(goal: float, ends: Mapping[float, float]) -> float | None:
    """Where final losses by length, linear in log length between them, first are at most ``goal``.

    Example: ``share_to_reach(2.5, {0.25: 3.0, 1.0: 2.0})`` is 0.5. The shortest length where that
    is already there, None where no length is.
    """
    before: tuple[float, float] | None = None
    for length, loss in sorted(ends.items()):
        if loss <= goal:
            if before is None:
                return length
            weight = (before[1] - goal) / (before[1] - loss)
            return math.exp((1 - weight) * math.log(before[0]) + weight * math.log(length))
        before = length, loss
    return None


def _optimizers(study: Study) -> list[str]:
    return list(dict.fromkeys(trial.optimizer for trial in study.variants.values()))


def _final(line: Mapping[str, Any]) -> float:
    final = line["figures"]["final"]
    return math.inf if final is None else final


def _tuning_trials(study: Study) -> dict[str, dict[float, Trial]]:
    """The runs that find the learning rates, by optimizer and rate; none without ``rates``."""
    return {
        optimizer: {
            rate: dataclasses.replace(study.trial, optimizer=optimizer, learning_rate=rate)
            for rate in study.rates
        }
        for optimizer in (_optimizers(study) if study.rates else ())
    }


def _tuning(study: Study, lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Final losses of the tuning runs that are finished, by optimizer and rate."""
    found = {_key(**line): line for line in lines}
    return {
        optimizer: {
            rate: _final(found[key])
            for rate, trial in tried.items()
            if (key := _key(f"tune {optimizer} {rate:g}", study.tuning_seed, trial)) in found
        }
        for optimizer, tried in _tuning_trials(study).items()
    }


def _tuned(study: Study, tuning: Mapping[str, dict[float, float]]) -> dict[str, Trial]:
    """The variants with the best learning rate of their optimizer, their own without tuning."""
    best = {optimizer: min(tried, key=tried.get) for optimizer, tried in tuning.items() if tried}
    return {
        variant: dataclasses.replace(
            trial, learning_rate=best.get(trial.optimizer, trial.learning_rate)
        )
        for variant, trial in study.variants.items()
    }


def _key(variant: str, seed: int, trial: Trial | Mapping[str, Any], **_: Any) -> str:
    """What makes two lines the same run."""
    settings = trial if isinstance(trial, Mapping) else configs.as_dict(trial)
    return json.dumps([variant, seed, settings])


def seeds_told(study: Study, outcome: Outcome) -> str:
    """How many seeds count, of how many that were planned, and why others do not."""
    planned, finished = len(study.seeds), len(outcome.seeds)
    told = f"{finished} seeds" if finished == planned else f"{finished} of {planned} seeds"
    for variant, lost in outcome.diverged.items():
        told += f", {variant} diverged with {len(lost)} more"
    return told


def report(study: Study, outcome: Outcome) -> list[str]:
    """The outcome in words."""
    base = next(iter(study.variants))
    rows = [f"{study.question} {seeds_told(study, outcome)}; nats per held-out token"]
    for optimizer, tried in outcome.tuning.items():
        each = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(tried.items()))
        rows.append(f"  final loss by learning rate, {optimizer}: {each}")
    for variant, losses in outcome.losses.items():
        gap = outcome.gaps.get(variant)
        against = f", {_percent(gap)} against {base}" if gap else ""
        rows.append(f"  {variant}: {np.mean(losses):.4f}{against}")
    rows.append(f"  two seeds of {base} differ by {outcome.reseed:.2%} (one deviation)")
    for optimizer, share in outcome.tokens.items():
        text = "not with every seed" if share is None else f"with {share} of the tokens"
        rows.append(f"  {optimizer} reaches the final loss of {base}: {text}")
    return rows


def _percent(interval: Interval) -> str:
    return f"{interval.estimate:+.3%} [{interval.low:+.3%}, {interval.high:+.3%}]"
