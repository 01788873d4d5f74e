"""Numbers for strings that lie in one array of characters, looked up many at a time.

A ``dict`` makes a Python object of every string and looks it up alone. Here the strings are spans
of an array, and all of them go through the table together: hashes of spans come from one running
sum (``h = sum c_i r^i``, so that a span is the difference of two sums, shifted by ``r^-start``),
and open addressing probes with all strings at once. Hashes only propose: a string has a number when
its characters are compared with those kept under the number, so equal hashes change nothing.
"""

from __future__ import annotations

from array import array

import numpy as np

_RATIO, _SPREAD = 0x5851F42D4C957F2D, 0x9E3779B97F4A7C15  # odd: the first one has an inverse
_TOGETHER = 1 << 16  # spans


class StringTable:
    """Distinct strings by number, counted from 0. ``room`` is how many may be added in all."""

    def __init__(self, room: int):
        bits = max(4, (2 * room).bit_length())
        self._slots = np.full(1 << bits, -1, dtype=np.int32)
        self._shift = np.uint64(64 - bits)
        self._hashes, self._begins, self._sizes = array("Q"), array("q"), array("q")
        self._characters = array("I")
        self.room = room

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def characters(self) -> int:
        """How many are kept."""
        return len(self._characters)

    def number(
        self, codes: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The number of each string ``codes[start : start + size]``, int32 [strings].

        Also which of the strings are new, int64: each once, in the order of their numbers. The
        starts rise.
        """
        numbers, new = np.empty(len(starts), dtype=np.int32), [np.zeros(0, dtype=np.int64)]
        for i in range(0, len(starts), _TOGETHER):
            part = slice(i, i + _TOGETHER)
            numbers[part], found = self._number(codes, starts[part], sizes[part])
            new += [i + each for each in found]
        return numbers, np.concatenate(new)

    def _number(
        self, codes: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The numbers of strings that fit into the cache together.

        Each string walks from the slot that its hash gives to the first one that is empty or has
        its hash. Then characters are compared, and those that are unlike walk on.
        """
        assert len(self) + len(starts) <= self.room
        hashes = _hashes(codes, starts, sizes)
        slots = (hashes * np.uint64(_SPREAD) >> self._shift).astype(np.int64)
        last_slot = len(self._slots) - 1
        numbers, new = np.empty(len(starts), dtype=np.int32), []
        unknown = np.arange(len(starts), dtype=np.int32)
        while len(unknown):
            walking = unknown
            while len(walking):
                if len(added := self._claim(slots, walking)):
                    self._add(codes, hashes[added], starts[added], sizes[added])
                    new.append(added)
                numbers[walking] = self._slots[slots[walking]]
                kept = np.frombuffer(self._hashes, np.uint64)[numbers[walking]]
                walking = walking[kept != hashes[walking]]
                slots[walking] = (slots[walking] + 1) & last_slot
            same = self._same(numbers[unknown], codes, starts[unknown], sizes[unknown])
            unknown = unknown[~same]
            slots[unknown] = (slots[unknown] + 1) & last_slot
        return numbers, new

    def _claim(self, slots: np.ndarray, walking: np.ndarray) -> np.ndarray:
        """Give each empty slot to one of the strings at it; returned, in the order of numbers."""
        empty = walking[self._slots[slots[walking]] < 0]
        self._slots[slots[empty]] = empty  # of several in one slot, the last one stays
        empty = empty[self._slots[slots[empty]] == empty]
        self._slots[slots[empty]] = np.arange(len(self), len(self) + len(empty))
        return empty

    def _add(
        self, codes: np.ndarray, hashes: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> None:
        begins = len(self._characters) + np.cumsum(sizes) - sizes
        for column, values in (
            (self._hashes, hashes),
            (self._begins, begins),
            (self._sizes, sizes),
            (self._characters, codes[spans(starts, sizes)]),
        ):
            column.frombytes(values.tobytes())

    def _same(
        self, numbers: np.ndarray, codes: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> np.ndarray:
        """Whether each string is the one kept under its number."""
        same = np.frombuffer(self._sizes, np.int64)[numbers] == sizes
        if not same.all():
            starts, sizes, numbers = starts[same], sizes[same], numbers[same]
        ends = np.cumsum(sizes)
        if len(starts) and starts[-1] + sizes[-1] - starts[0] == ends[-1]:  # end to end
            here = codes[starts[0] : starts[0] + ends[-1]]
        else:
            here = codes[spans(starts, sizes)]
        kept = np.frombuffer(self._begins, np.int64)[numbers]
        unlike = here != np.frombuffer(self._characters, np.uint32)[spans(kept, sizes)]
        if unlike.any():
            found = np.searchsorted(ends, np.flatnonzero(unlike), "right")
            same[np.flatnonzero(same)[found]] = False
        return same


def spans(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``start, start + 1, ..., start + size - 1`` of each span, end to end; int64."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)


def _hashes(codes: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A hash of each span, uint64; equal spans have equal ones."""
    begin, end = int(starts[0]), int((starts + sizes).max())
    powers, inverses = (_powers(ratio, end - begin) for ratio in (_RATIO, pow(_RATIO, -1, 1 << 64)))
    sums = np.zeros(end - begin + 1, dtype=np.uint64)
    np.cumsum(codes[begin:end] * powers, out=sums[1:])
    starts = starts - begin
    return (sums[starts + sizes] - sums[starts]) * inverses[starts] + sizes.astype(np.uint64)


def _powers(ratio: int, count: int) -> np.ndarray:
    """``ratio ** 0, ratio ** 1, ...`` modulo ``2 ** 64``, at least ``count`` of them."""
    known = _KNOWN.get(ratio)
    if known is None or len(known) < count:
        known = np.full(count, ratio, dtype=np.uint64)
        known[0] = 1
        known = _KNOWN[ratio] = np.cumprod(known)
    return known[:count]


_KNOWN: dict[int, np.ndarray] = {}
