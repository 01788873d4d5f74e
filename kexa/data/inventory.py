"""What the ``kexa data`` commands print, as text lines.

list        every card: kind, who wrote the text, licence, categories, and whether it is here
fetch       sources into the cache, so that later runs need no network
stats       bytes per category as measured and as the card says, what each cleaning step removes,
            and what the corpus keeps
synthesize  writes synthetic samples; how many in each language, and what was left out and why
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from kexa.config import ROOT, DataConfig
from kexa.data import cleaning, corpus, sources, synthesis
from kexa.data.sources import Card


def list_lines() -> Iterator[str]:
    """One line per card of ``data_cards/``."""
    cards = [sources.load_card(p.stem) for p in sorted((ROOT / "data_cards").glob("*.md"))]
    name = max(len(card.name) for card in cards)
    licence = max(len(card.license) for card in cards)
    yield f"{'source':{name}s} kind   origin  {'licence':{licence}s} {'here':7s} categories"
    for card in cards:
        categories = ", ".join(card.categories) or "no corpus text"
        yield (
            f"{card.name:{name}s} {card.kind:6s} {card.origin:7s} {card.license:{licence}s} "
            f"{where(card):7s} {categories}"
        )


def where(card: Card) -> str:
    """``cached`` or ``absent``, for what is downloaded; ``python``; ``stream``."""
    if card.kind == "stdlib":
        return "python"
    if card.kind == "hub":
        return "stream"
    return "cached" if sources.cache_folder(card).is_dir() else "absent"


def fetch_lines(cards: Sequence[Card]) -> Iterator[str]:
    """Fetch each source that is downloaded, with a line for each when it is there.

    Raises:
        SourceError: a source that cannot be fetched here, or whose hash is not its card's.
    """
    for card in cards:
        if card.kind in ("wheel", "deb"):
            files = sources.fetch(card)
            size = sum(path.stat().st_size for path in files)
            yield f"{card.name}: {size:,} bytes in {len(files)} files, verified"
        elif card.kind == "stdlib":
            yield f"{card.name}: comes with Python, nothing to fetch"
        else:
            yield f"{card.name}: streamed from the hub when it is read, nothing to fetch"


def stats_lines(config: DataConfig) -> Iterator[str]:
    """Measured bytes beside those of the cards; what each step removes; what the corpus keeps.

    Raises:
        SourceError: a source that cannot be fetched or read, or that has no corpus text.
    """
    cards = [sources.load_card(name) for name in config.sources]
    width = max([len("source"), *(len(card.name) for card in cards)])
    yield f"{'source':{width}s} category     measured    card says"
    for card in cards:
        measured = corpus.measure(card, config.bytes_per_category)
        for category in sorted({*measured, *card.categories}):
            yield (
                f"{card.name:{width}s} {category:8s} {measured.get(category, 0):12,d} "
                f"{card.categories.get(category, 0):12,d}"
            )
    built = corpus.load_corpus(config)
    yield "\nWhat each cleaning step did"
    yield from cleaning.effect_table(built.effects)
    yield "\nThe corpus"
    yield from corpus.intake_table(built)


def synthesize_lines(
    kind: str,
    count: int,
    seed: int,
    path: Path,
    endpoint: synthesis.Endpoint | None,
    config: DataConfig,
) -> Iterator[str]:
    """Write ``count`` samples of one kind with their provenance to ``path``, and say what they are.

    ``thinking`` is about the training side of the corpus of ``config``: its English where a rule
    thinks, all six languages where a model does.

    Raises:
        SynthesisError: see :func:`kexa.data.synthesis.samples`.
        SourceError: a source that cannot be fetched or read.
        CannotWrite: ``path`` cannot be written.
    """
    knobs = {}
    if kind == "thinking":
        train = corpus.load_corpus(config).train
        spoken = synthesis.LANGUAGES if endpoint else ("en",)
        knobs["documents"] = [document for language in spoken for document in train[language]]
    batch = synthesis.samples(kind, count, seed, endpoint, **knobs)
    synthesis.write_samples(path, batch.samples)
    languages = Counter(sample.document.language for sample in batch.samples)
    told = ", ".join(f"{language} {languages[language]:,}" for language in languages)
    yield f"{path}: {len(batch.samples):,} samples of {kind} ({told or 'none'})"
    for reason, number in sorted(batch.dropped.items()):
        yield f"left out {number:,}: {reason}"
