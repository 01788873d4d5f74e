"""Near-duplicates: texts that share most runs of three words, found without comparing all pairs.

    shingles    the distinct runs of three words of a text, each hashed to 64 bits
    similarity  J(a, b) = |a and b| / |a or b|  over shingles (Jaccard)
    signature   for each of 128 hash functions the least hash over the shingles (MinHash): two texts
                agree in one place with probability J
    candidates  the signature is cut into 32 bands of 4; texts equal in a band are compared, which
                happens with probability 1 - (1 - J^4)^32: 0.998 at J = 0.65, 0.03 at J = 0.18
    verdict     the exact J of the pair is at least 0.6

With a share p of the words changed, three shingles are lost for each: J = (1 - 3p) / (1 + 3p), 0.74
at p = 5%; 0.6 is one word in twelve. The sketch can only miss a pair, never invent one, because the
exact similarity decides. chosen: all of it. Reference: Broder 1997;
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.

Legend: K shingles, P hash functions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from kexa.data.words import words

SHINGLE_WORDS = 3
SIMILARITY = 0.6
BANDS, ROWS = 32, 4
_BLOCK = 4096  # shingles hashed at a time: a text of any length needs the same memory

_rng = np.random.default_rng(0)
_MULTIPLY_P = _rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADD_P = _rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
_ORDER = np.array([1, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)


def shingles(text: str) -> np.ndarray:
    """Hashes of the distinct runs of three words: sorted uint64 [K], K >= 1.

    A text of fewer words is one run.
    """
    hashes = np.array([zlib.crc32(word.encode("utf-8")) for word in words(text)], dtype=np.uint64)
    if len(hashes) < SHINGLE_WORDS:
        hashes = np.append(hashes, np.zeros(SHINGLE_WORDS - len(hashes), dtype=np.uint64))
    windows = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE_WORDS)
    return np.unique(_mixed((windows * _ORDER).sum(axis=1, dtype=np.uint64)))


def similarity(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """Jaccard similarity of two results of :func:`shingles`."""
    shared = len(np.intersect1d(a_K, b_K, assume_unique=True))
    return shared / (len(a_K) + len(b_K) - shared)


def signature(shingles_K: np.ndarray) -> np.ndarray:
    """MinHash signature: uint64 [P]."""
    least_P = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles_K), _BLOCK):
        hashes_PK = _MULTIPLY_P[:, None] * shingles_K[start : start + _BLOCK] + _ADD_P[:, None]
        np.minimum(least_P, hashes_PK.min(axis=1), out=least_P)
    return least_P


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the hash (the finalizer of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))


class NearDuplicates:
    """Texts seen so far, and which of them a new one resembles."""

    def __init__(self) -> None:
        self._shingles: list[np.ndarray] = []
        self._bands: dict[bytes, list[int]] = {}

    def matches(self, shingles_K: np.ndarray) -> list[int]:
        """The numbers, in order of :meth:`add`, of the texts at least 0.6 similar to this one."""
        found = {i for band in _bands(shingles_K) for i in self._bands.get(band, ())}
        return sorted(i for i in found if similarity(shingles_K, self._shingles[i]) >= SIMILARITY)

    def add(self, shingles_K: np.ndarray) -> int:
        """Remember a text; returns its number."""
        number = len(self._shingles)
        self._shingles.append(shingles_K)
        for band in _bands(shingles_K):
            self._bands.setdefault(band, []).append(number)
        return number


def _bands(shingles_K: np.ndarray) -> list[bytes]:
    rows = signature(shingles_K).reshape(BANDS, ROWS)
    return [bytes([i]) + row.tobytes() for i, row in enumerate(rows)]


def groups(texts: Iterable[str]) -> list[int]:
    """For each text the number of the first text that a chain of near-duplicates links it to."""
    seen = NearDuplicates()
    first: list[int] = []
    for text in texts:
        mine = shingles(text)
        linked = {_root(first, i) for i in seen.matches(mine)}
        own = seen.add(mine)
        root = min(linked, default=own)
        first.append(root)
        for other in linked:
            first[other] = root
    return [_root(first, i) for i in range(len(first))]


def _root(first: list[int], i: int) -> int:
    while first[i] != i:
        i = first[i]
    return i
