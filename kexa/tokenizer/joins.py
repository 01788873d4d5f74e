"""Where words meet at a single space, and whether a merge may cross it.

``PHRASES`` leaves words together that ``WORDS`` cuts apart: two neighbours stay in one pre-token
when the first is a word and the second one space and a word. With merges across a space after all
others, BPE first merges each word as if it stood alone. A merge ``x + y`` across the space then
needs the last token of the word before to be the last piece of ``x``, and the first token of the
word after to be the first piece of ``y``.

What is known of such a pair of tokens is kept by its hash: two pairs may share an entry.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from tokenizers import Regex, pre_tokenizers

from kexa.tokenizer import bpe
from kexa.tokenizer.vocabulary import CONTRACTIONS

HASH_BITS = 22
_CONTRACTION = re.compile(CONTRACTIONS)
_LETTERS = pre_tokenizers.Split(Regex(r"\p{L}"), behavior="removed", invert=True)
# In byte-level strings U+0120 is the space, U+0109, U+010A, U+010D are \t, \n, \r.
_ACROSS_SPACE = re.compile("[^\u0120\u0109\u010a\u010d]\u0120")
_BEFORE_SPACE = re.compile("(?<=[^\u0120\u0109\u010a\u010d])(?=\u0120)")


def sides(piece: str) -> tuple[bool, bool]:
    """Of a piece cut by ``WORDS``: may a word follow in its phrase; may it follow a word in one."""
    is_word = _has_letter(piece[:2]) and not _CONTRACTION.fullmatch(piece)
    return is_word, is_word and piece[0] == " "


def hashed(last: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The entry of each pair of tokens in a table of ``2 ** HASH_BITS``; uint64."""
    pairs = last.astype(np.uint64) << np.uint64(32) | first.astype(np.uint64)
    return pairs * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - HASH_BITS)


def may_cross(vocab: list[str], merges: list[bpe.Merge]) -> np.ndarray:
    """Whether some merge across a space has two pieces of this hash; bool [2 ** HASH_BITS].

    True everywhere when a merge within a word comes after one across a space.
    """
    ids = {token: i for i, token in enumerate(vocab)}
    crosses = [bool(_ACROSS_SPACE.fullmatch(left[-1] + right[0])) for left, right in merges]
    begin = crosses.index(True) if any(crosses) else len(merges)
    if not all(crosses[begin:]):
        return np.ones(1 << HASH_BITS, dtype=bool)
    last = [ids[_BEFORE_SPACE.split(left)[-1]] for left, _ in merges[begin:]]
    first = [ids[_BEFORE_SPACE.split(right)[0]] for _, right in merges[begin:]]
    table = np.zeros(1 << HASH_BITS, dtype=bool)
    table[hashed(np.array(last, np.int64), np.array(first, np.int64))] = True
    return table


@functools.cache
def _has_letter(text: str) -> bool:
    return bool(_LETTERS.pre_tokenize_str(text))
