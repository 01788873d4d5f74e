"""The corpus: sources read, cleaned, cut to size and split into a training and a held-out side.

    per source:   read -> normalise
    per category: human sources in hash order, then mixed, then machine-written ones, through the
                  steps of ``data.steps`` (:mod:`kexa.data.cleaning`) until ``bytes_per_category``
                  is full: machines fill only what people's text leaves open
    split:        groups of near-duplicates by hash (:mod:`kexa.data.splits`)

What comes after a category is full is "over quota" and is not cleaned.

Side and order depend on the text alone: no text and no near-duplicate of it stands on both sides,
adding a source moves no document that resembles none of it, and every machine builds the same
corpus. What was built is kept as JSON lines under a key of config, cards, code and (for stdlib
sources) Python version.

reported: languages en, ko, es, de, ja, vi, with STEM and code beside them. chosen: all the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import python_version_tuple

from filelock import FileLock

from kexa.config import DataConfig
from kexa.data import decontamination, filters, readers, sources, splits
from kexa.data.cleaning import CARD_STEPS, Cleaner, Effect, clean
from kexa.data.document import Document
from kexa.data.sources import Card, SourceError
from kexa.record import write_atomic

CODE = (  # modules that decide what the corpus is
    *("cleaning", "corpus", "decontamination", "document", "duplicates", "filters", "languages"),
    *("personal", "readers", "sources", "splits", "words"),
)
OVER_QUOTA = "over quota"
CATEGORIES = ("en", "ko", "es", "de", "ja", "vi", "code", "stem")


@dataclass(frozen=True)
class Intake:
    """What became of one source's documents of one category."""

    source: str
    category: str
    read: int
    kept: int
    kept_bytes: int
    rejected: dict[str, int]  # cleaning step or "over quota" -> documents


@dataclass(frozen=True)
class Corpus:
    """Documents by category, in hash order, on two disjoint sides, and how they were chosen."""

    train: dict[str, list[Document]]
    heldout: dict[str, list[Document]]
    intake: list[Intake]
    effects: list[Effect]  # what each cleaning step did, by source and category


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that ``config`` describes, from the cache when it was built before.

    Raises:
        SourceError: a source without a card, that cannot be fetched, or whose hash differs; an
            unknown cleaning step; a category that a card promises and of which nothing is left.
    """
    if not config.sources:
        raise SourceError("data.sources is empty; name at least one card of data_cards/")
    cards = [sources.load_card(name) for name in config.sources]
    path = sources.cache_dir() / "corpus" / f"{_key(config, cards)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            documents, intake, effects = build(config, cards)
            sides = splits.heldout(documents, config.heldout_share)
            _write(path, documents, sides, intake, effects)
        data = path.read_bytes()
    head, _, body = data.partition(b"\n")
    if (
        len(head) < 64
        or head[:64].decode("latin-1") != hashlib.sha256(head[64:] + body).hexdigest()
    ):
        raise SourceError(
            f"cached corpus {path} is corrupt: it is not what was written; delete it and run again"
        )
    tables = json.loads(head[64:])
    intake = [Intake(**i) for i in tables["intake"]]
    effects = [Effect(**e) for e in tables["effects"]]
    corpus = Corpus({}, {}, intake, effects)
    for line in body.splitlines():
        values = json.loads(line)
        side = corpus.heldout if values.pop("heldout") else corpus.train
        for each in (corpus.train, corpus.heldout):
            each.setdefault(values["category"], [])
        side[values["category"]].append(Document(**values))
    return corpus


def _write(
    path: Path,
    documents: Sequence[Document],
    sides: Sequence[bool],
    intake: Sequence[Intake],
    effects: Sequence[Effect],
) -> None:
    """JSON lines, the tables and then documents; before them the sha256 of all the rest."""
    tables = {"intake": [asdict(i) for i in intake], "effects": [asdict(e) for e in effects]}
    head = json.dumps(tables).encode()
    body = b"".join(
        json.dumps({"heldout": side, **asdict(d)}, ensure_ascii=False).encode("utf-8") + b"\n"
        for d, side in zip(documents, sides, strict=True)
    )
    write_atomic(path, hashlib.sha256(head + body).hexdigest().encode() + head + b"\n" + body)


def build(
    config: DataConfig, cards: Sequence[Card]
) -> tuple[list[Document], list[Intake], list[Effect]]:
    """Read, clean and cut. Documents come out grouped by category, in hash order.

    Raises:
        SourceError: see :func:`load_corpus`.
    """
    cleaner = Cleaner(config.steps, decontamination.evaluation_items(config.evaluation))
    read: Counter[tuple[str, str]] = Counter()
    filled: Counter[str] = Counter()
    kept: list[Document] = []
    for origin in sources.ORIGINS:
        pooled: list[Document] = []
        for card in (c for c in cards if c.origin == origin):
            for document in read_documents(card, config.bytes_per_category):
                read[card.name, document.category] += 1
                pooled.append(document)
        for document in sorted(pooled, key=lambda d: d.hash):
            if filled[document.category] >= config.bytes_per_category:
                continue
            left = cleaner(document)
            if left is not None:
                kept.append(left)
                filled[left.category] += left.bytes
    effects = cleaner.table()
    intake = _intake(cards, read, kept, effects)
    for category in sorted({i.category for i in intake}):
        if not filled[category]:
            raise SourceError(_nothing_left(category, intake))
    return sorted(kept, key=lambda d: (d.category, d.hash)), intake, effects


def _intake(
    cards: Sequence[Card],
    read: Mapping[tuple[str, str], int],
    kept: Sequence[Document],
    effects: Sequence[Effect],
) -> list[Intake]:
    """One row per source and category, the categories included that a card promises in vain."""
    documents, sizes = Counter(), Counter()
    for document in kept:
        documents[document.source, document.category] += 1
        sizes[document.source, document.category] += document.bytes
    rows = []
    for card in sorted(cards, key=lambda c: sources.ORIGINS.index(c.origin)):
        found = [category for source, category in read if source == card.name]
        for category in dict.fromkeys([*card.categories, *found]):
            key = card.name, category
            mine = [e for e in effects if (e.source, e.category) == key]
            rejected = {e.step: e.removed for e in mine if e.removed}
            if over := read[key] - documents[key] - sum(rejected.values()):
                rejected[OVER_QUOTA] = over
            rows.append(Intake(*key, read[key], documents[key], sizes[key], rejected))
    return rows


def _nothing_left(category: str, intake: Iterable[Intake]) -> str:
    rows = [i for i in intake if i.category == category]
    told = "; ".join(f"{i.source} {i.read:,} read, {_reasons(i)}" for i in rows)
    return f"no text is left in category {category!r} ({told}); add a source that has it"


def _reasons(intake: Intake) -> str:
    if not intake.read:
        return "no documents"
    return ", ".join(f"{name} {count:,}" for name, count in sorted(intake.rejected.items()))


def intake_table(corpus: Corpus) -> list[str]:
    """What each source gave, a line per source and category, with the reasons of what was left."""
    width = max(len(i.source) for i in corpus.intake)
    lines = [f"{'source':{width}s} {'origin':8s} category    read    kept        bytes  left out"]
    for i in corpus.intake:
        card = sources.load_card(i.source)
        lines.append(
            f"{i.source:{width}s} {card.origin:8s} {i.category:8s} {i.read:7,d} {i.kept:7,d} "
            f"{i.kept_bytes:12,d}  {_reasons(i)}"
        )
    return lines


def removed_shares(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Per source and cleaning step the share of the documents looked at that the step removed."""
    removed: dict[str, Counter[str]] = {}
    looked_at: Counter[str] = Counter()
    for i in corpus.intake:
        steps = {step: n for step, n in i.rejected.items() if step != OVER_QUOTA}
        removed.setdefault(i.source, Counter()).update(steps)
        looked_at[i.source] += i.kept + sum(steps.values())
    return {
        source: {step: n / looked_at[source] for step, n in steps.items()}
        for source, steps in removed.items()
        if looked_at[source]
    }


def measure(card: Card, quota: int = 0) -> dict[str, int]:
    """UTF-8 bytes per category that a source gives after ``CARD_STEPS``: the figures in its card.

    ``quota`` is that of :func:`read_documents`.
    """
    sizes = dict.fromkeys(card.categories, 0)
    for document in clean(read_documents(card, quota), CARD_STEPS)[0]:
        sizes[document.category] = sizes.get(document.category, 0) + document.bytes
    return sizes


def read_documents(card: Card, quota: int) -> Iterator[Document]:
    """Everything a source holds, normalised and unfiltered; of a hub dataset, which may never end,
    one and a half ``quota`` bytes per category.

    Raises:
        SourceError: the source cannot be fetched or read, or its card names no reader.
    """
    for category, name, text in _raw(card, quota):
        language = "en" if category in ("code", "stem") else category
        text = filters.normalize(text)
        yield Document(text, card.name, language, category, f"{card.name}/{name}")


def _raw(card: Card, quota: int) -> Iterator[readers.Raw]:
    if card.kind == "hub":
        for category in card.categories:
            size = 0
            for i, row in enumerate(sources.rows(card, category)):
                if card.reader not in row:
                    raise SourceError(
                        f"source {card.name!r}: a row has no column {card.reader!r}; its columns "
                        f"are {', '.join(row)}: correct 'reader' in data_cards/{card.name}.md"
                    )
                text = row[card.reader] or ""  # an empty cell is an empty text, and counted so
                size += len(text.encode("utf-8", "surrogatepass"))
                yield category, f"{category}/{i}", text
                if size > 1.5 * quota:
                    break
    elif card.reader not in readers.READERS:
        raise SourceError(
            f"data_cards/{card.name}.md names reader {card.reader!r}, which reads no corpus text; "
            f"take it out of data.sources, or name one of {', '.join(readers.READERS)}"
        )
    else:
        files = sources.files(card)
        try:
            yield from readers.READERS[card.reader](files)
        except (ValueError, LookupError, TypeError, SyntaxError) as error:
            raise SourceError(
                f"source {card.name!r}: reader {card.reader!r} cannot read it ({error}); the files "
                f"are not what data_cards/{card.name}.md describes: correct the card, or take the "
                "source out of data.sources"
            ) from error


def _key(config: DataConfig, cards: Iterable[Card]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for card in [*cards, *map(sources.load_card, config.evaluation)]:
        digest.update(card.digest.encode())
        if card.kind == "stdlib":
            digest.update(".".join(python_version_tuple()).encode())
    for module in CODE:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()[:16]
