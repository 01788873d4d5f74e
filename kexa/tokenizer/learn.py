"""Plain BPE on rows of token ids with counts: what the library's trainer learns, without its feed.

The library takes no counts: each row would have to be given to it as often as it occurs. The rule
is the same, ties and all: merge the pair that occurs most often, of equal ones that of lower ids,
everywhere from left to right; a pair of one token counts in ``aaa`` twice.

1. The rows stand end to end in one array; a token that was merged into the one before it is dead,
   and each token knows its neighbours.
2. Of each pair that occurs ``floor`` times or more the count and the places are kept. A pair loses
   occurrences when a neighbour is merged, and is new when one of its tokens is: only a token that
   two merges make can let an old pair grow, and such a pair is looked up in the whole array.
3. A heap holds the pairs by the count they had; one that has lost some goes back with its count.
"""

from __future__ import annotations

import heapq

import numpy as np

Row = tuple[int, ...]


def learn(
    ids: np.ndarray, joined: np.ndarray, counts: np.ndarray, asked: int, floor: int
) -> list[tuple[Row, Row]]:
    """Merges in the order in which they are learned, each as the two rows of ids it joins.

    Args:
        ids: int32 [N], rows of tokens end to end.
        joined: bool [N], whether a token is in one row with the next.
        counts: int64 [N], how often the row that holds the token occurs.
        asked: how many tokens to make at most.
        floor: a pair that occurs less often is not merged.
    """
    rows = _Rows(ids, joined, counts, max(floor, 1))
    spelling: dict[int, Row] = {int(i): (int(i),) for i in np.unique(ids)}
    known = {row: i for i, row in spelling.items()}
    first = free = max(spelling, default=0) + 1
    merges: dict[int, None] = {}
    while free - first < asked and (key := rows.pop()) is not None:
        row = spelling[key >> 32] + spelling[key & _LOW]
        made_before = row in known
        new = known.setdefault(row, free)
        spelling[new] = row
        free += not made_before
        merges.pop(key, None)  # the last time counts, as in the library
        merges[key] = None
        rows.merge(key, new, made_before)
    return [(spelling[key >> 32], spelling[key & _LOW]) for key in merges]


_LOW = (1 << 32) - 1  # a pair of tokens is one number: the first << 32 | the second


class _Rows:
    """The rows, and where and how often each pair occurs."""

    def __init__(self, ids: np.ndarray, joined: np.ndarray, counts: np.ndarray, floor: int):
        self._floor, self._weights = floor, counts
        self._ids = ids.astype(np.int32)  # -1: dead
        places = np.arange(len(ids), dtype=np.int32)
        self._next = np.where(joined, places + 1, -1)
        self._before = np.append(-1, self._next[:-1] - 1)[: len(ids)]
        self._before[self._before < 0] = -1
        self._counts: dict[int, int] = {}
        self._places: dict[int, np.ndarray] = {}
        self._heap: list[tuple[int, int]] = []
        self._add(places[joined], grown=False)

    def pop(self) -> int | None:
        """The pair to merge next."""
        while self._heap:
            count, key = heapq.heappop(self._heap)
            if -count != self._counts[key]:
                heapq.heappush(self._heap, (-self._counts[key], key))
            else:
                return key if -count >= self._floor else None
        return None

    def merge(self, key: int, new: int, made_before: bool) -> None:
        """Put ``new`` for each occurrence of a pair."""
        left = self._where(key)
        right = self._next[left]
        if key >> 32 == key & _LOW:  # of three equal tokens the first two
            starts = np.append(True, left[1:] != right[:-1])[: len(left)]
            begin = np.maximum.accumulate(np.where(starts, np.arange(len(left)), 0))
            left = left[(np.arange(len(left)) - begin) % 2 == 0]
            right = self._next[left]
        before, after = self._before[left], self._next[right]
        is_last = after < 0
        self._ids[right] = -1  # a neighbour that dies here has its own right side in the list
        before = before[(before >= 0) & (self._ids[before] >= 0)]
        self._ids[right] = key & _LOW
        self._drop(np.concatenate([before, right[~is_last]]))
        self._ids[right], self._ids[left] = -1, new
        self._next[left] = after
        self._before[after[~is_last]] = left[~is_last]
        self._add(np.concatenate([before, left[~is_last]]), made_before)

    def _where(self, key: int) -> np.ndarray:
        """Places of the first tokens of a pair, in order."""
        places = self._places.pop(key, None)
        if places is None:
            places = np.flatnonzero(self._ids == key >> 32)
        places = places[(self._ids[places] == key >> 32) & (self._next[places] >= 0)]
        return np.sort(places[self._ids[self._next[places]] == key & _LOW])

    def _drop(self, places: np.ndarray) -> None:
        """Take the pairs that start at these places off the counts."""
        for key, count, _ in self._grouped(places):
            if key in self._counts:
                self._counts[key] -= count

    def _add(self, places: np.ndarray, grown: bool) -> None:
        """Count the pairs that start at these places; ``grown``: some may have occurred before."""
        for key, count, where in self._grouped(places):
            if grown:
                self._places.pop(key, None)
                have = self._counts.get(key)
                whole = int(self._weights[self._where(key)].sum())
                count = whole if have is None else have + count
            elif count >= self._floor:
                self._places[key] = where
            if count >= self._floor:
                self._counts[key] = count
                heapq.heappush(self._heap, (-count, key))

    def _grouped(self, places: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """Each pair that starts at these places, its weight, and the places."""
        if not len(places):
            return []
        keys = self._ids[places].astype(np.int64) << 32 | self._ids[self._next[places]]
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        sums = np.add.reduceat(self._weights[places], starts)
        ends = np.append(starts[1:], len(keys))
        return [
            (key, count, places[a:b].copy() if count >= self._floor else places[:0])
            for key, count, a, b in zip(
                keys[starts].tolist(), sums.tolist(), starts.tolist(), ends.tolist(), strict=True
            )
        ]
