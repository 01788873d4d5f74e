"""Token ids of pre-tokens, exactly as the library gives them: each distinct one encoded once.

A long pre-token (text without a break) costs the library more per byte the longer it is. It is
encoded in overlapping windows, all in one batch, that are put together where two of them agree:

    Let BPE join, step by step, the pair of lowest rank. Tokens t_1 ... t_n are the encoding of
    their text exactly when every two neighbours t_i t_(i+1) are the encoding of theirs.

Why: in the whole text, look at the first merge that crosses a boundary of the t_i. Until then the
tokens on its two sides grew as they do when these two stand alone, so that merge happens there too.
Neighbours in the encoding of a window are therefore right, and so are those of the joint row when
it changes from one window to the next at a token that both have at the same place. Where two
windows share no token, the pre-token is encoded whole.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping

import numpy as np

from kexa.tokenizer import bpe

WINDOW = 4096  # bytes between the starts of two windows
OVERLAP = 512  # bytes that two windows share
_BATCH = 1 << 14


class PreTokenEncoder:
    """Encodes strings, each read as one pre-token, with a vocabulary and its merges."""

    def __init__(self, vocab: list[str], merges: list[bpe.Merge]):
        self._tokenizer = bpe.whole(vocab, merges)
        self._lengths = np.array([len(token) for token in vocab])  # one character is one byte

    def __call__(self, pre_tokens: list[str]) -> list[list[int]]:
        """The ids of each string."""
        longer = [i for i, string in enumerate(pre_tokens) if len(string) > WINDOW]
        rows = self._encode([string if len(string) <= WINDOW else "" for string in pre_tokens])
        for i in longer:
            rows[i] = self._windowed(pre_tokens[i])
        return rows

    def _encode(self, strings: list[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _windowed(self, string: str) -> list[int]:
        """The ids of one long pre-token."""
        data = string.encode("utf-8")
        starts = [_character_start(data, i) for i in range(0, len(data), WINDOW)]
        ends = [_character_start(data, min(i + WINDOW + OVERLAP, len(data))) for i in starts]
        windows = [data[a:b].decode("utf-8") for a, b in zip(starts, ends, strict=True)]
        rows = [np.array(ids, dtype=np.int32) for ids in self._encode(windows)]
        places = [a + self._starts(row) for a, row in zip(starts, rows, strict=True)]
        joint, begin = [], 0
        for i in range(len(rows) - 1):
            _, here, there = np.intersect1d(places[i], places[i + 1], return_indices=True)
            same = np.flatnonzero(rows[i][here] == rows[i + 1][there])
            if not len(same):
                return self._encode([string])[0]
            joint.append(rows[i][begin : here[same[0]]])
            begin = int(there[same[0]])
        return np.concatenate([*joint, rows[-1][begin:]]).tolist()

    def _starts(self, ids: np.ndarray) -> np.ndarray:
        """At which byte each token starts."""
        return np.cumsum(self._lengths[ids]) - self._lengths[ids]


def encode(vocab: list[str], merges: list[bpe.Merge], counts: Mapping[str, int]) -> bpe.Encoded:
    """Encode each distinct pre-token once.

    Args:
        counts: how often each occurs, from :func:`kexa.tokenizer.splitter.count_pre_tokens`.
    """
    encoder, rest, ids, lengths = PreTokenEncoder(vocab, merges), iter(counts), array("i"), []
    while batch := list(itertools.islice(rest, _BATCH)):
        rows = encoder(batch)
        ids.extend(itertools.chain.from_iterable(rows))
        lengths += map(len, rows)
    ids = np.array(ids, dtype=np.int32)
    joined = np.ones(len(ids), dtype=bool)
    joined[np.cumsum(lengths, dtype=np.int64) - 1] = False
    weights = np.fromiter(counts.values(), np.int64, len(counts))
    return bpe.Encoded(ids, joined, np.repeat(weights, np.array(lengths, dtype=np.int64)))


def _character_start(data: bytes, i: int) -> int:
    """The last place at or before ``i`` where a character starts, or the end."""
    while i < len(data) and data[i] & 0xC0 == 0x80:
        i -= 1
    return i
