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

No step makes an object for each word: a batch is one array of characters, cut by
:mod:`kexa.tokenizer.cuts` and numbered by :mod:`kexa.tokenizer.string_table`. Strings are made of
what is new only.

A vocabulary that has a merge within a word after one across a space keeps its phrases whole.

Strings of special tokens are read as ordinary text: a corpus is foreign text, and a document that
spells ``<|user|>`` must not produce the control token. ``PLACEHOLDERS`` alone are read as tokens.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from kexa.tokenizer import bpe, cuts, joins
from kexa.tokenizer.pre_tokens import PreTokenEncoder
from kexa.tokenizer.splitter import nfc, require_text
from kexa.tokenizer.string_table import StringTable, spans
from kexa.tokenizer.vocabulary import BASELINE_WORDS, PHRASES, PLACEHOLDERS, WORDS

_REMEMBERED = 1 << 20  # words and runs in the table before it is started afresh
_CHARACTERS = 16  # of each of them on average, likewise
_BETWEEN = chr(cuts.END)
_PLACEHOLDER = re.compile(f"({'|'.join(map(re.escape, PLACEHOLDERS))})")


class CorpusEncoder:
    """Encodes batches of texts; what it has seen makes the next batch faster, never different.

    The table holds at most ``_REMEMBERED`` strings (about 150 MB) and what one batch adds.

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
        self._placeholders = [tokenizer.token_to_id(token) for token in PLACEHOLDERS]
        vocab, merges = bpe.parts(tokenizer)
        self._encoder = PreTokenEncoder(vocab, merges)
        self._may_cross = joins.may_cross(vocab, merges)
        self._forget(0)

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
        room = 2 * len(starts)  # as many words, and fewer runs
        grown = self._table.characters > _REMEMBERED * _CHARACTERS
        if self._growing or grown or len(self._table) + room > self._table.room:
            self._forget(_REMEMBERED + room)
        units = self._units(text, codes, starts, is_word)
        sizes = np.frombuffer(self._sizes, np.int32)[units].astype(np.int64)
        ids = np.frombuffer(self._ids, np.int32)[
            spans(np.frombuffer(self._begins, np.int64)[units], sizes)
        ]
        part_ends = np.cumsum(sizes)[units == 0]  # number 0 is what stands between
        return ids, part_ends[np.cumsum(counts, dtype=np.int64)]

    def _cut(
        self, codes: np.ndarray, parts: list[str], texts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the words of all parts start, and which of the pieces are words."""
        found = cuts.word_starts(codes) if self._pattern == WORDS else None
        if found is None:
            split = pre_tokenizers.Split(Regex(self._pattern), behavior="isolated")
            pieces = [_BETWEEN]
            for part in parts:
                pieces += [piece for piece, _ in split.pre_tokenize_str(part)]
                pieces.append(_BETWEEN)
            sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
            is_word = [p != _BETWEEN and joins.sides(p)[0] for p in pieces]
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
        words = self._number(text, codes, starts, sizes)
        if not self._joins_words:
            return words
        left, right = words[:-1], words[1:]
        last = np.frombuffer(self._last, np.int32)[left]
        first = np.frombuffer(self._first, np.int32)[right]
        joined = np.zeros(len(words), dtype=bool)  # [i]: word i to the word before it
        joined[1:] = is_word[:-1] & is_word[1:] & (codes[starts[1:]] == ord(" "))
        joined[1:] &= self._may_cross[joins.hashed(last, first)]
        begins = np.flatnonzero(~joined)
        units = words[begins]
        several = np.flatnonzero(np.diff(begins, append=len(words)) > 1)
        run_starts = starts[begins]
        run_sizes = np.diff(run_starts, append=len(codes))
        units[several] = self._number(text, codes, run_starts[several], run_sizes[several])
        return units

    def _number(
        self, text: str, codes: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> np.ndarray:
        """The place of each string in the table; new ones are encoded and added."""
        self._growing = True
        numbers, new = self._table.number(codes, starts, sizes)
        ends = (starts[new] + sizes[new]).tolist()
        strings = [text[a:b] for a, b in zip(starts[new].tolist(), ends, strict=True)]
        self._remember(*self._encoder(strings))
        self._growing = False
        return numbers

    def _remember(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Keep the ids of the strings that the table has just numbered."""
        ends = np.cumsum(sizes)
        for column, values in (
            (self._first, ids[ends - sizes]),
            (self._last, ids[ends - 1]),
            (self._begins, ends - sizes + len(self._ids)),
            (self._sizes, sizes.astype(np.int32)),
            (self._ids, ids),
        ):
            column.frombytes(values.tobytes())

    def _forget(self, room: int) -> None:
        """Start the table afresh: string -> number, and by number what is known of it."""
        self._growing = False  # True between batches: an interrupt left the table half written
        self._first, self._last = array("i"), array("i")  # tokens
        self._begins, self._sizes, self._ids = array("q"), array("i"), array("i")
        known = [_BETWEEN, *PLACEHOLDERS]
        self._table = StringTable(room + len(known))
        sizes = np.fromiter(map(len, known), np.int64, len(known))
        self._table.number(cuts.codes_of("".join(known)), np.cumsum(sizes) - sizes, sizes)
        for ids in (self._first, self._last):
            ids.extend([0, *self._placeholders])  # never looked at: these are no words
        self._ids.extend(self._placeholders)
        self._sizes.extend([0, *(1 for _ in PLACEHOLDERS)])
        self._begins.extend([0, *range(len(PLACEHOLDERS))])
