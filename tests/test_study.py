"""Studies: every one at a few steps, resumed after a kill at any byte, and read by hand."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

from kexa import study as studies
from kexa.__main__ import main
from kexa.config import ConfigError
from kexa.data import TokenizedDocuments
from kexa.lock import Busy, hold
from kexa.train.evaluation import HeldOut

NAMES = ("fp8", "muon", "muon-small-batch")


@pytest.fixture
def text() -> studies.Text:
    rng = np.random.default_rng(0)
    documents = TokenizedDocuments(
        rng.integers(2, 60, size=4000, dtype=np.int32), np.arange(0, 4001, 40)
    )
    rows = torch.randint(2, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    return studies.Text({"en": documents}, {"en": 1.0}, {"en": HeldOut(rows, rows * 0, 1.0)})


def short(name: str) -> studies.Study:
    """A check of a study, on shorter rows and with a smaller model yet."""
    study = studies.shortened(studies.load(name))
    sizes = {"vocab_size": 64, "hidden_size": 32, "head_dim": 8}
    sizes |= {"intermediate_size": 64, "moe_intermediate_size": 32}
    model = dataclasses.replace(study.trial.model, **sizes)

    def smaller(trial: studies.Trial) -> studies.Trial:
        return dataclasses.replace(trial, batch_size=4, sequence_length=32, model=model)

    variants = {name: smaller(trial) for name, trial in study.variants.items()}
    return dataclasses.replace(study, trial=smaller(study.trial), variants=variants)


@pytest.mark.parametrize("name", NAMES)
def test_every_study_runs_and_has_an_outcome(name, text, tmp_path):
    study = short(name)
    lines = studies.run(study, text, tmp_path)
    assert lines == studies.read_lines(tmp_path / f"{name}.jsonl")
    optimizers = {t.optimizer for t in study.variants.values()}
    tuning = len(study.rates) * len(optimizers)
    assert len(lines) == tuning + len(study.variants) * len(study.seeds)
    assert all(
        {"commit", "device", "threads", "versions"} <= line["environment"].keys() for line in lines
    )
    outcome = studies.evaluate(study, lines)
    assert outcome.seeds == list(study.seeds)
    assert outcome.gaps.keys() | {next(iter(study.variants))} == study.variants.keys()
    tokens, losses = outcome.curves[next(iter(study.variants))]
    assert tokens.tolist() == [4 * 4 * 32, 8 * 4 * 32] and losses.shape == (2, 2)
    assert all(len(tried) == len(study.rates) for tried in outcome.tuning.values())
    assert len(studies.report(study, outcome)) >= len(study.variants) + 2


def test_the_fp8_study_is_paired_and_has_enough_seeds_and_steps():
    study = studies.load("fp8")
    bf16, fp8 = study.variants["bf16"], study.variants["fp8"]
    assert dataclasses.replace(bf16, numerics="fp8") == fp8
    assert len(study.seeds) >= 5 and fp8.steps >= 1000


def test_optimizers_are_tuned_on_one_grid_and_a_seed_of_their_own():
    study = studies.load("muon")
    assert study.tuning_seed not in study.seeds
    assert {t.optimizer for t in study.variants.values()} == {"adamw", "muon"}
    adamw, muon = study.variants["adamw"], study.variants["muon"]
    assert dataclasses.replace(adamw, optimizer="muon") == muon


def test_a_kill_at_any_byte_costs_at_most_the_run_in_progress(text, tmp_path):
    study = short("fp8")
    studies.run(study, text, tmp_path)
    path = tmp_path / "fp8.jsonl"
    whole = path.read_bytes()
    third = sum(len(line) for line in whole.splitlines(keepends=True)[:3])
    for size in (third - 1, third, third + 57):
        path.write_bytes(whole[:size])
        studies.run(study, text, tmp_path)
        assert path.read_bytes() == whole


def test_a_finished_study_trains_nothing(text, tmp_path, monkeypatch):
    study = short("fp8")
    lines = studies.run(study, text, tmp_path)
    monkeypatch.setattr(studies, "measure", None)
    assert studies.run(study, text, tmp_path) == lines


def test_other_settings_are_other_runs(text, tmp_path):
    study = short("fp8")
    studies.run(study, text, tmp_path)
    variants = {
        name: dataclasses.replace(trial, learning_rate=1e-3)
        for name, trial in study.variants.items()
    }
    changed = dataclasses.replace(study, variants=variants)
    with pytest.raises(ValueError, match="'fp8' has 0 seeds.*kexa study fp8"):
        studies.evaluate(changed, studies.read_lines(tmp_path / "fp8.jsonl"))
    assert len(studies.run(changed, text, tmp_path)) == 16


def test_one_writer_at_a_time(text, tmp_path):
    with hold(tmp_path, "fp8"), pytest.raises(Busy, match="fp8"):
        studies.run(short("fp8"), text, tmp_path)


def test_several_jobs_make_the_same_lines(text, tmp_path):
    study = short("fp8")
    one = studies.run(study, text, tmp_path / "one")
    two = studies.run(study, text, tmp_path / "two", jobs=2)
    assert sorted(map(json.dumps, two)) == sorted(map(json.dumps, one)) and len(two) == 8


def test_kept_text_is_the_text_and_of_these_settings_only(text, tmp_path, monkeypatch):
    study = short("fp8")
    monkeypatch.setattr(studies, "read_text", lambda _: text)
    path = tmp_path / "text.pt"
    studies.kept_text(study, path)
    monkeypatch.setattr(studies, "read_text", None)
    kept = studies.kept_text(study, path)
    assert kept.weights == text.weights
    assert np.array_equal(kept.streams["en"].tokens, text.streams["en"].tokens)
    assert np.array_equal(kept.streams["en"].offsets, text.streams["en"].offsets)
    assert kept.sets["en"].input_ids.equal(text.sets["en"].input_ids)
    longer = dataclasses.replace(study.trial, sequence_length=64)
    with pytest.raises(ConfigError, match=r"text.pt holds the text of other settings"):
        studies.kept_text(dataclasses.replace(study, trial=longer), path)
    for other in (b"a picture", pickle.dumps([1, 2])):
        path.write_bytes(other)
        with pytest.raises(ConfigError, match=r"text.pt is not the text of a study"):
            studies.kept_text(study, path)


def test_lines_of_another_device_are_other_runs(text, tmp_path):
    study = short("fp8")
    lines = studies.run(study, text, tmp_path)
    path = tmp_path / "fp8.jsonl"
    path.unlink()
    for line in lines:
        line["environment"]["device"] = "A GPU"
        studies.append_line(path, line)
    again = studies.run(study, text, tmp_path)
    assert [line["figures"] for line in again] == [line["figures"] for line in lines]
    apart = studies.by_device(studies.read_lines(path))
    assert apart == {"A GPU": lines, "CPU": again}


def test_a_run_that_diverges_is_a_result(text):
    trial = dataclasses.replace(short("muon").trial, learning_rate=1e30, steps=40)
    figures = studies.measure(trial, text, 0, torch.device("cpu"))
    assert figures["final"] is None and "updates in a row" in figures["diverged"]
    json.dumps(figures, allow_nan=False)


def fabricated(study: studies.Study, finals: dict[str, list[float]], rates: dict[str, dict]):
    """Lines as a study would have written them with these final losses."""
    best = {optimizer: min(tried, key=tried.get) for optimizer, tried in rates.items()}

    def line(variant, seed, trial, final):
        figures = {"tokens": [1], "losses": [final], "final": final}
        settings = dataclasses.asdict(trial)
        return {"variant": variant, "seed": seed, "trial": settings, "figures": figures}

    lines = [
        line(
            f"tune {optimizer} {rate:g}",
            study.tuning_seed,
            dataclasses.replace(study.trial, optimizer=optimizer, learning_rate=rate),
            None if math.isinf(final) else final,
        )
        for optimizer, tried in rates.items()
        for rate, final in tried.items()
    ]
    for variant, values in finals.items():
        trial = study.variants[variant]
        rate = best.get(trial.optimizer, trial.learning_rate)
        trial = dataclasses.replace(trial, learning_rate=rate)
        lines += [
            line(variant, seed, trial, None if math.isinf(value) else value)
            for seed, value in enumerate(values)
        ]
    return json.loads(json.dumps(lines))


def fp8_against_bf16() -> studies.Study:
    """The study of FP8 without its coarser recipes."""
    study = studies.load("fp8")
    pair = {name: study.variants[name] for name in ("bf16", "fp8")}
    return dataclasses.replace(study, variants=pair)


def test_gap_and_reseed_by_hand():
    """Gaps of 1%, 2% and 3%: mean 2%, half width 4.303 * 1% / sqrt(3) with 2 degrees of freedom."""
    finals = {"bf16": [1.0, 2.0, 3.0], "fp8": [1.01, 2.04, 3.09]}
    study = fp8_against_bf16()
    outcome = studies.evaluate(study, fabricated(study, finals, {}))
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert outcome.gaps["fp8"] == pytest.approx((0.02, 0.02 - half, 0.02 + half), abs=1e-8)
    assert outcome.reseed == pytest.approx(math.sqrt(2) * 1 / 2)
    assert outcome.tokens == {}


def test_tokens_to_reach_by_hand():
    """Halfway between half and three quarters in log tokens is sqrt(3/8)."""
    study = studies.load("muon")
    grid = dict.fromkeys(study.rates, math.inf)
    rates = {"adamw": grid | {2e-3: 3.0}, "muon": grid | {8e-3: 2.9, 4e-3: 3.1}}
    finals = {
        "adamw": [3.0, 3.0],
        "muon": [2.7, 2.7],
        "muon, 3/4 of the tokens": [2.8, 2.9],
        "muon, 1/2 of the tokens": [3.2, 2.95],
    }
    outcome = studies.evaluate(study, fabricated(study, finals, rates))
    first, second = math.sqrt(3 / 8), 0.5
    assert outcome.tokens["muon"].estimate == pytest.approx((first + second) / 2)
    assert outcome.tuning["adamw"][2e-3] == 3.0 and math.isinf(outcome.tuning["adamw"][1e-3])
    finals["muon"] = finals["muon, 3/4 of the tokens"] = [3.1, 2.9]
    assert studies.evaluate(study, fabricated(study, finals, rates)).tokens["muon"] is None


def test_a_seed_with_which_a_variant_diverged_is_counted_and_left_out():
    finals = {"bf16": [1.0, math.inf, 2.0, 3.0], "fp8": [1.01, 1.0, 2.04, 3.09]}
    study = fp8_against_bf16()
    lines = fabricated(study, finals, {})
    outcome = studies.evaluate(study, lines)
    assert outcome.seeds == [0, 2, 3] and outcome.diverged == {"bf16": [1]}
    assert outcome.gaps["fp8"].estimate == pytest.approx(0.02)
    told = f"3 of {len(study.seeds)} seeds, bf16 diverged with 1 more"
    assert studies.seeds_told(study, outcome) == told
    assert told in studies.report(study, outcome)[0]
    complete = dataclasses.replace(outcome, seeds=list(study.seeds), diverged={})
    assert studies.seeds_told(study, complete) == f"{len(study.seeds)} seeds"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('bf16 = { numerics = "bf16" }', 'bf16 = { numerics = "bf61" }'), "numerics 'bf61'; use"),
        (('optimizer = "muon"', 'optimizer = "moun"'), "optimizer 'moun'; use muon or adamw"),
        (("points = 10", "points = 0"), "points=0 must lie in 1..steps=1000"),
        (("seeds = 30", "seeds = 1"), "1 seeds of 4 variants; an interval"),
    ],
)
def test_a_study_that_cannot_end_is_refused(change, message, tmp_path, monkeypatch):
    old, new = change
    whole = studies.FILE.read_text(encoding="utf-8")
    assert old in whole
    (tmp_path / "studies.toml").write_text(whole.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(studies, "FILE", tmp_path / "studies.toml")
    with pytest.raises(ConfigError, match=message):
        studies.load("fp8")


def test_an_unknown_study_is_named(capsys):
    with pytest.raises(
        ConfigError, match="no study 'fp9' in studies.toml: use fp8, muon, muon-small-batch"
    ):
        studies.load("fp9")
    assert main(["study", "fp9"]) == 2
    assert "fp9" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_committed_lines_belong_to_the_study(name):
    """Every committed result is one of the runs that the table asks for today."""
    study = studies.load(name)
    lines = studies.read_lines(studies.RESULTS / f"{name}.jsonl")
    wanted = {f"tune {o} {r:g}" for o in ("adamw", "muon") for r in study.rates}
    assert {line["variant"] for line in lines} <= wanted | study.variants.keys()
    assert all("+changes" not in line["environment"]["commit"] for line in lines)


def test_committed_results_by_device(text, tmp_path, monkeypatch):
    study = short("fp8")
    lines = studies.run(study, text, tmp_path)
    for line in lines[:4]:  # one seed: too few for an interval
        other = line | {"environment": line["environment"] | {"device": "A GPU"}}
        studies.append_line(tmp_path / "fp8.jsonl", other)
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "load", lambda name: study)
    found, outcomes = studies.committed("fp8")
    assert found == study and list(outcomes) == ["CPU"]
    assert outcomes["CPU"].losses == studies.evaluate(study, lines).losses
    assert studies.committed("muon")[1] == {}  # no such file


def test_the_repository_holds_an_answer_on_fp8():
    assert studies.committed("fp8")[1]
