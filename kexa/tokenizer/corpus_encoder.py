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
spells ``<|user|>`` must not produce the control token.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import re
from array import array
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from kexa.tokenizer import bpe
from kexa.tokenizer.pre_tokens import PreTokenEncoder
from kexa.tokenizer.splitter import Splitter, require_text
from kexa.tokenizer.vocabulary import BASELINE_WORDS, CONTRACTIONS, PHRASES, WORDS

_REMEMBERED = 1 << 20  # words and runs in the table before it is started afresh
_HASH_BITS = 22
_CONTRACTION = re.compile(CONTRACTIONS)
_LETTERS = pre_tokenizers.Split(Regex(r"\p{L}"), behavior="removed", invert=True)
# In byte-level strings U+0120 is the space, U+0109, U+010A, U+010D are \t, \n, \r.
_ACROSS_SPACE = re.compile("[^\u0120\u0109\u010a\u010d]\u0120")
_BEFORE_SPACE = re.compile("(?<=[^\u0120\u0109\u010a\u010d])(?=\u0120)")


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
        self._normalise = tokenizer.normalizer.normalize_str
        self._joins_words = patterns[0] == PHRASES
        self._split = Splitter(WORDS if self._joins_words else patterns[0])
        vocab, merges = bpe.parts(tokenizer)
        self._encoder = PreTokenEncoder(vocab, merges)
        self._may_cross = _may_cross(vocab, merges)
        self._forget()

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens]; no special tokens are read or added.

        Raises:
            ValueError: a text is no ``str`` or holds a lone surrogate; the message has its number.
        """
        words, ends = [], []
        for i, text in enumerate(texts):
            require_text(text, f"text {i}")
            words += self._split(text if text.isascii() else self._normalise(text))
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
        pairs = (
            np.frombuffer(self._last, np.int32)[left],
            np.frombuffer(self._first, np.int32)[right],
        )
        joined = np.zeros(len(numbers) + 1, dtype=bool)  # [i]: word i to the word before it
        joined[1:-1] = np.frombuffer(self._core, bool)[left]
        joined[1:-1] &= np.frombuffer(self._opens, bool)[right] & self._may_cross[_hash(*pairs)]
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
        for string, ids in zip(new, self._encoder(new), strict=True):
            has_letter = _has_letter(string[:2])
            self._core.append(has_letter and not _CONTRACTION.fullmatch(string))
            self._opens.append(has_letter and string[0] == " ")
            self._first.append(ids[0])
            self._last.append(ids[-1])
            self._begins.append(len(self._ids))
            self._sizes.append(len(ids))
            self._ids.extend(ids)
        self._growing = False
        return numbers

    def _forget(self) -> None:
        """Start the table afresh: string -> number, and by number what is known of it."""
        self._growing = False  # True between batches: an interrupt left the table half written
        self._numbers = collections.defaultdict(itertools.count().__next__)
        self._core, self._opens = array("b"), array("b")  # a word; a word after one space
        self._first, self._last = array("i"), array("i")  # tokens
        self._begins, self._sizes, self._ids = array("q"), array("i"), array("i")


@functools.cache
def _has_letter(text: str) -> bool:
    return bool(_LETTERS.pre_tokenize_str(text))


def _may_cross(vocab: list[str], merges: list[bpe.Merge]) -> np.ndarray:
    """Whether some merge across a space has two pieces of this hash; bool [2 ** _HASH_BITS]."""
    ids = {token: i for i, token in enumerate(vocab)}
    crosses = [bool(_ACROSS_SPACE.fullmatch(left[-1] + right[0])) for left, right in merges]
    begin = crosses.index(True) if any(crosses) else len(merges)
    if not all(crosses[begin:]):
        return np.ones(1 << _HASH_BITS, dtype=bool)
    last = [ids[_BEFORE_SPACE.split(left)[-1]] for left, _ in merges[begin:]]
    first = [ids[_BEFORE_SPACE.split(right)[0]] for _, right in merges[begin:]]
    may_cross = np.zeros(1 << _HASH_BITS, dtype=bool)
    may_cross[_hash(np.array(last, np.int64), np.array(first, np.int64))] = True
    return may_cross


def _hash(last: np.ndarray, first: np.ndarray) -> np.ndarray:
    pairs = last.astype(np.uint64) << np.uint64(32) | first.astype(np.uint64)
    return pairs * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - _HASH_BITS)
