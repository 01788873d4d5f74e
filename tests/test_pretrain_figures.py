"""Figures of a pretraining run: what is drawn is what was given; titles say what it says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kexa import pretrain_figures


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def titles(figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]


def heights(ax) -> list[float]:
    return [bar.get_height() for bar in ax.patches]


WEIGHTS = {"first": {"en": 0.75, "ko": 0.25}, "last": {"en": 0.5, "recall": 0.5}}
TOKENS = {"first": 1000, "last": 400}


def test_tokens_read_are_shares_of_every_stage():
    read = pretrain_figures.tokens_read(WEIGHTS, TOKENS)
    assert read == {"en": 950, "ko": 250, "recall": 200}


def test_mixture_names_the_synthetic_share_and_the_most_repeated_category():
    held = {"en": 1900, "ko": 100, "recall": 400}
    figure = pretrain_figures.mixture(WEIGHTS, TOKENS, held, ["recall"])
    assert titles(figure) == [
        "50% of the last stage is synthetic",
        "ko is read most for its size: 2.50 passes",
    ]
    assert heights(figure.axes[1]) == [1900, 100, 400, 950, 250, 200]


def test_contexts_compare_losses_target_by_target():
    known = [0, 0, 0, 2, 2, 2, 2, 2]
    ngram = [4.0, 4.1, 4.2, 1.0, 1.1, 1.0, 1.1, 1.2]
    model = [3.0, 3.2, 3.1, 1.5, 1.7, 1.6, 1.6, 1.6]
    losses, differences = pretrain_figures.contexts(ngram, model, known).axes
    assert heights(losses) == pytest.approx([4.1, 1.08, 3.1, 1.6])
    assert heights(differences) == pytest.approx([1.0, -0.52])
    assert [label.get_text() for label in losses.get_xticklabels()] == ["0\n38%", "2\n62%"]
    title = differences.get_title(loc="left")
    assert title == "The model is better with 0 of 2 tokens known:\n38% of all targets"


def test_contexts_say_when_the_model_wins_nowhere():
    ngram, model = [1.0, 1.2, 1.0, 1.2], [2.0, 2.2, 1.4, 1.8]
    *_, differences = pretrain_figures.contexts(ngram, model, [0, 0, 3, 3]).axes
    title = differences.get_title(loc="left")
    assert (
        title == "The model is nowhere better;\nit loses most with 0 of 3 tokens known: 1.00 nats"
    )


def test_boundaries_compare_the_last_two_stages():
    after = {
        "first": {"en": 3.0, "ko": 3.0},
        "middle": {"en": 2.0, "ko": 2.0},
        "last": {"en": 1.5, "ko": 2.2},
    }
    figure = pretrain_figures.boundaries(after, {"en": 4.0, "ko": 5.0})
    assert titles(figure) == [
        "The last stage lowers bits per byte in 1 of 2 categories, most in en: by 25%"
    ]
    assert heights(figure.axes[0]) == [4.0, 5.0, 3.0, 3.0, 2.0, 2.0, 1.5, 2.2]


@pytest.mark.parametrize(("decayed", "side"), [(1.9, "below"), (2.3, "above")])
def test_branch_is_compared_with_the_run_at_equal_tokens(decayed, side):
    rates = {"whole run": (range(30), [1.0] * 30), "branch": (range(10, 20), [0.5] * 10)}
    whole = {10: 2.5, 20: 2.1, 30: 1.6}
    figure = pretrain_figures.branch(rates, whole, {10: 2.5, 20: decayed}, [0, 10, 20], 128)
    schedule, losses = titles(figure)
    assert schedule == "The branch ends after 20 of 30 steps"
    assert f"The branch ends 0.200 bits {side} the whole run" in losses.replace("\n", " ")
    assert f"the whole run ends {decayed - 1.6:.3f} bits below the branch" in losses
    assert figure.axes[1].lines[1].get_xdata().tolist() == [1280, 2560]


def test_a_branch_that_gains_nothing_is_told_as_that():
    rates = {"whole run": (range(30), [1.0] * 30), "branch": (range(10, 20), [0.5] * 10)}
    whole = {10: 2.5, 20: 2.1, 30: 2.3}
    figure = pretrain_figures.branch(rates, whole, {10: 2.5, 20: 2.1002}, [0, 10, 20], 128)
    _, losses = titles(figure)
    assert "The branch ends within 0.001 bits of the whole run" in losses.replace("\n", " ")
    assert "the whole run ends 0.200 bits above the branch" in losses


def test_expert_figures_see_one_busy_expert():
    load = np.ones((60, 2, 4))
    load[:2, 1] = [2.5, 0.5, 0.5, 0.5]  # layer 1 starts unbalanced
    first, last = titles(pretrain_figures.expert_load(load))
    assert "1.00 times its share at first, 1.00 at the end" in first
    assert "2.50 times its share at first, 1.00 at the end" in last
    (title,) = titles(pretrain_figures.violation(load))
    assert title.startswith("Maximum violation peaks at 1.50 in layer 1 near step 0\n")
    assert title.endswith("ends at 0.00, mean over layers")


def test_router_entropy_is_a_share_of_log_e():
    entropies = np.log(8) * np.array([[1.0, 0.5], [1.0, 0.7]])
    (title,) = titles(pretrain_figures.router_entropy([0, 20], entropies, 8))
    assert title == "Router entropy is 100% of log E at first and 60% at the end"


def test_fp8_counts_codes_by_power_of_two():
    codes = {"weight": [1.0, 1.5, -2.0, 448.0], "gradient": [0.0, 2**-9, 2**-6, 256.0]}
    errors = {"weight": [0.01] * 4, "gradient": [1.0, 0.3, 0.02, 0.02]}
    left, right = pretrain_figures.fp8(codes, errors).axes
    weight, gradient = (dict(zip(*line.get_data(), strict=True)) for line in left.lines[:2])
    assert {power: share for power, share in weight.items() if share} == {0: 50, 1: 25, 8: 25}
    assert {p: share for p, share in gradient.items() if share} == {-10: 25, -9: 25, -6: 25, 8: 25}
    assert left.get_title(loc="left") == (
        "50.00% of the gradient is below the\nformat's normal numbers, 25.00% becomes zero"
    )
    assert right.get_title(loc="left").startswith("At least 50.0% of every operand")
