"""Every planted evaluation item is found, however it is spaced; what shares less is not."""

import re

import pytest

from kexa import config
from kexa.data.decontamination import RUN_WORDS, Overlap, evaluation_items
from kexa.data.sources import SourceError
from kexa.data.words import words
from kexa.eval import items as benchmarks
from tests.data.test_filters import TEXTS


@pytest.fixture(scope="module")
def evaluation() -> dict[str, str]:
    return evaluation_items(config.load("smoke").data.evaluation)


@pytest.fixture(scope="module")
def overlap(evaluation) -> Overlap:
    return Overlap(evaluation)


CHANGES = {
    "as it is": lambda text: text,
    "upper case": str.upper,
    "lower case": str.lower,
    "one word a line": lambda text: "\n".join(text.split()),
    "wide spaces": lambda text: re.sub(r"\s+", " \t\u00a0\u3000", text),
    "no punctuation": lambda text: re.sub(r"[!-/:-@\[-^`{-~]", " ", text),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_planted_item_is_found(evaluation, overlap, change):
    assert len(evaluation) > 3000
    missed = [
        name
        for name, text in evaluation.items()
        if words(text)
        and name not in overlap.find(f"{TEXTS['en']} {CHANGES[change](text)} {TEXTS['ko']}")
    ]
    assert missed == []


def test_items_without_words_are_few(evaluation):
    assert sum(not words(text) for text in evaluation.values()) <= 0.005 * len(evaluation)


def test_text_that_plants_nothing_holds_nothing(overlap):
    assert overlap.find("\n".join(TEXTS.values())) == set()


@pytest.mark.parametrize(
    "benchmark", [benchmarks.mmlu, benchmarks.kmmlu, benchmarks.mmlu_translated]
)
def test_the_benchmarks_are_among_the_items(overlap, benchmark):
    every = benchmark(10_000).items
    assert len(every) > 200
    assert [item.id for item in every if not overlap.find(item.text())] == []


def test_programs_and_safety_prompts_are_among_the_items(overlap):
    problems = benchmarks.humaneval_problems()
    assert len(problems) == 164
    assert [p["task_id"] for p in problems if not overlap.find(p["prompt"])] == []
    harmful = [i for i in benchmarks.decline_or_help(40).items if i.id.startswith("decline")]
    assert harmful
    assert [i.id for i in harmful if not overlap.find(i.text())] == []


def test_nine_words_are_no_copy_and_a_short_item_is_compared_whole():
    text = "one two three four five six seven eight nine ten eleven twelve"
    overlap = Overlap({"long": text, "short": "What is it?", "empty": "?!"})
    assert overlap.find("x " + " ".join(text.split()[1:11])) == {"long"}
    assert overlap.find(" ".join(text.split()[: RUN_WORDS - 1]) + " x") == set()
    assert overlap.find("So WHAT\nis it") == {"short"}
    assert overlap.find("what is") == set()
    with pytest.raises(ValueError, match="n=0 words must be at least 1"):
        Overlap({}, 0)


def test_a_card_without_items_is_refused():
    with pytest.raises(SourceError, match=r"wiki-leads\.md names reader 'wiki_.*exemplars"):
        evaluation_items(["wiki-leads"])
