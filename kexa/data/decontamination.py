"""Decontamination: training text that repeats an evaluation item is found by shared runs of words.

    a run is 10 words in a row; an item of fewer words is one run, compared whole
    a text repeats an item when it holds one of the item's runs

Words are those of :mod:`kexa.data.words`: spacing, punctuation and case hide no copy.
chosen: 10 words (GPT-3 used 13, on longer questions). An item of two or three words costs every
text that holds them, and a run of numbers that everyone writes (the first ten primes stand in one
item) costs a few texts that copied nothing: both are accepted, and counted with the rest.

Items come from the cards that hold evaluation sets, as bare questions: what stands around them in a
prompt, and options, would have to be copied too before a short question is found.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import yaml

from kexa.data import sources
from kexa.data.sources import SourceError
from kexa.data.words import words

RUN_WORDS = 10
_QUESTION_FIELDS = ("input_question", "question", "input")


class Overlap:
    """The runs of named texts, to be looked for in other texts."""

    def __init__(self, texts: Mapping[Hashable, str], n: int = RUN_WORDS) -> None:
        """Index ``texts``, name to text, by their runs of ``n`` words.

        Raises:
            ValueError: ``n`` below 1.
        """
        if n < 1:
            raise ValueError(f"n={n} words must be at least 1")
        self._runs: dict[tuple[str, ...], set[Hashable]] = {}
        for name, text in texts.items():
            found = words(text)
            size = min(n, len(found))
            for i in range(len(found) - size + 1 if size else 0):
                self._runs.setdefault(tuple(found[i : i + size]), set()).add(name)
        self._lengths: dict[str, set[int]] = {}  # of the runs that begin with a word
        for run in self._runs:
            self._lengths.setdefault(run[0], set()).add(len(run))

    def find(self, text: str) -> set[Hashable]:
        """Names of the indexed texts that this one shares a run with."""
        found = words(text)
        names: set[Hashable] = set()
        for i, word in enumerate(found):
            for size in self._lengths.get(word, ()):
                names |= self._runs.get(tuple(found[i : i + size]), set())
        return names


def evaluation_items(names: Sequence[str]) -> dict[str, str]:
    """Name to question of every item of the evaluation sets that these cards describe.

    Raises:
        SourceError: a card that is missing, cannot be fetched or holds no evaluation items.
    """
    items = {}
    for card in map(sources.load_card, names):
        if card.reader not in ITEM_READERS:
            raise SourceError(
                f"data_cards/{card.name}.md names reader {card.reader!r}, which reads no "
                f"evaluation items; name a card with one of {', '.join(ITEM_READERS)}"
            )
        for name, text in ITEM_READERS[card.reader](sources.files(card)):
            items[f"{card.name}/{name}"] = text
    return items


class _Loader(yaml.CSafeLoader):
    """YAML whose custom tags (task code of the harness) load as None."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def exemplars(files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Few-shot samples of lm-eval task files: the question without its label and options."""
    for name in files:
        if name.endswith(".yaml") and b"samples:" in files[name]:
            config = yaml.load(files[name], Loader=_Loader).get("fewshot_config") or {}
            samples = config.get("samples")
            for i, sample in enumerate(samples if isinstance(samples, list) else ()):
                field = next((f for f in _QUESTION_FIELDS if f in sample), None)
                if field:
                    question = re.split(r"\s*\(A\)", str(sample[field]))[0]
                    yield f"{name}#{i}", question.removeprefix("질문: ")


def programming_problems(files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """HumanEval's prompts: signature and docstring."""
    for name in files:
        if name.endswith(".jsonl.gz"):
            for line in gzip.decompress(files[name]).decode("utf-8").splitlines():
                if line:
                    problem = json.loads(line)
                    yield problem["task_id"], problem["prompt"]


def safety_prompts(files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Do-Not-Answer's prompts."""
    for name in files:
        if re.search(r"/donotanswer/\w+\.jsonl$", name):
            for i, line in enumerate(files[name].decode("utf-8").splitlines()):
                if line:
                    yield f"{name}#{i}", json.loads(line)["prompt"]


ITEM_READERS: dict[str, Callable[[Mapping[str, bytes]], Iterator[tuple[str, str]]]] = {
    f.__name__: f for f in (exemplars, programming_problems, safety_prompts)
}
