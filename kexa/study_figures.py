"""Two figures that show a study (:mod:`kexa.study`), every title from its outcome.

    costs        what each variant costs against the first one, beside what another seed does
    optimizers   learning rates tried, loss over tokens, and tokens to reach AdamW's final loss

Dots are seeds, bands and error bars 95% intervals over them. Differences are paired by seed.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from kexa import plot
from kexa.statistics import Interval, mean_band
from kexa.study import Outcome, Study, seeds_told

LABELS = {
    "adamw": "AdamW",
    "bf16": "BF16",
    "fp8": "FP8",
    "fp8-rowwise": "FP8 rowwise",
    "fp8-tensorwise": "FP8 tensorwise",
    "muon": "Muon",
}


def costs(study: Study, outcome: Outcome) -> Figure:
    """Final losses of every variant against the first, by seed; and the same along the runs."""
    base, *others = study.variants
    at_base = np.array(outcome.losses[base])
    names = {v: LABELS[v].replace(" ", "\n") for v in others}
    columns = {
        name: (100 * (np.array(outcome.losses[v]) / at_base - 1)).tolist()
        for v, name in names.items()
    }
    apart = f"{LABELS[base]}, each seed\nagainst the mean"
    first, dearest = others[0], max(others, key=lambda v: outcome.gaps[v].estimate)
    told = f"{LABELS[first]} costs {_percent(outcome.gaps[first])}"
    if dearest != first:
        told += f",\n{LABELS[dearest]} most: {_percent(outcome.gaps[dearest])}"
    figure, (left, right) = plot.panels(2, width=5.8)
    plot.dots(
        columns | {apart: (100 * (at_base / at_base.mean() - 1)).tolist()},
        {name: tuple(100 * x for x in outcome.gaps[v]) for v, name in names.items()},
        f"{told};\n"
        f"two seeds of {LABELS[base]} differ by {outcome.reseed:.1%}\n"
        f"({seeds_told(study, outcome)})",
        f"final held-out loss against {LABELS[base]}'s (%)",
        baseline={"no difference": 0},
        ax=left,
    )
    bands = {
        v: mean_band(100 * (outcome.curves[v][1] / outcome.curves[base][1] - 1)) for v in others
    }
    holds = [(np.array(low) <= 0) & (np.array(high) >= 0) for _, low, high in bands.values()]
    zero = np.concatenate(holds)
    plot.lines(
        {LABELS[v]: (outcome.curves[v][0] / 1e6, mean) for v, (mean, _, _) in bands.items()},
        f"Along the runs, {zero.sum()} of {zero.size} intervals\nhold zero",
        "tokens (millions)",
        f"held-out loss against {LABELS[base]}'s (%)",
        bands={LABELS[v]: (low, high) for v, (_, low, high) in bands.items()},
        hlines={"no difference": 0},
        ax=right,
    )
    return figure


def optimizers(study: Study, outcome: Outcome) -> Figure:
    """Two optimizers: a study whose first variant is "adamw", with "muon" at several lengths."""
    figure, (rates, curves, lengths) = plot.panels(3, width=4.8, height=3.8)
    tuned = outcome.tuning.items()
    best = [f"{min(tried, key=tried.get):g} for {LABELS[o]}" for o, tried in tuned]
    plot.lines(
        {_tried(o, tried): tuple(zip(*sorted(tried.items()), strict=True)) for o, tried in tuned},
        f"Best learning rate:\n{', '.join(best)}",
        "peak learning rate",
        "final held-out loss, nats per token",
        logx=True,
        ax=rates,
    )
    bands = {o: mean_band(outcome.curves[o][1]) for o in ("adamw", "muon")}
    plot.lines(
        {LABELS[o]: (outcome.curves[o][0] / 1e6, mean) for o, (mean, _, _) in bands.items()},
        f"With equal tokens Muon's final loss differs\nby {_percent(outcome.gaps['muon'])}",
        "tokens (millions)",
        "held-out loss, nats per token",
        bands={LABELS[o]: (low, high) for o, (_, low, high) in bands.items()},
        ax=curves,
    )
    whole = study.variants["adamw"].steps
    ends = sorted(
        (study.variants[v].steps / whole, [100 * x for x in gap])
        for v, gap in outcome.gaps.items()
        if study.variants[v].optimizer == "muon"
    )
    share = outcome.tokens["muon"]
    plot.lines(
        {"Muon": ([length for length, _ in ends], [gap for _, (gap, _, _) in ends])},
        "Muon reaches AdamW's final loss\n"
        + (f"with {share} of its tokens" if share else "not with every seed")
        + f"\n({seeds_told(study, outcome)})",
        "tokens of Muon's schedule / AdamW's",
        "final loss against AdamW's (%)",
        bands={"Muon": ([low for _, (_, low, _) in ends], [high for _, (_, _, high) in ends])},
        hlines={"AdamW": 0},
        ax=lengths,
    )
    return figure


def _tried(optimizer: str, tried: dict[float, float]) -> str:
    diverged = ", ".join(f"{rate:g}" for rate, loss in sorted(tried.items()) if math.isinf(loss))
    return LABELS[optimizer] + (f" (diverged at {diverged})" if diverged else "")


def _percent(gap: Interval) -> str:
    return f"{gap.estimate:+.2%} [{gap.low:+.2%}, {gap.high:+.2%}]"
