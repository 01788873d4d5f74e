"""Every kind of figure draws what it was given, with its title, units and reference lines."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection

from kexa import plot

FIGURES = {
    "lines": lambda: plot.lines(
        {"a": ([1, 2, 3], [3, 2, 1]), "b": ([1, 2, 3], [1, 1, 1])}, "Finding", "step", "nats",
        bands={"a": ([2, 1, 0], [4, 3, 2])}, hlines={"entropy": 2.5}, logx=True,
    ),
    "bars": lambda: plot.bars(
        {"en": 1.0, "ko": 2.0}, "Finding", "bytes/token", intervals={"en": (0, 2), "ko": (1, 3)},
        baseline={"chance": 0.5},
    ),
    "dots": lambda: plot.dots(
        {"a": [1, 2, 3], "b": [4, 6]}, {"a": (2, 1, 3.5)}, "Finding", "%",
        baseline={"no difference": 0},
    ),
    "grouped_bars": lambda: plot.grouped_bars(
        ["en", "ko"], {"a": [1, 2], "b": [2, 3]}, "Finding", "bytes/token",
        intervals={"a": [(0, 2), (1, 3)], "b": [(1, 3), (2, 4)]},
    ),
    "heatmap": lambda: plot.heatmap(
        [[0.0, 0.5], [1.0, np.nan]], "Finding", "length (tokens)", "depth (%)", [64, 128], [0, 100],
        "exact match", 0, 1,
    ),
    "histogram": lambda: plot.histogram({"a": [1, 2, 2], "b": [2, 3, 3]}, "Finding", "reward"),
}  # fmt: skip


@pytest.fixture(params=FIGURES)
def axes(request):
    yield FIGURES[request.param]()
    plt.close("all")


def test_titles_and_axes_are_set(axes):
    assert axes.get_title(loc="left") == "Finding"
    assert axes.get_ylabel()
    axes.figure.canvas.draw()


def test_lines_draws_data_bands_and_references():
    axes = FIGURES["lines"]()
    assert [list(line.get_ydata()) for line in axes.get_lines()[:2]] == [[3, 2, 1], [1, 1, 1]]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["entropy"]
    assert len(axes.collections) == 1
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    plt.close("all")


def test_bars_have_heights_and_intervals():
    axes = FIGURES["bars"]()
    assert [patch.get_height() for patch in axes.patches] == [1.0, 2.0]
    (errors,) = axes.collections
    assert [segment[:, 1].tolist() for segment in errors.get_segments()] == [[0, 2], [1, 3]]
    plt.close("all")


def test_dots_show_every_value_and_the_interval():
    axes = FIGURES["dots"]()
    errors = [c for c in axes.collections if isinstance(c, LineCollection)]
    clouds = [c for c in axes.collections if not isinstance(c, LineCollection)]
    assert [c.get_offsets()[:, 1].tolist() for c in clouds] == [[1, 2, 3], [4, 6]]
    assert [c.get_segments()[0][:, 1].tolist() for c in errors] == [[1, 3.5]]
    assert [text.get_text() for text in axes.texts] == ["no difference"]
    plt.close("all")


def test_names_of_two_lines_are_as_wide_as_the_longer_one():
    def tilt(name):
        axes = plot.bars({f"{name} {i}": i for i in range(3)}, "Finding", "nats")
        return axes.get_xticklabels()[0].get_rotation()

    assert tilt("against the mean\nof every seed") == 0
    assert tilt("against the mean of every seed") == 30
    plt.close("all")


def test_thinned_labels_keep_their_places():
    assert plot.thinned([0, 1, 2], most=3) == [0, 1, 2]
    assert plot.thinned([0, 1, 2, 3], most=3) == [0, "", 2, ""]
    assert len([label for label in plot.thinned(range(47)) if label != ""]) <= 8


def test_heatmap_writes_the_values_it_has():
    axes = FIGURES["heatmap"]()
    assert [text.get_text() for text in axes.texts] == ["0", "0.5", "1"]
    wide = plot.heatmap([[0.5] * 17], "Finding", "step", "layer", range(17), [0], "load")
    assert not wide.texts  # they would overlap
    plt.close("all")


def test_style_does_not_leak():
    before = dict(plt.rcParams)
    FIGURES["lines"]()
    plt.close("all")
    assert dict(plt.rcParams) == before


def test_series_of_a_figure_can_be_told_apart():
    axes = plot.lines({str(i): ([0, 1], [0, i]) for i in range(8)}, "t", "x", "y")
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 8
    plt.close("all")


def test_a_logarithmic_axis_is_ticked_at_its_points_if_they_are_few():
    few = [64, 128, 256, 512]
    ax = plot.lines({"a": (few, few)}, "Finding", "length", "share", logx=True)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["64", "128", "256", "512"]
    many = [2**n for n in range(12)]
    ax = plot.lines({"a": (many, many)}, "Finding", "length", "share", logx=True)
    assert len(ax.get_xticks()) < len(many)
    plt.close("all")
