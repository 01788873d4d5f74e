"""Token ids of pre-tokens, exactly as the library gives them: each distinct one encoded once.

A pre-token is cut where no token holds the characters that meet (:mod:`kexa.tokenizer.neighbours`).
Its pieces recur in others, and each distinct piece is encoded once too.

A call of the library costs more than the few tokens of a word do. Pre-tokens are written as their
byte-level characters, none of which is a space, and given to it many at a time with spaces between
them, at which it cuts.

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
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from kexa.tokenizer import bpe
from kexa.tokenizer.cuts import codes_of
from kexa.tokenizer.neighbours import Neighbours
from kexa.tokenizer.remembered import Remembered

_TOGETHER = 64  # pre-tokens in one text for the library
_CUT = " "
_APART = "\udcff"  # written as the byte 0xFF, which UTF-8 never has
WINDOW = 4096  # bytes between the starts of two windows
OVERLAP = 512  # bytes that two windows share
_BATCH = 1 << 14


class PreTokenEncoder:
    """Encodes strings, each read as one pre-token, with a vocabulary and its merges."""

    def __init__(self, vocab: list[str], merges: list[bpe.Merge]):
        ids = {token: i for i, token in enumerate(vocab)}
        self._tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, cache_capacity=0))
        self._tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(_CUT)
        self._lengths = np.array([len(token) for token in vocab])  # one character is one byte
        self._neighbours = Neighbours(vocab)
        self._pieces = Remembered(self._uncut, {})

    def __call__(self, pre_tokens: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all strings end to end, int32, and how many each has, int64 [strings].

        No string is empty.
        """
        if not pre_tokens:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        text = "".join(pre_tokens)
        codes = codes_of(text)
        lengths = np.fromiter(map(len, pre_tokens), np.int64, len(pre_tokens))
        begins = np.cumsum(lengths) - lengths
        opens = self._neighbours.apart(codes)  # bool [characters]: a piece begins here
        opens[begins] = True
        pieces = np.add.reduceat(opens, begins, dtype=np.int64)  # of each string
        cut = pieces > 1
        uncut_ids, uncut_sizes = self._uncut([pre_tokens[i] for i in np.flatnonzero(~cut).tolist()])
        if not cut.any():
            return uncut_ids, uncut_sizes

        starts, of_cut = np.flatnonzero(opens), np.repeat(cut, pieces)
        starts, lengths = starts[of_cut], np.diff(starts, append=len(codes))[of_cut]
        self._pieces.make_room(len(starts))
        numbers = self._pieces.numbers(text, codes, starts, lengths)
        cut_ids, piece_sizes = self._pieces.tokens(numbers)

        sizes = np.zeros(len(pre_tokens), dtype=np.int64)
        sizes[~cut] = uncut_sizes
        sizes[cut] = np.add.reduceat(piece_sizes, np.cumsum(pieces[cut]) - pieces[cut])
        ids, of_cut = np.zeros(int(sizes.sum()), dtype=np.int32), np.repeat(cut, sizes)
        ids[of_cut], ids[~of_cut] = cut_ids, uncut_ids
        return ids, sizes

    def _uncut(self, strings: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same for strings that are not cut."""
        lengths = np.zeros(len(strings), dtype=np.int64)
        long = [i for i, string in enumerate(strings) if len(string) > WINDOW]
        parts, begin = [], 0
        for i in [*long, len(strings)]:
            ids, lengths[begin:i] = self._encode(strings[begin:i])
            parts.append(ids)
            if i < len(strings):
                parts.append(self._windowed(strings[i]))
                lengths[i] = len(parts[-1])
            begin = i + 1
        return np.concatenate(parts), lengths

    def _encode(self, strings: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same for strings that are not empty, each encoded whole."""
        data = _APART.join([*strings, ""]).encode("utf-8", "surrogateescape")
        data = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(data == 0xFF)  # no byte of UTF-8
        text = _CHARACTERS[data].tobytes().decode("utf-16-le")
        cuts = ends[_TOGETHER - 1 : -1 : _TOGETHER].tolist()
        parts = zip([0, *(i + 1 for i in cuts)], [*cuts, len(text) - 1], strict=True)
        texts = [text[a:b] for a, b in parts if a < b]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = array("i", itertools.chain.from_iterable(encoding.ids for encoding in found))
        ids = np.array(ids, dtype=np.int32)
        ends = ends - np.arange(len(ends))  # without the cuts
        token_ends = np.cumsum(self._lengths[ids])
        return ids, np.diff(np.searchsorted(token_ends, ends) + 1, prepend=0)

    def _windowed(self, string: str) -> np.ndarray:
        """The ids of one long pre-token."""
        data = string.encode("utf-8")
        starts = [_character_start(data, i) for i in range(0, len(data), WINDOW)]
        ends = [_character_start(data, min(i + WINDOW + OVERLAP, len(data))) for i in starts]
        windows = [data[a:b].decode("utf-8") for a, b in zip(starts, ends, strict=True)]
        ids, lengths = self._encode(windows)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        places = [a + self._starts(row) for a, row in zip(starts, rows, strict=True)]
        joint, begin = [], 0
        for i in range(len(rows) - 1):
            _, here, there = np.intersect1d(places[i], places[i + 1], return_indices=True)
            same = np.flatnonzero(rows[i][here] == rows[i + 1][there])
            if not len(same):
                return self._encode([string])[0]  # the ids of all of it
            joint.append(rows[i][begin : here[same[0]]])
            begin = int(there[same[0]])
        return np.concatenate([*joint, rows[-1][begin:]])

    def _starts(self, ids: np.ndarray) -> np.ndarray:
        """At which byte each token starts."""
        return np.cumsum(self._lengths[ids]) - self._lengths[ids]


_CHARACTERS = np.zeros(256, dtype="<u2")
for _character, _byte in bpe.byte_of_character().items():
    _CHARACTERS[_byte] = ord(_character)
_CHARACTERS[0xFF] = ord(_CUT)


def encode(vocab: list[str], merges: list[bpe.Merge], counts: Mapping[str, int]) -> bpe.Encoded:
    """Encode each distinct pre-token once.

    Args:
        counts: how often each occurs, from :func:`kexa.tokenizer.splitter.count_pre_tokens`.
    """
    encoder, rest = PreTokenEncoder(vocab, merges), iter(counts)
    rows, lengths = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
    while batch := list(itertools.islice(rest, _BATCH)):
        row, sizes = encoder(batch)
        rows.append(row)
        lengths.append(sizes)
    ids, lengths = np.concatenate(rows), np.concatenate(lengths)
    joined = np.ones(len(ids), dtype=bool)
    joined[np.cumsum(lengths) - 1] = False
    weights = np.fromiter(counts.values(), np.int64, len(counts))
    return bpe.Encoded(ids, joined, np.repeat(weights, lengths))


def _character_start(data: bytes, i: int) -> int:
    """The last place at or before ``i`` where a character starts, or the end."""
    while i < len(data) and data[i] & 0xC0 == 0x80:
        i -= 1
    return i
