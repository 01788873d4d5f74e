"""Kinds that a rule writes: recall, arithmetic and thinking-augmented text.

- ``recall``: facts ``key = value``, one a line, then the same lines again in another order. The
  first time a value stands it cannot be known; every later time only looking back can tell it. One
  document holds many such lookups, so supervision is dense: a tiny model learns retrieval from this
  and not from prose. ``filler`` puts sentences between facts, which stretches the distance.
- ``arithmetic``: sums, differences and products with their intermediate steps written out.
- ``thinking``: a document, then a worked reading of it: its sentences, names and numbers, and a
  question that one of its sentences answers.

reported: synthetic reasoning and thinking-augmented documents are in the mixture (the latter after
arXiv 2509.20186: document ++ thinking, plain next-token loss). chosen: the rules. In a large run
a model writes the thinking (:mod:`kexa.data.synthesis.prompted`); here every step is true of the
text because it is read off it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from kexa.data.document import Document
from kexa.data.synthesis.provenance import SynthesisError, Text

_WORDS = """
    apple bread chair cloud dance earth field glass grass green heart horse house knife light maple
    money mouse music night ocean paper peace phone piano place plant queen radio river round scale
    shape sheep shirt shore smoke snake snow song south space spoon steel stone storm sugar table
    tiger tower track train truck voice wagon watch water wheat wheel white winter wolf women world
    yard youth zebra
"""
PROBE_KEYS = tuple(_WORDS.split()[::5])  # asked for in needle probes, in no training document
KEYS = tuple(word for word in _WORDS.split() if word not in PROBE_KEYS)


def fact(key: str, value: str) -> str:
    """The surface form of one key-value pair, in documents and in needle probes alike."""
    return f"{key} = {value}"


def cue(key: str) -> str:
    """The part of :func:`fact` that asks for the value."""
    return f"{key} ="


def recall(
    rng: np.random.Generator,
    facts: int = 6,
    queries: int = 12,
    pool: int = len(KEYS),
    digits: int = 2,
    filler: Sequence[str] = (),
) -> list[Text]:
    """One recall document.

    Args:
        facts: pairs stated, with distinct keys.
        queries: lines that state one of them again.
        pool: how many of :data:`KEYS` keys are drawn from; fewer is easier.
        digits: digits of a value.
        filler: sentences, one of which goes between two facts.

    Raises:
        ValueError: more facts than keys.
    """
    if not 1 <= facts <= pool <= len(KEYS):
        raise ValueError(f"facts={facts}, pool={pool}: need 1 <= facts <= pool <= {len(KEYS)}")
    keys = [KEYS[i] for i in rng.choice(pool, size=facts, replace=False)]
    values = ["".join(map(str, row)) for row in rng.integers(0, 10, size=(facts, digits))]
    lines = []
    for key, value in zip(keys, values, strict=True):
        lines.append(fact(key, value))
        if len(filler):
            lines.append(filler[rng.integers(len(filler))])
    lines += [fact(keys[i], values[i]) for i in rng.integers(0, facts, size=queries)]
    return [Text("\n".join(lines))]


def arithmetic(rng: np.random.Generator, problems: int = 8, digits: int = 2) -> list[Text]:
    """One document of worked problems on numbers of up to ``digits`` digits, one a line."""
    lines = []
    for _ in range(problems):
        a, b = (int(n) for n in rng.integers(0, 10**digits, size=2))
        operator = "+-*"[rng.integers(3)]
        if operator == "+":
            lines.append(f"{a} + {b} = {a + b}")
        elif operator == "-":
            a, b = max(a, b), min(a, b)
            lines.append(f"{a} - {b} = {a - b}, because {b} + {a - b} = {a}")
        else:
            tens, ones = b // 10 * 10, b % 10
            steps = f"{a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = " if b > 9 else ""
            lines.append(f"{a} * {b} = {steps}{a * b}")
    return [Text("\n".join(lines))]


def passage(
    rng: np.random.Generator, documents: Sequence[Document], max_characters: int = 1200
) -> Text:
    """A document to think about, drawn at random and cut to ``max_characters``.

    Raises:
        SynthesisError: no documents.
    """
    if not documents:
        raise SynthesisError(
            "thinking needs documents to think about; pass documents=corpus.train['en']"
        )
    document = documents[rng.integers(len(documents))]
    return Text(document.text[:max_characters], document.language, document.id)


def thinking(
    rng: np.random.Generator, documents: Sequence[Document], max_characters: int = 1200
) -> list[Text]:
    """One :func:`passage` with a worked reading of it."""
    read = passage(rng, documents, max_characters)
    text = read.text
    sentences = [
        s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text) if len(s.strip()) > 20
    ] or [text]
    names = list(dict.fromkeys(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text)))[:4]
    numbers = list(dict.fromkeys(re.findall(r"\b\d+\b", text)))[:4]
    drawn = sentences[rng.integers(len(sentences))]
    start = " ".join(drawn.split()[:4])
    asked = next(i for i, s in enumerate(sentences) if " ".join(s.split()).startswith(start))
    steps = [
        f"Sentences to read: {len(sentences)}.",
        f"The first: {sentences[0]}",
        f"Names in it: {', '.join(names) or 'none'}.",
        f"Numbers in it: {', '.join(numbers) or 'none'}.",
        f'Which starts with "{start}"? Number {asked + 1}.',
        f"It says: {sentences[asked]}",
    ]
    return [Text(f"{text}\n\nThinking it through:\n" + "\n".join(steps), "en", read.source)]
