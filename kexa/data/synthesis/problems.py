"""Problems in six languages: an entry of reasoning-gym, worked and rendered by templates.

    draw an entry -> solve it (:mod:`kexa.data.synthesis.steps`) -> one text per language,
                     question, steps, answer; numbers and equations are the same in all

An entry is item ``i`` of ``reasoning_gym.create_dataset(family, seed=0, **FAMILIES[family])`` with
``i`` drawn from 2^31: the provenance ``reasoning-gym-0.1.25/gcd/1234`` makes it again, and two
seeds of ours share no entries, which neighbouring seeds of reasoning-gym do.

reported: synthesis is multilingual and targeted. chosen: this generator, its families and sizes.
reasoning-gym is Apache-2.0 and comes with the extra ``gym``; its ``game_of_life_halting`` and
``coin_flip`` score wrongly and are not among the families. Animals are listed as "dog × 3", since
plurals and counters differ between languages.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kexa.data.synthesis.provenance import SynthesisError, Text
from kexa.data.synthesis.steps import Problem, solve

LANGUAGES = ("en", "ko", "es", "de", "ja", "vi")
FAMILIES: dict[str, dict[str, Any]] = {  # family -> its knobs; chosen: numbers of a school book
    "basic_arithmetic": {"max_terms": 4, "max_digits": 2},
    "chain_sum": {"max_terms": 4, "max_digits": 3},
    "products": {"max_digits": 3},
    "gcd": {},
    "lcm": {},
    "prime_factorization": {},
    "fraction_simplification": {"max_value": 100, "max_factor": 20},
    "simple_equations": {"max_terms": 3, "max_value": 20},
    "simple_geometry": {},
    "leg_counting": {"min_animals": 2, "max_animals": 4},
}
ENTRIES = 2**31


def draw_problem(
    rng: np.random.Generator, families: Sequence[str] = tuple(FAMILIES)
) -> list[Text] | str:
    """One problem in all of :data:`LANGUAGES`, or why the entry drawn is left out.

    Raises:
        SynthesisError: reasoning-gym is not installed, or a family that is not in FAMILIES.
    """
    if not families or not set(families) <= FAMILIES.keys():
        raise SynthesisError(f"families={families!r}: choose from {', '.join(FAMILIES)}")
    family = families[rng.integers(len(families))]
    index, wording = int(rng.integers(ENTRIES)), int(rng.integers(2))
    problem = solve(family, dataset(family)[index])
    if isinstance(problem, str):
        return f"{family}: {problem}"
    source = f"reasoning-gym-{version('reasoning-gym')}/{family}/{index}"
    return [Text(render(problem, language, wording), language, source) for language in LANGUAGES]


def render(problem: Problem, language: str, wording: int = 0) -> str:
    """Question (in one of two wordings), steps and answer in one language."""
    phrases = _phrases()[language]
    names = phrases["animal"]
    values = dict(problem.values)
    if "animals" in values:
        values["animals"] = ", ".join(f"{names[a]} × {n}" for a, n in values["animals"].items())
    lines = [phrases["question"][problem.family][wording].format(**values), phrases["solution"]]
    if problem.family == "calculation":
        lines.append(values["expression"])
    for name, given in problem.steps:
        phrase = "{text}" if name == "equation" else phrases[name]
        if "animal" in given:
            given = given | {"animal": names[given["animal"]]}
        lines.append(phrase.format(**given))
    return "\n".join([*lines, phrases["answer"].format(answer=problem.answer)])


@functools.cache
def _phrases() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("problems.toml").read_text(encoding="utf-8"))


@functools.cache
def dataset(family: str) -> Any:
    """An endless dataset of one family; importing the library takes about two seconds."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise SynthesisError(
            "synthetic problems are drawn from reasoning-gym, which is not installed (one of its "
            "dependencies is built by a C compiler): pip install --editable '.[gym]', or take "
            "problems out of pretrain.synthetic_documents and pretrain.mixtures"
        ) from error
    return reasoning_gym.create_dataset(family, size=ENTRIES, seed=0, **FAMILIES[family])
