"""The corpus: sources read, filtered, deduplicated, cut to size and split by document hash.

    per source:   read -> normalise -> filter (one named reason per rejection) -> drop duplicates
    per category: human sources pooled in hash order until ``bytes_per_category`` is full, then
                  mixed, then machine-written ones: they fill only what people's text leaves open
    split:        a document is held out when the last digits of its hash, read as a fraction, are
                  below ``heldout_share``

Side and order depend on the text alone: no duplicate stands on both sides, adding a source moves no
document from one side to the other, and every machine builds the same corpus. What was built is
kept as JSON lines under a key of config, cards, code and (for stdlib sources) Python version.

reported: languages en, ko, es, de, ja, vi, with STEM and code beside them. chosen: all the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from platform import python_version_tuple

from filelock import FileLock

from kexa.config import DataConfig
from kexa.data import filters, readers, sources
from kexa.data.document import Document
from kexa.data.sources import Card, SourceError
from kexa.record import write_atomic

CATEGORIES = ("en", "ko", "es", "de", "ja", "vi", "code", "stem")


@dataclass(frozen=True)
class Intake:
    """What became of one source's documents of one category."""

    source: str
    category: str
    read: int
    kept: int
    kept_bytes: int
    rejected: dict[str, int]  # filter name, "duplicate" or "over quota" -> documents


@dataclass(frozen=True)
class Corpus:
    """Documents by category, in hash order, on two disjoint sides, and how they were chosen."""

    train: dict[str, list[Document]]
    heldout: dict[str, list[Document]]
    intake: list[Intake] = field(default_factory=list)


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that ``config`` describes, from the cache when it was built before.

    Raises:
        SourceError: a source without a card, that cannot be fetched, or whose hash differs; a
            category that a card promises and of which nothing is left.
    """
    if not config.sources:
        raise SourceError("data.sources is empty; name at least one card of data_cards/")
    cards = [sources.load_card(name) for name in config.sources]
    path = sources.cache_dir() / "corpus" / f"{_key(config, cards)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            _write(path, *build(config, cards))
        data = path.read_bytes()
    head, _, body = data.partition(b"\n")
    if (
        len(head) < 64
        or head[:64].decode("latin-1") != hashlib.sha256(head[64:] + body).hexdigest()
    ):
        raise SourceError(
            f"cached corpus {path} is corrupt: it is not what was written; delete it and run again"
        )
    intake = [Intake(**i) for i in json.loads(head[64:])]
    documents = [Document(**json.loads(line)) for line in body.splitlines()]
    return split(documents, intake, config.heldout_share)


def _write(path: Path, documents: Sequence[Document], intake: Sequence[Intake]) -> None:
    """JSON lines, intake and then documents; before them the sha256 of all the rest."""
    head = json.dumps([asdict(i) for i in intake]).encode()
    body = b"".join(
        json.dumps(asdict(d), ensure_ascii=False).encode("utf-8") + b"\n" for d in documents
    )
    write_atomic(path, hashlib.sha256(head + body).hexdigest().encode() + head + b"\n" + body)


def build(config: DataConfig, cards: Sequence[Card]) -> tuple[list[Document], list[Intake]]:
    """Read, filter, deduplicate and cut. Documents come out grouped by category, in hash order."""
    seen: set[str] = set()
    filled: Counter[str] = Counter()
    kept: list[Document] = []
    intake = []
    for origin in sources.ORIGINS:
        pooled: dict[str, list[Document]] = {}
        counts: list[tuple[Card, str, int, Counter[str]]] = []
        for card in (c for c in cards if c.origin == origin):
            candidates, read, rejected = _filtered(card, seen, config.bytes_per_category)
            for category, documents in candidates.items():
                pooled.setdefault(category, []).extend(documents)
                counts.append((card, category, read[category], rejected[category]))
        for category, documents in pooled.items():
            for document in sorted(documents, key=lambda d: d.hash):
                if filled[category] >= config.bytes_per_category:
                    break
                kept.append(document)
                filled[category] += document.bytes
        for card, category, read_, rejected_ in counts:
            mine = [d for d in kept if d.source == card.name and d.category == category]
            over = read_ - sum(rejected_.values()) - len(mine)
            reasons = {**rejected_, **({"over quota": over} if over else {})}
            intake.append(
                Intake(card.name, category, read_, len(mine), sum(d.bytes for d in mine), reasons)
            )
    for category in sorted({i.category for i in intake}):
        if not filled[category]:
            raise SourceError(_nothing_left(category, intake))
    return sorted(kept, key=lambda d: (d.category, d.hash)), intake


def _nothing_left(category: str, intake: Iterable[Intake]) -> str:
    rows = [i for i in intake if i.category == category]
    told = "; ".join(f"{i.source} {i.read:,} read, {_reasons(i)}" for i in rows)
    return f"no text is left in category {category!r} ({told}); add a source that has it"


def _reasons(intake: Intake) -> str:
    if not intake.read:
        return "no documents"
    return ", ".join(f"{name} {count:,}" for name, count in sorted(intake.rejected.items()))


def split(documents: Iterable[Document], intake: list[Intake], heldout_share: float) -> Corpus:
    """Two sides by document hash; see the module header."""
    corpus = Corpus({}, {}, intake)
    for document in documents:
        heldout = int(document.hash[-13:], 16) / 16**13 < heldout_share
        for side in (corpus.train, corpus.heldout):
            side.setdefault(document.category, [])
        (corpus.heldout if heldout else corpus.train)[document.category].append(document)
    return corpus


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


def measure(card: Card, quota: int = 0) -> dict[str, int]:
    """UTF-8 bytes per category that a source gives after filters: the figures in its card.

    ``quota`` is that of :func:`read_documents`.
    """
    candidates, _, _ = _filtered(card, set(), quota)
    return {c: sum(d.bytes for d in documents) for c, documents in candidates.items()}


def _filtered(
    card: Card, seen: set[str], quota: int
) -> tuple[dict[str, list[Document]], Counter[str], dict[str, Counter[str]]]:
    """Documents of one source by category, with counts of documents read and of rejections."""
    candidates: dict[str, list[Document]] = {category: [] for category in card.categories}
    read: Counter[str] = Counter()
    rejected: dict[str, Counter[str]] = {category: Counter() for category in card.categories}
    for document in read_documents(card, quota):
        category = document.category
        read[category] += 1
        kept = candidates.setdefault(category, [])
        counts = rejected.setdefault(category, Counter())
        reason = filters.reject(document.text, category)
        if reason:
            counts[reason] += 1
            continue
        if document.hash in seen:
            counts["duplicate"] += 1
            continue
        seen.add(document.hash)
        kept.append(document)
    return candidates, read, rejected


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
    for card in cards:
        digest.update(card.digest.encode())
        if card.kind == "stdlib":
            digest.update(".".join(python_version_tuple()).encode())
    for module in ("document", "sources", "readers", "filters", "languages", "words", "corpus"):
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()[:16]
