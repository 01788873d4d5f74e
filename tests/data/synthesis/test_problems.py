"""Problems from reasoning-gym: the same in six languages, right, and made again."""

import sys

import numpy as np
import pytest

from kexa.data import languages, synthesis
from kexa.data.synthesis import SynthesisError, prompted
from kexa.data.synthesis.problems import FAMILIES, LANGUAGES, dataset, draw_problem, render
from kexa.data.synthesis.steps import LEGS, SOLVERS, Problem, solve
from tests.data.synthesis.equations import assert_equations_hold


def drawn(family, count=40):
    """``count`` items of a family that were not left out."""
    rng = np.random.default_rng(0)
    items = []
    while len(items) < count:
        item = draw_problem(rng, families=[family])
        if not isinstance(item, str):
            items.append(item)
    return items


@pytest.mark.parametrize("family", FAMILIES)
def test_a_problem_is_the_same_in_six_languages(family):
    checked = 0
    for item in drawn(family):
        assert tuple(text.language for text in item) == LANGUAGES
        assert len({text.source for text in item}) == 1
        english = item[0].text
        for text in item:
            assert prompted.numbers(text.text) == prompted.numbers(english)
            if text.language in languages.SCRIPTS:
                assert languages.identify(text.text) == text.language
        [equations] = {assert_equations_hold(text.text) for text in item}
        checked += equations
    assert checked >= 40  # one a problem, at the least


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_agrees_with_the_answer(family):
    for item in drawn(family):
        index = int(item[0].source.rpartition("/")[2])
        entry = dataset(family)[index]
        answer = item[0].text.rpartition("Answer: ")[2]
        if family == "fraction_simplification":
            above, below = (
                entry["metadata"][f"simplified_{p}"] for p in ("numerator", "denominator")
            )
            assert answer == f"{above}/{below}"
        else:
            assert dataset(family).score_answer(answer, entry) == 1.0


def test_the_source_makes_the_problem_again():
    [text] = drawn("lcm", 1)[0][:1]
    library, family, index = text.source.split("/")
    assert library.startswith("reasoning-gym-") and family == "lcm"
    problem = solve(family, dataset(family)[int(index)])
    assert text.text in {render(problem, "en", wording) for wording in (0, 1)}


def test_a_problem_by_hand():
    problem = Problem("gcd", {"a": 6, "b": 3}, [("divisor", {"divisor": 3})], "3")
    assert render(problem, "en") == (
        "What is the greatest common divisor of 6 and 3?\nSolution:\n"
        "The remainder is 0, so the greatest common divisor is 3.\nAnswer: 3"
    )
    assert render(problem, "ko").startswith("다음 두 수의 최대공약수는 얼마인가? 6, 3\n")


def test_every_animal_has_a_name_in_every_language():
    problem = Problem("leg_counting", {"animals": dict.fromkeys(LEGS, 2)}, [], "0")
    for language in LANGUAGES:
        assert render(problem, language).count(" × 2") == len(LEGS)


def test_seeds_share_no_entries():
    def sources(seed):
        return {s.provenance.source for s in synthesis.samples("problems", 300, seed).samples}

    assert not sources(0) & sources(1)
    assert sources(3) == sources(3)


def test_what_is_left_out_is_counted_and_drawn_again():
    batch = synthesis.samples("problems", 60, 0, families=["simple_geometry"])
    assert len(batch.samples) == 60
    assert batch.dropped["simple_geometry: no such convex polygon"] > 0


def test_every_family_has_a_solver():
    assert FAMILIES.keys() == SOLVERS.keys()
    with pytest.raises(SynthesisError, match=r"families=\['coin_flip'\]: choose from basic_arith"):
        synthesis.documents("problems", 1, 0, families=["coin_flip"])


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SynthesisError, match="reasoning-gym, which is not installed"):
        synthesis.documents("problems", 1, 0)
