"""House style: one function per kind of figure. Each takes data and returns matplotlib ``Axes``.

A figure carries one finding, and the title says it. Axes have units. The baseline is drawn, and
intervals where there is chance. Colours are Okabe and Ito's, which colour-blind readers tell apart;
lines also differ in dashes and bars keep their order, so a grey print still reads. Nothing here
computes a result.

    lines          curves over steps, tokens or length, with bands and horizontal reference lines
    bars           one value per name
    dots           single values by name, beside an estimate and its interval
    grouped_bars   several series over the same groups
    heatmap        a matrix with its values written in
    histogram      distributions over one axis
    panels         a row of axes to pass as ``ax=`` when one finding needs two pictures
    thinned        tick labels that leave each other room
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
DASHES = ("-", "--", "-.", ":")
INK = "#333333"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 10,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}

Intervals = Sequence[tuple[float, float]]


def panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A row of ``count`` empty axes in house style."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, count, figsize=(width * count, height), squeeze=False, layout="constrained"
        )
    return figure, list(axes[0])


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    hlines: Mapping[str, float] | None = None,
    logx: bool = False,
    logy: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Curves: ``series[label] = (x, y)``.

    Args:
        bands: ``bands[label] = (low, high)`` over the same x as that label's curve, shaded.
        hlines: reference values by name (baseline, chance, entropy), drawn dashed grey across.
        logx, logy: logarithmic axes; that of x is ticked at the points if they are few.
    """
    with plt.rc_context(STYLE):
        ax = _axes(ax)
        for i, (label, (x, y)) in enumerate(series.items()):
            marker = "o" if len(x) <= 12 else ""
            ax.plot(
                x, y, DASHES[i % len(DASHES)], color=_colour(i), label=label,
                marker=marker, markersize=4,
            )  # fmt: skip
            if bands and label in bands:
                low, high = bands[label]
                ax.fill_between(x, low, high, color=_colour(i), alpha=0.15, linewidth=0)
        _references(ax, hlines)
        ax.set_xscale("log" if logx else "linear")
        points = sorted({float(value) for x, _ in series.values() for value in x})
        if logx and len(points) <= 8:
            ax.set_xticks(points, [f"{value:g}" for value in points])
            ax.set_xticks([], minor=True)
        ax.set_yscale("log" if logy else "linear")
        ax.grid(axis="y")
        return _finish(ax, title, xlabel, ylabel, legend=len(series) > 1)


def bars(
    values: Mapping[str, float],
    title: str,
    ylabel: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    baseline: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One bar per name, its value written on it where it has no interval.

    Args:
        intervals: ``intervals[name] = (low, high)``, drawn as error bars.
        baseline: reference values by name, drawn across: ``{"chance": 0.25}``.
    """
    with plt.rc_context(STYLE):
        ax = _axes(ax)
        heights = [float(v) for v in values.values()]
        errors = _errors(heights, [intervals[name] for name in values] if intervals else None)
        drawn = ax.bar(
            range(len(values)), heights, width=0.65, color=COLOURS[0], yerr=errors, capsize=3,
            error_kw={"ecolor": INK, "elinewidth": 1.2},
        )  # fmt: skip
        if not intervals:
            ax.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8, color=INK)
        _references(ax, baseline)
        _names(ax, list(values))
        ax.grid(axis="y")
        return _finish(ax, title, "", ylabel, legend=False)


def dots(
    values: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float, float]],
    title: str,
    ylabel: str,
    baseline: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Every value of a name as a dot, and right of them, where it has one, its interval.

    Args:
        intervals: ``intervals[name] = (estimate, low, high)``, as a
            :class:`kexa.statistics.Interval`.
        baseline: reference values by name, drawn across: ``{"no difference": 0}``.
    """
    with plt.rc_context(STYLE):
        ax = _axes(ax)
        for i, (name, each) in enumerate(values.items()):
            ax.scatter([i] * len(each), each, s=22, color=_colour(i), alpha=0.8, linewidth=0)
            if name in intervals:
                estimate, *interval = intervals[name]
                ax.errorbar(
                    [i + 0.15], [estimate], yerr=_errors([estimate], [interval]), fmt="D",
                    color=_colour(i), ecolor=INK, elinewidth=1.2, markersize=5, capsize=3,
                )  # fmt: skip
        _references(ax, baseline)
        _names(ax, list(values))
        ax.set_xlim(-0.5, len(values) - 0.4)
        ax.grid(axis="y")
        return _finish(ax, title, "", ylabel, legend=False)


def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str,
    intervals: Mapping[str, Intervals] | None = None,
    baseline: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """``series[label]`` has one value per group; ``intervals[label]`` one (low, high) each."""
    with plt.rc_context(STYLE):
        ax = _axes(ax, width=max(6.0, 1.1 * len(groups)))
        width = 0.8 / len(series)
        for i, (label, values) in enumerate(series.items()):
            at = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
            heights = [float(v) for v in values]
            errors = _errors(heights, intervals[label] if intervals else None)
            ax.bar(
                at, heights, width=width * 0.92, color=_colour(i), label=label, yerr=errors,
                capsize=2, error_kw={"ecolor": INK, "elinewidth": 1},
            )  # fmt: skip
        _references(ax, baseline)
        _names(ax, list(groups))
        ax.margins(y=0.18)  # room for the legend, one row
        ax.grid(axis="y")
        axes = _finish(ax, title, "", ylabel, legend=False)
        if len(series) > 1:
            axes.legend(loc="upper left", ncols=len(series))
        return axes


def heatmap(
    matrix: Sequence[Sequence[float]] | np.ndarray,
    title: str,
    xlabel: str,
    ylabel: str,
    xticks: Sequence[Any],
    yticks: Sequence[Any],
    unit: str,
    vmin: float | None = None,
    vmax: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A matrix ``[len(yticks), len(xticks)]``; up to 200 cells, 16 a row, carry their value."""
    matrix = np.asarray(matrix, dtype=np.float64)
    with plt.rc_context(STYLE):
        ax = _axes(ax)
        image = ax.imshow(matrix, cmap="cividis", vmin=vmin, vmax=vmax, aspect="auto")
        _names(ax, [str(t) for t in xticks])
        ax.set_yticks(range(len(yticks)), [str(t) for t in yticks])
        if matrix.size <= 200 and matrix.shape[1] <= 16:
            for (row, column), value in np.ndenumerate(matrix):
                if np.isfinite(value):
                    ink = "black" if image.norm(value) > 0.5 else "white"
                    ax.text(
                        column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=ink
                    )
        bar = ax.figure.colorbar(image, ax=ax, label=unit)
        bar.outline.set_visible(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        return _finish(ax, title, xlabel, ylabel, legend=False)


def histogram(
    series: Mapping[str, Sequence[float]],
    title: str,
    xlabel: str,
    ylabel: str = "count",
    bins: int = 30,
    ax: Axes | None = None,
) -> Axes:
    """Distributions over common bins."""
    with plt.rc_context(STYLE):
        ax = _axes(ax)
        values = {label: np.asarray(v, dtype=np.float64) for label, v in series.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=bins)
        for i, (label, v) in enumerate(values.items()):
            ax.hist(v, bins=edges, color=_colour(i), alpha=0.2, histtype="stepfilled", linewidth=0)
            ax.hist(v, bins=edges, color=_colour(i), histtype="step", linewidth=1.6, label=label)
        ax.grid(axis="y")
        return _finish(ax, title, xlabel, ylabel, legend=len(series) > 1)


def thinned(labels: Sequence[Any], most: int = 8) -> list[Any]:
    """The labels with all but every n-th blank, so that at most ``most`` are left to read."""
    every = -(-len(labels) // most)
    return [label if i % every == 0 else "" for i, label in enumerate(labels)]


def _axes(ax: Axes | None, width: float = 6.4) -> Axes:
    return ax or plt.subplots(figsize=(width, 3.8), layout="constrained")[1]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _references(ax: Axes, values: Mapping[str, float] | None) -> None:
    for name, value in (values or {}).items():
        ax.axhline(value, color="#777777", linestyle=(0, (4, 3)), linewidth=1.2, zorder=1.5)
        ax.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8, color=INK, zorder=1.9,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
        )  # fmt: skip


def _errors(heights: list[float], intervals: Intervals | None) -> np.ndarray | None:
    if intervals is None:
        return None
    low, high = np.asarray(intervals, dtype=np.float64).T
    return np.clip(np.stack([heights - low, high - heights]), 0, None)


def _names(ax: Axes, names: list[str]) -> None:
    longest = max(len(line) for name in names for line in name.split("\n"))
    crowded = longest * len(list(filter(None, names))) > 64
    ax.set_xticks(
        range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center"
    )
    ax.tick_params(axis="x", length=0)


def _finish(ax: Axes, title: str, xlabel: str, ylabel: str, legend: bool) -> Axes:
    ax.set_title(title, wrap=True)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if legend:
        ax.legend()
    return ax
