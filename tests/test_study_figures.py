"""Figures of studies: what is drawn is the outcome, and the titles say what it says."""

import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kexa import study_figures
from kexa.statistics import mean_interval
from kexa.study import Outcome, load


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def outcome_of(finals, tuning, tokens) -> Outcome:
    """As :func:`kexa.study.evaluate` would give it, with two points a curve."""
    base, *others = finals
    at_base = np.array(finals[base])
    curves = {
        variant: (np.array([1e6, 2e6]), np.stack([2 * np.array(losses), losses], 1))
        for variant, losses in finals.items()
    }
    gaps = {variant: mean_interval(np.array(finals[variant]) / at_base - 1) for variant in others}
    seeds = list(range(len(at_base)))
    return Outcome(seeds, finals, curves, gaps, 0.022, tuning, tokens, {})


FINALS = {
    "bf16": [2.0, 4.0],
    "fp8": [2.0, 4.0],
    "fp8-rowwise": [2.01, 4.02],  # half a percent
    "fp8-tensorwise": [2.02, 4.12],  # 1% and 3%
}


def test_costs_show_every_seed_and_name_the_first_and_the_dearest_variant():
    figure = study_figures.costs(load("fp8"), outcome_of(FINALS, {}, {}))
    left, right = figure.axes
    low, high = (f"{100 * x:+.2f}%" for x in mean_interval([0.01, 0.03])[1:])
    title = "FP8 costs +0.00% [+0.00%, +0.00%],\n"
    title += f"FP8 tensorwise most: +2.00% [{low}, {high}];\n"
    title += f"two seeds of BF16 differ by 2.2%\n(2 of {len(load('fp8').seeds)} seeds)"
    assert left.get_title(loc="left") == title
    names = [label.get_text() for label in left.get_xticklabels()]
    against_mean = "BF16, each seed\nagainst the mean"
    assert names == ["FP8", "FP8\nrowwise", "FP8\ntensorwise", against_mean]
    labels = [line.get_label() for line in right.get_lines()[:3]]
    assert labels == ["FP8", "FP8 rowwise", "FP8 tensorwise"]
    assert right.get_title(loc="left").startswith("Along the runs, 4 of 6 intervals")
    assert right.get_lines()[0].get_xdata().tolist() == [1, 2]


def test_the_dearest_variant_is_named_once():
    finals = {**FINALS, "fp8": [2.2, 4.4]}
    left, _ = study_figures.costs(load("fp8"), outcome_of(finals, {}, {})).axes
    assert left.get_title(loc="left").startswith("FP8 costs +10.00% [+10.00%, +10.00%];\ntwo seeds")


@pytest.fixture
def muon() -> Outcome:
    tuning = {"adamw": {1e-3: 3.0, 2e-3: math.inf}, "muon": {1e-3: 3.0, 2e-3: 2.8}}
    finals = {
        "adamw": [3.0, 3.1],
        "muon": [2.7, 2.8],
        "muon, 3/4 of the tokens": [2.9, 3.0],
        "muon, 1/2 of the tokens": [3.2, 3.4],
    }
    return outcome_of(finals, tuning, {"muon": mean_interval([0.6, 0.7])})


def test_optimizers_show_rates_curves_and_lengths(muon):
    rates, curves, lengths = study_figures.optimizers(load("muon"), muon).axes
    assert rates.get_title(loc="left") == "Best learning rate:\n0.001 for AdamW, 0.002 for Muon"
    labels = [text.get_text() for text in rates.get_legend().get_texts()]
    assert labels == ["AdamW (diverged at 0.002)", "Muon"]
    assert curves.get_lines()[0].get_ydata().tolist() == pytest.approx([6.1, 3.05])
    share = mean_interval([0.6, 0.7])
    assert lengths.get_title(loc="left").endswith(f"with {share} of its tokens\n(2 of 5 seeds)")
    line = lengths.get_lines()[0]
    assert line.get_xdata().tolist() == [0.5, 0.75, 1.0]
    assert line.get_ydata()[-1] == pytest.approx(100 * muon.gaps["muon"].estimate)


def test_a_loss_that_is_not_reached_is_said_so(muon):
    unreached = dataclasses.replace(muon, tokens={"muon": None})
    *_, lengths = study_figures.optimizers(load("muon"), unreached).axes
    assert lengths.get_title(loc="left").endswith("not with every seed\n(2 of 5 seeds)")


@pytest.mark.parametrize("name", ["fp8", "muon", "muon-small-batch"])
def test_every_variant_and_optimizer_has_a_label(name):
    study = load(name)
    shown = study.variants if not study.rates else {t.optimizer for t in study.variants.values()}
    assert set(shown) <= study_figures.LABELS.keys()
