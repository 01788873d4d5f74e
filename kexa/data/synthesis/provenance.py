"""A synthetic sample with where it is from, as JSON lines.

A line is one flat object: the fields of :class:`~kexa.data.document.Document` and
``generator``, ``seed``, ``source_document``. Its column ``text`` is what a card of kind ``hub``
reads, so a file of samples is a source like any other (data_cards/, ``package: samples.jsonl``,
``reader: text``, ``origin: machine``).

reported: nothing on how synthetic text is labelled. chosen: these three fields, the least that
lets a sample be made again or taken out: who made it, with which seed, of what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kexa.config import ConfigError
from kexa.data.document import Document
from kexa.record import write_atomic


class SynthesisError(ConfigError):
    """Synthetic text that cannot be made or read; the message says why and what to do."""


@dataclass(frozen=True)
class Text:
    """What a kind draws: a text, its language, and the document or problem it is made of."""

    text: str
    language: str = "en"
    source: str = ""  # empty: made of the seed alone


@dataclass(frozen=True)
class Provenance:
    """``generator`` made it, with ``seed``, of ``source``: the id of a document or problem."""

    generator: str
    seed: int
    source: str


@dataclass(frozen=True)
class Sample:
    """A synthetic document and its provenance."""

    document: Document
    provenance: Provenance


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object a line, atomically.

    Raises:
        CannotWrite: the disk is full or the directory refuses.
    """
    lines = []
    for sample in samples:
        made = sample.provenance
        row = asdict(sample.document)
        row |= {"generator": made.generator, "seed": made.seed, "source_document": made.source}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(Path(path), "".join(lines))


def read_samples(path: Path) -> Iterator[Sample]:
    """What :func:`write_samples` wrote, in order.

    Raises:
        SynthesisError: a line that is no such object; the message names it.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                names = ("generator", "seed", "source_document")
                provenance = Provenance(*(row.pop(name) for name in names))
                yield Sample(Document(**row), provenance)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise SynthesisError(
                    f"{path}, line {number} is no sample with provenance ({error}); write the file "
                    "with kexa data synthesize"
                ) from error
