"""Where ``WORDS`` cuts text, found for a whole batch at once with masks over its characters.

A regular expression walks the text and makes a string of every word. Here each rule of the pattern
is a comparison of a character with its neighbours, so that no string is made: what comes out is
where the words start. The classes of characters are the library's, asked for once per character.

Texts stand end to end in one array, with ``END`` before, between and after them: a code that no
text holds, since lone surrogates are refused.
"""

from __future__ import annotations

import functools

import numpy as np
from tokenizers import Regex, pre_tokenizers

END = 0xD800
_UNKNOWN, _LETTER, _MARK, _NUMBER, _SPACE, _BREAK, _END, _OTHER = range(8)
_CLASSES = {_LETTER: r"\p{L}", _MARK: r"\p{M}", _NUMBER: r"\p{N}", _SPACE: r"\s"}
_BLANK, _APOSTROPHE, _LONG_S = ord(" "), ord("'"), 0x17F  # the library folds the long s to s


def codes_of(text: str) -> np.ndarray:
    """The characters of a text as numbers, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def word_starts(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Where the pieces of ``WORDS`` start, and which of them are words.

    Args:
        codes: uint32 [characters], the first and the last of them ``END``.

    Returns:
        starts, int64 [pieces], each ``END`` a piece of its own; and bool [pieces], whether a word
        may follow the piece in its phrase. None where a mark follows a contraction, which makes the
        mark begin a piece: a case so rare that it is left to the library.
    """
    kind = _kinds(codes)
    letter, space, line_break = kind == _LETTER, kind == _SPACE, kind == _BREAK
    alone = (kind == _NUMBER) | (kind == _END)
    in_word = letter | _attached(kind)
    other = ~(in_word | space | line_break | alone)  # punctuation, symbols, marks on their own

    # A number: it is a piece, and what follows starts another.
    starts = alone | _before(alone)

    # Punctuation, with a blank before it: the first one of several starts a piece.
    opener = other & ~_before(other) & ~_before(codes == _BLANK)
    starts |= opener
    # A word, with one character before it that is no break, letter or number: that one starts it.
    starts |= letter & ~_before(in_word | space | opener)

    # A line break goes with the spaces, breaks or punctuation before it; punctuation takes one.
    taken = line_break & _before(other)
    starts |= line_break & (_before(taken) | ~_before(space | line_break | other))

    # Spaces in a row: the last of them goes with what follows, the others are a piece. Before a
    # line break all of them go with it, and are of one piece with an earlier break that is free.
    first, last = space & ~_before(space), space & ~_after(space)
    starts |= first
    starts |= last & ~_after(line_break | (kind == _END))
    broken = np.flatnonzero(last & _after(line_break))
    if len(broken):
        begins = np.flatnonzero(first)
        begins = begins[np.searchsorted(begins, broken, "right") - 1]
        starts[begins] = ~line_break[begins - 1] | taken[begins - 1]

    # A contraction: after a letter, an apostrophe and what follows are a piece, and no word.
    is_word = letter | (_after(letter) & ~_after(starts))
    found = np.flatnonzero((codes == _APOSTROPHE) & opener & _after(letter))
    sizes = _contractions(codes[found + 1], codes[found + 2])
    found, sizes = found[sizes > 0], sizes[sizes > 0]
    if np.any(kind[found + sizes] == _MARK):
        return None
    is_word[found] = False
    starts[found + sizes] = True
    starts = np.flatnonzero(starts)
    return starts, is_word[starts]


def _attached(kind: np.ndarray) -> np.ndarray:
    """The marks that follow a letter, with nothing but marks between."""
    attached = np.zeros(len(kind), dtype=bool)
    marks = np.flatnonzero(kind == _MARK)
    first = np.diff(marks, prepend=-1) > 1  # of marks in a row
    attached[marks] = (kind[marks[first] - 1] == _LETTER)[np.cumsum(first) - 1]
    return attached


def _contractions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The size of a contraction by the two characters after an apostrophe, 0 where it is none."""
    first, second = (np.where(c < 128, c | 32, c) for c in (first, second))
    first = np.where(first == _LONG_S, ord("s"), first)
    sizes = np.zeros(len(first), dtype=np.int64)
    for a, b in ("re", "ve", "ll"):
        sizes[(first == ord(a)) & (second == ord(b))] = 3
    sizes[np.isin(first, [ord(c) for c in "stmd"])] = 2
    return sizes


def _before(mask: np.ndarray) -> np.ndarray:
    """Whether the mask holds for the character before each."""
    return np.concatenate([[False], mask[:-1]])


def _after(mask: np.ndarray) -> np.ndarray:
    """Whether the mask holds for the character after each."""
    return np.concatenate([mask[1:], [False]])


def _kinds(codes: np.ndarray) -> np.ndarray:
    """The class of each character, uint8; those not met before are asked of the library."""
    table = _table()
    kinds = table[codes]
    if not kinds.all():
        new = "".join(map(chr, np.unique(codes[kinds == _UNKNOWN]).tolist()))
        found = dict.fromkeys(new, _OTHER)
        for kind, pattern in _CLASSES.items():
            split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
            found.update((c, kind) for c, _ in split.pre_tokenize_str(new))
        for c, kind in found.items():
            table[ord(c)] = _BREAK if c in "\r\n" else kind
        kinds = table[codes]
    return kinds


@functools.cache
def _table() -> np.ndarray:
    table = np.full(0x110000, _UNKNOWN, dtype=np.uint8)
    table[END] = _END
    return table
