"""The stock encoder's ids, faster: each distinct word and each distinct run of words encoded once.

A phrase hardly ever recurs, its words do. So text is cut into words, and words are put together
again only where a merge may cross the space between them:

1. BPE joins the two tokens of lowest rank first, and the merges across a space come after all
   others. Each word of a phrase is therefore merged as if it stood alone, before anything crosses.
2. A merge ``x + y`` across the space needs the last token of the word before to be the last piece
   of ``x``, and the first token of the word after to be the first piece of ``y``. Where no merge
   has these two pieces, nothing ever crosses, and cutting there changes no id.
3. What stays together are short runs of words. Words and runs are looked up in one table; what is
   new is encoded by :mod:`kexa.tokenizer.pre_tokens`. A table of hashes says where a merge may
   cross: two pairs may share an entry, which makes a run longer than it need be and no id
   different.

No step makes an object for each word: a batch is one array of characters, cut by
:mod:`kexa.tokenizer.cuts` and looked up by :mod:`kexa.tokenizer.remembered`. Strings are made of
what is new only.

A vocabulary that has a merge within a word after one across a space keeps its phrases whole.

Strings of special tokens are read as ordinary text: a corpus is foreign text, and a document that
spells ``<|user|>`` must not produce the control token. ``PLACEHOLDERS`` alone are read as tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, normalizers

from kexa.tokenizer import bpe, cuts, joins
from kexa.tokenizer.pre_tokens import PreTokenEncoder
from kexa.tokenizer.remembered import Remembered
from kexa.tokenizer.splitter import Splitter, nfc, require_text
from kexa.tokenizer.vocabulary import BASELINE_WORDS, PHRASES, PLACEHOLDERS, WORDS

_BETWEEN = chr(cuts.END)
_PLACEHOLDER = re.compile(f"({'|'.join(map(re.escape, PLACEHOLDERS))})")


class CorpusEncoder:
    """Encodes batches of texts; what it has seen makes the next batch faster, never different.

    Two tables, of words and runs and of pieces of long words, hold a million strings each (150 MB)
    and what one batch adds.

    Raises:
        ValueError: the tokenizer does not cut text by one of the patterns of this package.
    """

    def __init__(self, tokenizer: Tokenizer):
        steps = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
        patterns = [s.get("pattern", {}).get("Regex") for s in steps.get("pretokenizers", [])]
        if not patterns or patterns[0] not in (WORDS, PHRASES, BASELINE_WORDS):
            raise ValueError(
                f"the tokenizer cuts text by {patterns[0] if patterns else steps.get('type')!r}, "
                "which is none of the patterns of kexa.tokenizer; use a tokenizer trained here, or "
                "its own encode_batch"
            )
        stable = isinstance(tokenizer.normalizer, normalizers.NFC)
        self._normalise = nfc if stable else tokenizer.normalizer.normalize_str
        self._joins_words = patterns[0] == PHRASES
        self._pattern = WORDS if self._joins_words else patterns[0]
        vocab, merges = bpe.parts(tokenizer)
        self._may_cross = joins.may_cross(vocab, merges)
        placeholders = {token: [tokenizer.token_to_id(token)] for token in PLACEHOLDERS}
        self._seen = Remembered(PreTokenEncoder(vocab, merges), {_BETWEEN: [], **placeholders})

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens]; no special tokens are read or added.

        Raises:
            ValueError: a text is no ``str`` or holds a lone surrogate; the message has its number.
        """
        ids, ends = self.encode(texts)
        return np.split(ids, ends[:-1]) if len(ends) else []

    def encode(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, int32, and where each text ends in them, int64 [texts].

        Raises:
            ValueError: a text is no ``str`` or holds a lone surrogate; the message has its number.
        """
        parts, counts = [], []
        for i, text in enumerate(texts):
            require_text(text, f"text {i}")
            found = _PLACEHOLDER.split(self._normalise(text))
            parts += found
            counts.append(len(found))
        text = _BETWEEN + "".join(part + _BETWEEN for part in parts)
        codes = cuts.codes_of(text)
        starts, is_word = self._cut(codes, parts, len(counts))
        self._seen.make_room(2 * len(starts))  # as many words, and fewer runs
        units = self._units(text, codes, starts, is_word)
        ids, sizes = self._seen.tokens(units)
        part_ends = np.cumsum(sizes)[units == 0]  # number 0 is what stands between
        return ids, part_ends[np.cumsum(counts, dtype=np.int64)]

    def _cut(
        self, codes: np.ndarray, parts: list[str], texts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the words of all parts start, and which of the pieces are words."""
        found = cuts.word_starts(codes) if self._pattern == WORDS else None
        if found is None:
            pieces = [_BETWEEN]
            for part in parts:
                pieces += [*_splitter(self._pattern)(part), _BETWEEN]
            sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
            is_word = [self._joins_words and p != _BETWEEN and joins.sides(p)[0] for p in pieces]
            found = np.cumsum(sizes) - sizes, np.array(is_word, dtype=bool)
        if len(parts) == texts:
            return found
        starts, is_word = found
        keep, begin = np.ones(len(starts), dtype=bool), 1
        for part in parts:
            if _PLACEHOLDER.fullmatch(part):
                first, end = np.searchsorted(starts, [begin, begin + len(part)])
                keep[first + 1 : end], is_word[first] = False, False
            begin += len(part) + 1
        return starts[keep], is_word[keep]

    def _units(
        self, text: str, codes: np.ndarray, starts: np.ndarray, is_word: np.ndarray
    ) -> np.ndarray:
        """Numbers of the words and runs that the words make."""
        sizes = np.diff(starts, append=len(codes))
        words = self._seen.numbers(text, codes, starts, sizes)
        if not self._joins_words:
            return words
        follow = np.flatnonzero(is_word[:-1] & is_word[1:] & (codes[starts[1:]] == ord(" "))) + 1
        first, last = self._seen.ends(words)
        joined = np.zeros(len(words), dtype=bool)  # [i]: word i to the word before it
        joined[follow] = self._may_cross[joins.hashed(last[follow - 1], first[follow])]
        begins = np.flatnonzero(~joined)
        units = words[begins]
        several = np.flatnonzero(np.diff(begins, append=len(words)) > 1)
        run_starts = starts[begins]
        run_sizes = np.diff(run_starts, append=len(codes))
        units[several] = self._seen.numbers(text, codes, run_starts[several], run_sizes[several])
        return units


@functools.cache
def _splitter(pattern: str) -> Splitter:
    return Splitter(pattern)
