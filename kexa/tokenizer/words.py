"""The words of a category of text: each distinct one in memory, the order of the text in a file.

Training looks at its text several times, first at words and then at what words meet. It is cut into
words once: the words get numbers in the order in which they appear, and the text is written down as
its numbers, 4 bytes a word, in a temporary file. Every later look reads that file.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kexa.tokenizer.splitter import Splitter, nfc, require_text
from kexa.tokenizer.vocabulary import PLACEHOLDERS, WORDS

END = 0  # the number of "", which stands at the end of each document
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
_CHUNK = 1 << 20  # numbers


@dataclass(frozen=True)
class Words:
    """Distinct words by number; the counts and the file leave out none."""

    strings: list[str]
    counts: np.ndarray  # int64 [words]
    order: Path  # int32 numbers, as the text has them

    def by_count(self) -> dict[str, int]:
        """How often each word occurs."""
        return dict(zip(self.strings[END + 1 :], self.counts[END + 1 :].tolist(), strict=True))

    def chunks(self) -> Iterator[np.ndarray]:
        """The numbers of the text in order, int32, a part at a time."""
        with open(self.order, "rb") as file:
            while len(chunk := np.fromfile(file, np.int32, _CHUNK)):
                yield chunk


def read_words(documents: Iterable[str], name: str, path: Path) -> Words:
    """Read documents once, in NFC, and write their order of words to ``path``.

    Raises:
        ValueError: a document is no ``str`` or holds a lone surrogate; the message has its number
            and ``name``.
    """
    numbers = collections.defaultdict(itertools.count().__next__)
    assert numbers[""] == END
    counts, split = np.zeros(1, dtype=np.int64), Splitter(WORDS)
    with open(path, "wb") as file:
        for words in _batches(documents, name, split):
            found = np.fromiter(map(numbers.__getitem__, words), np.int32, len(words))
            found.tofile(file)
            if len(numbers) > len(counts):
                counts = np.append(counts, np.zeros(2 * len(numbers) - len(counts), np.int64))
            np.add.at(counts, found, 1)
    return Words(list(numbers), counts[: len(numbers)].copy(), path)


def _batches(documents: Iterable[str], name: str, split: Callable) -> Iterator[list[str]]:
    """The words of some documents at a time, ``""`` after each document."""
    words: list[str] = []
    for i, document in enumerate(documents):
        require_text(document, f"document {i} of {name!r}")
        for part in _PLACEHOLDER.split(document):  # nothing is learned across one
            words += split(nfc(part))
            words.append("")
        if len(words) >= _CHUNK:
            yield words
            words = []
    yield words
