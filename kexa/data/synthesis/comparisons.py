"""Thinking-augmented documents that a rule can write in six languages: two countries compared.

    facts of two countries ++ a question, the two sentences that bear on it, word for word,
                              the comparison of their numbers with the difference, the answer

Every step follows from the text that stands before it, and the same item comes in all languages.

reported: thinking-augmented documents are in the mixture (after arXiv 2509.20186). chosen: the
task, the simplest whose steps a rule can prove. :func:`kexa.data.synthesis.prompted.think` is the
general form, which takes a model.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kexa.data.synthesis.facts import Country, Fact, all_countries, called, figure, render, sentence
from kexa.data.synthesis.problems import LANGUAGES
from kexa.data.synthesis.provenance import Text

Told = tuple[Country, Fact, list[Fact]]  # the fact compared, and all that is told of the country


def draw_comparison(
    rng: np.random.Generator, countries: Sequence[Country] = (), others: int = 2
) -> list[Text] | str:
    """Two countries, compared in one number, in all six languages, or why they cannot be.

    Args:
        countries: drawn from these; fewer than two: from
            :func:`~kexa.data.synthesis.facts.all_countries`.
        others: further facts that are told of each country, at most.

    Raises:
        SourceError: the World Factbook cannot be fetched.
    """
    countries = countries if len(countries) > 1 else all_countries()
    kinds = list(_phrases()["en"]["question"])
    kind = kinds[rng.integers(len(kinds))]
    told = []
    for i in rng.choice(len(countries), size=2, replace=False):
        country = countries[i]
        number = next((fact for fact in country.facts if fact.kind == kind), None)
        if number is None:
            return f"{kind} of one of the two is not known"
        rest = [fact for fact in country.facts if fact != number]
        chosen = [number, *(rest[j] for j in rng.permutation(len(rest))[:others])]
        told.append((country, number, [chosen[j] for j in rng.permutation(len(chosen))]))
    if told[0][1].number == told[1][1].number:
        return f"{kind} of both is the same"
    source = ", ".join(country.id for country, _, _ in told)
    return [Text(think(told, language), language, source) for language in LANGUAGES]


def think(told: Sequence[Told], language: str) -> str:
    """The text about two countries, and the steps that compare them."""
    phrases = _phrases()[language]
    texts = [render(country.name, facts, language) for country, _, facts in told]
    says = [
        phrases["says"].format(
            country=called(country.name, language), sentence=sentence(number, language)
        )
        for country, number, _ in told
    ]
    (winner, larger, _), (_, smaller, _) = sorted(told, key=lambda each: -each[1].number)
    compare = phrases["compare"].format(
        larger=figure(larger.number, language),
        smaller=figure(smaller.number, language),
        difference=figure(larger.number - smaller.number, language),
    )
    answer = phrases["answer"].format(country=called(winner.name, language))
    lines = [phrases["question"][larger.kind], phrases["thinking"], *says, compare, answer]
    return "\n\n".join([*texts, "\n".join(lines)])


@functools.cache
def _phrases() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("comparisons.toml").read_text(encoding="utf-8"))
