"""Strings encoded once: what was seen is looked up, what is new is encoded and added.

Strings are spans of a text, many at a time (:mod:`kexa.tokenizer.string_table`), and objects are
made of new ones only. Strings have numbers; by number, ``begins`` and ``sizes`` say where in one
row of tokens theirs are. When the table is full, it is started afresh.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

import numpy as np

from kexa.tokenizer.cuts import codes_of
from kexa.tokenizer.string_table import StringTable, spans

STRINGS = 1 << 20  # in the table before it is started afresh: about 150 MB
CHARACTERS = 16  # of each of them on average, likewise

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class Remembered:
    """Numbers and tokens of strings.

    Args:
        encode: strings -> their tokens end to end, int32, and how many each has, int64.
        known: tokens of strings that ``encode`` is not asked for, numbered from 0 in this order.
    """

    def __init__(self, encode: Encode, known: Mapping[str, list[int]]):
        self._encode, self._known = encode, dict(known)
        self._start_afresh(0)

    def make_room(self, count: int) -> None:
        """Before numbers are asked for: there will be at most so many new strings.

        Numbers from before may be of other strings then.
        """
        grown = self._table.characters > STRINGS * CHARACTERS
        if self._growing or grown or len(self._table) + count > self._table.room:
            self._start_afresh(STRINGS + count)

    def numbers(
        self, text: str, codes: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> np.ndarray:
        """The number of each string ``text[start : start + size]``, int32; the starts rise.

        Args:
            codes: the characters of the text, from :func:`kexa.tokenizer.cuts.codes_of`.
        """
        self._growing = True
        numbers, new = self._table.number(codes, starts, sizes)
        ends = (starts[new] + sizes[new]).tolist()
        self._add(
            *self._encode([text[a:b] for a, b in zip(starts[new].tolist(), ends, strict=True)])
        )
        self._growing = False
        return numbers

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of strings end to end, int32, and how many each has, int64."""
        sizes = np.frombuffer(self._sizes, np.int64)[numbers]
        begins = np.frombuffer(self._begins, np.int64)[numbers]
        return np.frombuffer(self._tokens, np.int32)[spans(begins, sizes)], sizes

    def ends(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last token of each string, int32; no string is without tokens."""
        begins = np.frombuffer(self._begins, np.int64)[numbers]
        last = begins + np.frombuffer(self._sizes, np.int64)[numbers] - 1
        tokens = np.frombuffer(self._tokens, np.int32)
        return tokens[begins], tokens[last]

    def _add(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """The tokens of the strings that the table has just numbered."""
        begins = len(self._tokens) + np.cumsum(sizes) - sizes
        self._begins.frombytes(begins.tobytes())
        self._sizes.frombytes(sizes.tobytes())
        self._tokens.frombytes(tokens.tobytes())

    def _start_afresh(self, room: int) -> None:
        self._growing = False  # True between calls: an interrupt left the table half written
        self._begins, self._sizes, self._tokens = array("q"), array("q"), array("i")
        self._table = StringTable(room + len(self._known))
        sizes = np.fromiter(map(len, self._known), np.int64, len(self._known))
        self._table.number(codes_of("".join(self._known)), np.cumsum(sizes) - sizes, sizes)
        tokens = [token for tokens in self._known.values() for token in tokens]
        sizes = np.fromiter(map(len, self._known.values()), np.int64, len(self._known))
        self._add(np.array(tokens, np.int32), sizes)
