"""Synthetic documents with provenance: one function for every kind, two kinds of generator.

    kind         offline generator                          with an endpoint
    recall       a rule (rules.py)                          -
    arithmetic   a rule (rules.py)                          -
    thinking     a rule reads a document (rules.py)         a model thinks about the document
    problems     reasoning-gym, templates in six languages  a model carries the English text
    facts        World Factbook, templates in six languages into the five other languages
    comparisons  two countries' facts, and thinking about them likewise

:func:`samples` gives texts with generator, seed and source document, :func:`documents` the texts
alone, for a mixture: a kind is a category like any other. Offline, equal seeds and knobs give equal
samples; with an endpoint the replies are kept on disk, which comes to the same.

reported: multilingual targeted synthesis, synthetic reasoning and thinking-augmented documents.
chosen: the kinds and who writes them.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kexa.data.document import Document
from kexa.data.synthesis import comparisons, facts, problems, prompted
from kexa.data.synthesis.endpoint import Endpoint
from kexa.data.synthesis.problems import LANGUAGES
from kexa.data.synthesis.provenance import (
    Provenance,
    Sample,
    SynthesisError,
    Text,
    read_samples,
    write_samples,
)
from kexa.data.synthesis.rules import (
    KEYS,
    PROBE_KEYS,
    arithmetic,
    cue,
    fact,
    passage,
    recall,
    thinking,
)

__all__ = [
    "KEYS",
    "KINDS",
    "LANGUAGES",
    "PROBE_KEYS",
    "Batch",
    "Endpoint",
    "Provenance",
    "Sample",
    "SynthesisError",
    "cue",
    "documents",
    "fact",
    "read_samples",
    "samples",
    "write_samples",
]

# A kind draws one item: its texts in a fixed order, or why what was drawn is left out.
KINDS: dict[str, Callable[..., list[Text] | str]] = {
    "recall": recall,
    "arithmetic": arithmetic,
    "thinking": thinking,
    "problems": problems.draw_problem,
    "facts": facts.draw_facts,
    "comparisons": comparisons.draw_comparison,
}
CARRIED = ("problems", "facts", "comparisons")  # in six languages: a model can carry them
FACTUAL = ("facts", "comparisons")  # take the knob ``countries``
WORKERS = 8  # requests to an endpoint at a time
PATIENCE = 1000  # draws in a row that may be left out; usually every third one is


@dataclass(frozen=True)
class Batch:
    """Samples, and how many items or replies were left out for which reason."""

    samples: list[Sample]
    dropped: Counter[str]


def documents(kind: str, count: int, seed: int, **knobs) -> list[Document]:
    """The documents of :func:`samples` of an offline generator.

    Raises:
        ValueError: see :func:`samples`.
    """
    return [sample.document for sample in samples(kind, count, seed, **knobs).samples]


def samples(kind: str, count: int, seed: int, endpoint: Endpoint | None = None, **knobs) -> Batch:
    """Synthetic texts of one kind, the same for the same seed and knobs.

    Args:
        count: texts. An item of :data:`CARRIED` is six, one per language, side by side.
            With an endpoint, what is dropped is missing from the count.
        endpoint: a model that writes what a rule or template writes otherwise.
        knobs: see :func:`~kexa.data.synthesis.rules.recall` and the other functions of KINDS.

    Raises:
        SynthesisError: an unknown kind, one that no endpoint can make, a bad knob, too little to
            draw from, a library or server that is missing.
        SourceError: the source of facts cannot be fetched.
        ValueError: knobs of ``recall`` that do not fit each other.
    """
    if kind not in KINDS:
        raise SynthesisError(
            f"unknown kind of synthetic document {kind!r}; kinds: {', '.join(KINDS)}"
        )
    dropped: Counter[str] = Counter()
    name = f"synthesis/{kind}/{seed}"
    if endpoint:
        name, generator = f"{name}/{endpoint.model}", f"endpoint/{endpoint.model}"
        texts: Iterable[Text] = _prompted(kind, count, seed, endpoint, knobs, dropped)
    else:
        generator = f"kexa/{kind}"
        items = _items(KINDS[kind], kind, seed, knobs, dropped)
        texts = itertools.islice(itertools.chain.from_iterable(items), count)
    made = []
    for i, text in enumerate(texts):
        document = Document(text.text, "synthesis", text.language, kind, f"{name}/{i}")
        made.append(Sample(document, Provenance(generator, seed, text.source)))
    return Batch(made, dropped)


def _items(
    draw: Callable, kind: str, seed: int, knobs: dict, dropped: Counter[str]
) -> Iterator[list[Text]]:
    """Items without end; what is left out is counted and drawn anew."""
    rng = np.random.default_rng([seed, len(kind), *kind.encode()])
    missed = 0
    while missed < PATIENCE:
        item = draw(rng, **knobs)
        if isinstance(item, str):
            dropped[item] += 1
            missed += 1
        else:
            yield item
            missed = 0
    raise SynthesisError(
        f"{kind}: {PATIENCE} draws in a row had to be left out ({', '.join(sorted(dropped))}); "
        "give it more to draw from"
    )


def _prompted(
    kind: str, count: int, seed: int, endpoint: Endpoint, knobs: dict, dropped: Counter[str]
) -> Iterator[Text]:
    """What a model makes of ``count`` passages, or of as many English texts as give ``count``.

    The items are those the offline generator draws from this seed; the requests run side by side.
    """
    if kind == "thinking":
        passages = _items(lambda rng, **k: [passage(rng, **k)], kind, seed, knobs, dropped)
        calls = [
            functools.partial(prompted.think, endpoint, text, seed + i)
            for i, [text] in enumerate(itertools.islice(passages, count))
        ]
    elif kind in CARRIED:
        pairs = (
            (english, language)
            for [english, *_] in _items(KINDS[kind], kind, seed, knobs, dropped)
            for language in LANGUAGES
            if language != english.language
        )
        calls = [
            functools.partial(prompted.carry, endpoint, *pair, seed)
            for pair in itertools.islice(pairs, count)
        ]
    else:
        raise SynthesisError(
            f"kind {kind!r} is written by a rule only; an endpoint can make thinking, "
            + ", ".join(CARRIED)
        )
    with ThreadPoolExecutor(WORKERS) as pool:
        for text in pool.map(lambda call: call(), calls):
            if isinstance(text, str):
                dropped[text] += 1
            else:
                yield text
