"""The larger figures of notebook 04: what a pretraining run read, learned and balanced.

    mixture         stages and their shares; tokens held and tokens read
    contexts        a model against an n-gram model, by how much context the latter knows
    boundaries      bits per byte of each category where a stage ends
    fp8             codes and relative errors of the operands of one product
    branch          the schedule of a run and of a decay that leaves it, and what each reaches
    expert_load     load of every expert of three layers over training
    violation       imbalance of every layer over training
    router_entropy  how decided the routers are

Each takes numbers and returns a figure whose title says what they show. :func:`tokens_read` and
:func:`imbalance` are numbers that two of them draw.

Legend: S steps, L sparse layers, E experts, N targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike

from kexa import plot
from kexa.statistics import paired_interval

BINS = 30  # columns of a heat map over training


def mixture(
    weights: Mapping[str, Mapping[str, float]],
    tokens_of: Mapping[str, int],
    held: Mapping[str, int],
    synthetic: Sequence[str],
) -> Figure:
    """Shares of each category by stage, and tokens held beside tokens read.

    Args:
        weights, tokens_of: by stage, the share of each category and the stage's length in tokens.
        held: tokens of each category that exist.
        synthetic: which categories are made, not gathered.
    """
    last = list(tokens_of)[-1]
    made = sum(weights[last].get(name, 0) for name in synthetic)
    read = tokens_read(weights, tokens_of)
    most = max(held, key=lambda name: read.get(name, 0) / held[name])
    figure, (shares, totals) = plot.panels(2, width=6.4, height=4.6)
    plot.heatmap(
        [[100 * weights[stage].get(name, 0) for stage in tokens_of] for name in held],
        f"{made:.0%} of the {last} stage is synthetic",
        "stage and its tokens",
        "category",
        [f"{stage}\n{EngFormatter(places=1, sep='')(n)}" for stage, n in tokens_of.items()],
        list(held),
        "% of the stage's tokens",
        ax=shares,
    )
    plot.grouped_bars(
        list(held),
        {
            "in the corpus": list(held.values()),
            "read in training": [read.get(name, 0) for name in held],
        },
        f"{most} is read most for its size: {read[most] / held[most]:.2f} passes",
        "tokens",
        ax=totals,
    )
    totals.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def tokens_read(
    weights: Mapping[str, Mapping[str, float]], tokens_of: Mapping[str, int]
) -> dict[str, float]:
    """Tokens of each category that all stages read together."""
    names = dict.fromkeys(name for by_name in weights.values() for name in by_name)
    return {
        name: sum(weights[stage].get(name, 0) * n for stage, n in tokens_of.items())
        for name in names
    }


def contexts(ngram: ArrayLike, model: ArrayLike, known: ArrayLike) -> Figure:
    """Losses of single targets of an n-gram model and of a model, by ``NGram.known``.

    Args:
        ngram, model: nats of the same targets, float [N].
        known: how many tokens before each target the n-gram model knows, int [N].
    """
    ngram, model, known = np.asarray(ngram), np.asarray(model), np.asarray(known)
    classes = [k for k in np.unique(known) if (known == k).sum() > 1]
    of = {int(k): known == k for k in classes}
    gaps = {k: paired_interval(model[at], ngram[at]) for k, at in of.items()}
    won = [k for k, gap in gaps.items() if gap.low > 0]
    worst = min(gaps, key=lambda k: gaps[k].estimate)
    share = sum(of[k].mean() for k in won)
    groups = [f"{k}\n{at.mean():.0%}" for k, at in of.items()]
    label = "tokens before the target that the n-gram model knows; share of targets"
    figure, (losses, differences) = plot.panels(2, width=6.0, height=4.2)
    plot.grouped_bars(
        groups,
        {
            "n-gram of all text": [ngram[at].mean() for at in of.values()],
            "model": [model[at].mean() for at in of.values()],
        },
        f"All targets: n-gram {ngram.mean():.2f} nats, model {model.mean():.2f}",
        "nats per target",
        ax=losses,
    )
    plot.bars(
        {group: gap.estimate for group, gap in zip(groups, gaps.values(), strict=True)},
        f"The model is better with {_listed(won)} of {known.max()} tokens known:\n"
        f"{share:.0%} of all targets"
        if won
        else f"The model is nowhere better;\nit loses most with {worst} of {known.max()} tokens "
        f"known: {-gaps[worst].estimate:.2f} nats",
        "n-gram's nats - model's, 95% interval",
        intervals={group: gap[1:] for group, gap in zip(groups, gaps.values(), strict=True)},
        baseline={"equal": 0.0},
        ax=differences,
    )
    for ax in (losses, differences):
        ax.set_xlabel(label)
    return figure


def boundaries(after: Mapping[str, Mapping[str, float]], floors: Mapping[str, float]) -> Figure:
    """Bits per byte by category after each stage; ``floors`` are those of the unigram entropy."""
    before, last = list(after.values())[-2:]
    ratios = {category: last[category] / before[category] for category in floors}
    gainer = min(ratios, key=ratios.get)
    lower = sum(ratio < 1 for ratio in ratios.values())
    return plot.grouped_bars(
        list(floors),
        {"unigram entropy": list(floors.values())}
        | {f"after {stage}": [bits[c] for c in floors] for stage, bits in after.items()},
        f"The last stage lowers bits per byte in {lower} of {len(ratios)} categories, "
        f"most in {gainer}: by {1 - ratios[gainer]:.0%}",
        "bits per byte, held-out",
    ).figure


def fp8(codes: Mapping[str, ArrayLike], errors: Mapping[str, ArrayLike]) -> Figure:
    """E4M3 codes by power of two, and rounding errors.

    Args:
        codes: the values of each operand's codes, its zeros left out: from 2^-9 to 448, or 0 where
            a value was too small.
        errors: relative errors of the same values.
    """
    powers = np.arange(-10, 9)  # the first for zero
    shares = {}
    for name, values in codes.items():
        _, exponents = np.frexp(np.abs(np.asarray(values)))
        binades = np.where(np.asarray(values) == 0, powers[0], exponents - 1)
        shares[name] = [100 * float((binades == power).mean()) for power in powers]
    subnormal = {name: sum(by_power[:4]) for name, by_power in shares.items()}
    most = max(subnormal, key=subnormal.get)
    within = min((np.asarray(error) <= 2**-4).mean() for error in errors.values())
    figure, (left, right) = plot.panels(2, width=5.8)
    plot.lines(
        {name: (powers, by_power) for name, by_power in shares.items()},
        f"{subnormal[most]:.2f}% of the {most} is below the\nformat's normal numbers, "
        f"{shares[most][0]:.2f}% becomes zero",
        "power of two of the code",
        "% of the operand's values",
        ax=left,
    )
    left.axvline(-6, color="0.3", linestyle="--", linewidth=1)
    left.set_xticks([-10, -6, -3, 0, 3, 6, 8], ["zero", -6, -3, 0, 3, 6, 8])
    plot.histogram(
        {name: _thinned(np.minimum(error, 0.1)) for name, error in errors.items()},
        f"At least {within:.1%} of every operand\nis within the bound of normal numbers",
        "relative rounding error (larger ones at 0.1)",
        "values",
        ax=right,
    )
    right.axvline(2**-4, color="0.3", linestyle="--", linewidth=1)
    return figure


def branch(
    rates: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    whole: Mapping[int, float],
    branched: Mapping[int, float],
    starts: Sequence[int],
    step_tokens: int,
) -> Figure:
    """A whole run and a branch that decays early.

    Args:
        rates: steps and learning rates of either.
        whole, branched: held-out bits per byte after a number of steps. The branch has two: where
            it leaves and where it ends. The whole run has these and its own end.
        starts: the steps at which stages begin.
        step_tokens: tokens of a step.
    """
    (end, decayed), final = list(branched.items())[-1], list(whole)[-1]
    figure, (schedule, losses) = plot.panels(2, width=5.6)
    plot.lines(
        rates,
        f"The branch ends after {end} of {final} steps",
        "optimizer step",
        "learning rate",
        ax=schedule,
    )
    curves = {"whole run": whole, "branch": branched}
    plot.lines(
        {
            name: ([step * step_tokens for step in bits], list(bits.values()))
            for name, bits in curves.items()
        },
        f"The branch ends {_apart(decayed, whole[end])}\nthe whole run after equal tokens;\n"
        f"the whole run ends {_apart(whole[final], decayed)} the branch",
        "tokens",
        "held-out bits per byte, mean over categories",
        ax=losses,
    )
    losses.xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax, scale in ((schedule, 1), (losses, step_tokens)):
        for start in starts:
            ax.axvline(start * scale, color="0.7", linewidth=0.8)
    return figure


def expert_load(load: ArrayLike) -> Figure:
    """The first, the middle and the last sparse layer over training.

    Args:
        load: tokens of each expert over the mean of its layer, float [S, L, E].
    """
    load = np.asarray(load)
    shown = sorted({0, load.shape[1] // 2, load.shape[1] - 1})
    figure, axes = plot.panels(len(shown), width=4.8)
    for ax, depth in zip(axes, shown, strict=True):
        parts, steps = _parts(load[:, depth])
        first, last = (part.max(-1).mean() for part in (parts[0], parts[-1]))
        plot.heatmap(
            np.stack([part.mean(0) for part in parts], 1),
            f"Sparse layer {depth}: the busiest expert has\n"
            f"{first:.2f} times its share at first, {last:.2f} at the end",
            "optimizer step",
            "expert",
            xticks=plot.thinned(steps),
            yticks=plot.thinned(range(load.shape[-1])),
            unit="load (1 = fair share)",
            vmin=0.0,
            vmax=2.0,
            ax=ax,
        )
    return figure


def violation(load: ArrayLike) -> Figure:
    """The largest load of each layer less 1; ``load`` as in :func:`expert_load`."""
    means, steps = imbalance(load)
    depth, at = np.unravel_index(means.argmax(), means.shape)
    return plot.heatmap(
        means,
        f"Maximum violation peaks at {means.max():.2f} in layer {depth} near step {steps[at]}\n"
        f"and ends at {means[:, -1].mean():.2f}, mean over layers",
        "optimizer step",
        "sparse layer",
        xticks=plot.thinned(steps),
        yticks=plot.thinned(range(len(means))),
        unit="maximum violation (0 = equal loads)",
        vmin=0.0,
    ).figure


def imbalance(load: ArrayLike) -> tuple[np.ndarray, list[int]]:
    """What :func:`violation` draws: means over stretches of steps [L, up to BINS], their starts."""
    parts, steps = _parts(np.asarray(load).max(-1) - 1)
    return np.stack([part.mean(0) for part in parts], 1), steps


def router_entropy(steps: Sequence[int], entropies: ArrayLike, experts: int) -> Figure:
    """``entropies`` in nats [L, steps measured], drawn over that of a router without preference."""
    shares = np.asarray(entropies) / math.log(experts)
    first, last = shares[:, 0].mean(), shares[:, -1].mean()
    return plot.heatmap(
        shares,
        f"Router entropy is {first:.0%} of log E at first and {last:.0%} at the end",
        "optimizer step",
        "sparse layer",
        xticks=plot.thinned(steps),
        yticks=plot.thinned(range(len(shares))),
        unit="router entropy / log E",
    ).figure


def _parts(values: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
    """Up to ``BINS`` stretches of the first axis, and where each begins."""
    parts = np.array_split(values, min(BINS, len(values)))
    return parts, [0, *np.cumsum([len(part) for part in parts[:-1]]).tolist()]


def _thinned(values: ArrayLike, most: int = 8192) -> np.ndarray:
    """Evenly spaced values, so that operands of different size are drawn alike."""
    values = np.asarray(values)
    return values[np.linspace(0, len(values) - 1, min(most, len(values))).astype(int)]


def _apart(one: float, other: float) -> str:
    """How one number of bits stands to another, to go before the other's name."""
    if abs(one - other) < 0.0005:
        return "within 0.001 bits of"
    return f"{abs(one - other):.3f} bits {'below' if one < other else 'above'}"


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last
