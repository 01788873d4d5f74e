"""The stock encoder's ids, faster: each distinct word and each distinct run of words encoded once.

A phrase hardly ever recurs, its words do. So text is cut into words, and words are put together
again only where a merge may cross the space between them:

1. BPE joins the two tokens of lowest rank first, and the merges across a space come after all
   others. Each word of a phrase is therefore merged as if it stood alone, before anything crosses.
2. A merge ``x + y`` across the space needs the last token of the word before to be the last piece
   of ``x``, and the first token of the word after to be the first piece of ``y``. Where no merge
   has these two pieces, nothing ever crosses, and cutting there changes no id.
3. What stays together are short runs of words. Words and runs are looked up in one table; what is
   new goes to the library. A table of hashes says where a merge may cross: two pairs may share an
   entry, which makes a run longer than it need be and no id different.

A vocabulary that has a merge within a word after one across a space keeps its phrases whole.

Strings of special tokens are read as ordinary text: a corpus is foreign text, and a document that
spells ``<|user|>`` must not produce the control token. ``PLACEHOLDERS`` alone are read as tokens.
"""

from __future__ import annotations

import collections
import itertools
import json
from array import array
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, normalizers

from kexa.tokenizer import bpe, joins
from kexa.tokenizer.pre_tokens import PreTokenEncoder
from kexa.tokenizer.splitter import Splitter, nfc, require_text
from kexa.tokenizer.vocabulary import BASELINE_WORDS, PHRASES, PLACEHOLDERS, WORDS

_REMEMBERED = 1 << 20  # words and runs in the table before it is started afresh


class CorpusEncoder:
    """Encodes batches of texts; what it has seen makes the next batch faster, never different.

    Raises:
        ValueError: the tokenizer does not cut text by one of the patterns of this package.
    """

    def __init__(self, tokenizer: Tokenizer):
        cuts = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
        patterns = [step.get("pattern", {}).get("Regex") for step in cuts.get("pretokenizers", [])]
        if not patterns or patterns[0] not in (WORDS, PHRASES, BASELINE_WORDS):
            raise ValueError(
                f"the tokenizer cuts text by {patterns[0] if patterns else cuts.get('type')!r}, "
                "which is none of the patterns of kexa.tokenizer; use a tokenizer trained here, or "
                "its own encode_batch"
            )
        stable = isinstance(tokenizer.normalizer, normalizers.NFC)
        self._normalise = nfc if stable else tokenizer.normalizer.normalize_str
        self._joins_words = patterns[0] == PHRASES
        self._split = Splitter(WORDS if self._joins_words else patterns[0], PLACEHOLDERS)
        self._placeholders = [tokenizer.token_to_id(token) for token in PLACEHOLDERS]
        vocab, merges = bpe.parts(tokenizer)
        self._encoder = PreTokenEncoder(vocab, merges)
        self._may_cross = joins.may_cross(vocab, merges)
        self._forget()

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens]; no special tokens are read or added.

        Raises:
            ValueError: a text is no ``str`` or holds a lone surrogate; the message has its number.
        """
        words, ends = [], []
        for i, text in enumerate(texts):
            require_text(text, f"text {i}")
            words += self._split(self._normalise(text))
            ends.append(len(words))
        if self._growing or len(self._numbers) > _REMEMBERED:
            self._forget()
        ends = np.array(ends, dtype=np.int64)
        units, unit_ends = self._units(words, ends)
        lengths = np.frombuffer(self._sizes, np.int32)[units].astype(np.int64)
        after = np.cumsum(lengths)
        begins = np.frombuffer(self._begins, np.int64)[units]
        where = np.repeat(begins - (after - lengths), lengths) + np.arange(lengths.sum())
        row = np.frombuffer(self._ids, np.int32)[where]
        after = np.concatenate([[0], after])
        return np.split(row, after[unit_ends][:-1]) if len(ends) else []

    def _units(self, words: list[str], ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the words and runs that the words make, and where each text ends in them."""
        numbers = self._number(words)
        if not self._joins_words or not len(numbers):
            return numbers, ends
        left, right = numbers[:-1], numbers[1:]
        last = np.frombuffer(self._last, np.int32)[left]
        first = np.frombuffer(self._first, np.int32)[right]
        may_cross = self._may_cross[joins.hashed(last, first)]
        joined = np.zeros(len(numbers) + 1, dtype=bool)  # [i]: word i to the word before it
        joined[1:-1] = np.frombuffer(self._core, bool)[left]
        joined[1:-1] &= np.frombuffer(self._opens, bool)[right] & may_cross
        joined[ends] = False
        starts = np.flatnonzero(~joined[:-1])
        sizes = np.diff(starts, append=len(numbers))
        units = numbers[starts]
        several = np.flatnonzero(sizes > 1)
        spans = zip(starts[several].tolist(), (starts + sizes)[several].tolist(), strict=True)
        units[several] = self._number(["".join(words[a:b]) for a, b in spans])
        return units, np.searchsorted(starts, ends)

    def _number(self, strings: list[str]) -> np.ndarray:
        """The place of each string in the table; new ones are encoded and added."""
        known, self._growing = len(self._numbers), True
        numbers = np.fromiter(map(self._numbers.__getitem__, strings), np.int64, len(strings))
        places = np.flatnonzero(numbers >= known)
        _, first = np.unique(numbers[places], return_index=True)
        new = [strings[i] for i in places[first].tolist()]
        ids, lengths = self._encoder(new)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        sides = [joins.sides(string) for string in new]
        self._core.extend([is_word for is_word, _ in sides])
        self._opens.extend([opens for _, opens in sides])
        self._first.frombytes(ids[starts].tobytes())
        self._last.frombytes(ids[ends - 1].tobytes())
        self._begins.frombytes((starts + len(self._ids)).tobytes())
        self._sizes.frombytes(lengths.astype(np.int32).tobytes())
        self._ids.frombytes(ids.tobytes())
        self._growing = False
        return numbers

    def _forget(self) -> None:
        """Start the table afresh: string -> number, and by number what is known of it."""
        self._growing = False  # True between batches: an interrupt left the table half written
        self._numbers = collections.defaultdict(itertools.count().__next__)
        self._core, self._opens = array("b"), array("b")  # a word; a word after one space
        self._first, self._last = array("i"), array("i")  # tokens
        self._begins, self._sizes, self._ids = array("q"), array("i"), array("i")
        for token, i in zip(PLACEHOLDERS, self._placeholders, strict=True):
            self._begins.append(self._numbers[token])  # one token each, so the number is the place
            self._sizes.append(1)
            for side in (self._core, self._opens):
                side.append(False)
            for ids in (self._first, self._last, self._ids):
                ids.append(i)
