"""What superwords are learned from: runs of words that meet often, without ever holding phrases.

Nearly every phrase of a text is new, so counting phrases is holding the text. But a superword
joins tokens where a word starts, and is never more frequent than the last token of the word before
and the first one of the word after meet there. So

1. count, over the text, how often each such pair of tokens meets (in a table of hashes, where two
   pairs that share an entry count together: the count is never too low),
2. cut the text where a pair meets less than ``floor`` times and no earlier superword may cross,
3. count each distinct run of words that is left, and encode it once.

What is cut has no merge of count ``floor`` or more across it (:mod:`kexa.tokenizer.bpe`), and what
is encoded in parts gets the ids it has as a whole (:mod:`kexa.tokenizer.joins`). Memory follows the
number of distinct frequent runs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np

from kexa.tokenizer import bpe, joins
from kexa.tokenizer.pre_tokens import encode
from kexa.tokenizer.words import END, Words

# In byte-level strings U+0120 is the space, U+010A the line feed, U+0109 the tab and U+010D the
# carriage return.
_WORD_START = re.compile("\u0120[^\u0120\u010a\u0109\u010d]")


class Runs:
    """The runs of some texts as a vocabulary and its merges encode them; a ``bpe.Text``."""

    def __init__(self, texts: list[Words], vocab: list[str], merges: list[bpe.Merge]):
        self._vocab, self._merges = vocab, merges
        self._starts = np.array([bool(_WORD_START.match(t)) and bpe.is_text(t) for t in vocab])
        self._may_precede = np.array([":" not in t and bpe.is_text(t) for t in vocab])
        self._crossed = joins.may_cross(vocab, merges)
        self._texts = [_Ends(text, vocab, merges) for text in texts]
        self._met = np.zeros(1 << joins.HASH_BITS, dtype=np.int64)
        for text in self._texts:
            before = np.zeros(1, dtype=np.int32)
            for chunk in text.words.chunks():
                row = np.concatenate([before, chunk])
                meet, entry = text.meetings(row)
                meet &= self._may_join(text, row)
                self._met += np.bincount(entry[meet], minlength=len(self._met))
                before = row[-1:]

    def meetings(self) -> np.ndarray:
        """How often tokens meet at the start of a word, by hash; int64."""
        return self._met[self._met > 0]

    def at(self, floor: int) -> bpe.Encoded:
        """The runs of words whose tokens meet ``floor`` times or more; joined where words start."""
        counts: Counter[str] = Counter()
        for text in self._texts:
            strings = text.words.strings
            for run, count in self._counted(text, self._met >= floor).items():
                numbers = np.frombuffer(run, np.int32).tolist()
                counts["".join([strings[i] for i in numbers])] += count
        found = encode(self._vocab, self._merges, counts)
        starts_next = np.append(self._starts[found.ids[1:]], False)[: len(found.ids)]
        return replace(found, joined=found.joined & self._may_precede[found.ids] & starts_next)

    def _counted(self, text: _Ends, frequent: np.ndarray) -> Counter[bytes]:
        """How often each run of two words or more occurs, as the bytes of its numbers."""
        runs, before = Counter(), np.zeros(0, dtype=np.int32)
        for chunk in text.words.chunks():
            row = np.concatenate([before, chunk])
            meet, entry = text.meetings(row)
            meet &= self._may_join(text, row) & frequent[entry] | self._crossed[entry]
            starts = np.flatnonzero(~np.append(False, meet))
            before = row[starts[-1] :]  # the run that the next chunk may go on with
            long = np.flatnonzero(np.diff(starts) > 1)
            data = row.tobytes()
            begins, ends = starts[long] * row.itemsize, starts[long + 1] * row.itemsize
            runs.update(map(data.__getitem__, map(slice, begins.tolist(), ends.tolist())))
        assert before.tolist() == [END]
        return runs

    def _may_join(self, text: _Ends, row: np.ndarray) -> np.ndarray:
        """Between words i and i + 1: whether a superword may join the two tokens there."""
        return self._may_precede[text.last[row[:-1]]] & self._starts[text.first[row[1:]]]


class _Ends:
    """The words of one category, with what meets at their two ends."""

    def __init__(self, words: Words, vocab: list[str], merges: list[bpe.Merge]):
        self.words = words
        found = encode(vocab, merges, words.by_count())
        ends = np.flatnonzero(~found.joined)
        self.last = np.append(0, found.ids[ends])  # token; of "" it is never asked
        self.first = np.append(0, found.ids[np.append(0, ends[:-1] + 1)])
        sides = np.array([joins.sides(string) for string in words.strings])
        self._before, self._after = sides.T

    def meetings(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Between words i and i + 1: whether they are of one phrase; the entry of their tokens."""
        left, right = row[:-1], row[1:]
        return (
            self._before[left] & self._after[right],
            joins.hashed(self.last[left], self.first[right]),
        )
