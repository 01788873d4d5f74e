"""What predicts held-out text without a network: an n-gram model and general compressors.

The n-gram model is interpolated modified Kneser-Ney (Chen and Goodman 1998). For a context h of
k tokens, h' that context without its first token, and a count c,

    P(w | h) = (c(h w) - D(c(h w))) / c(h .) + g(h) P(w | h')      g(h): what D took, of c(h .)
    P(w)     = (c(w) - D(c(w))) / c(.) + g / V                     V: the size of the vocabulary

and P(w | h) = P(w | h') where nothing followed h. With the longest context c counts occurrences;
with a shorter one it counts the different tokens that come before ``h w``, and occurrences at the
start of a document, where none can. Each order has three discounts, from the numbers n_i of its
n-grams with count i:

    D(i) = i - (i + 1) Y n_(i+1) / n_i    Y = n_1 / (n_1 + 2 n_2), i = 1, 2, 3; beyond, D(3)

No n-gram reaches over the edge of a document, whose first token is given and never predicted.
Evaluation sees what a language model sees of a row: a document that began before the row has no
context at the row's edge.

A compressor's bits per byte are those of its output: of the held-out text alone, or of what it adds
to the output when the training text comes before it. Unlike a model that reads row by row it meets
the held-out documents one after the other and learns from each.

chosen: all of it; the report compares with no such baseline.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kexa.data import Document, TokenizedDocuments
from kexa.train.evaluation import HeldOut, bits_per_byte

_FALLBACK = (0.5, 1.0, 1.5)  # KenLM's, where a count of counts is 0 or a discount out of range


@dataclass(frozen=True)
class _Order:
    """The n-grams of one n, numbered in the order of their keys; the last number is "not seen".

    The key of an n-gram is (number of its first n - 1 tokens) V + its last token; the empty context
    of a unigram is number 0.
    """

    keys: np.ndarray  # int64 [G + 1], rising; the last is above any key
    shares: np.ndarray  # float64 [G + 1]: (c(h w) - D) / c(h .)
    backoffs: np.ndarray  # float64, by number of the context: g(h), 1 where nothing followed

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key's n-gram, int64 of the same shape."""
        at = np.searchsorted(self.keys, keys)
        return np.where(self.keys[at] == keys, at, len(self.keys) - 1)


@dataclass(frozen=True)
class NGram:
    """A trained model; ``orders[n - 1]`` holds its n-grams."""

    orders: list[_Order]
    vocab_size: int

    def losses(self, input_ids: ArrayLike, document_ids: ArrayLike) -> np.ndarray:
        """Nats of every target: each token that follows another of its document in its row.

        Args:
            input_ids, document_ids: int [B, T], as :class:`kexa.train.evaluation.HeldOut` has them.

        Returns:
            float64 [N], row after row.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        return -np.log(self._read(input_ids, document_ids)[0])

    def known(self, input_ids: ArrayLike, document_ids: ArrayLike) -> np.ndarray:
        """How many tokens just before a target were met in this order and followed by something.

        At most as many as the model looks at. Arguments and errors as for :meth:`losses`.

        Returns:
            int64 [N], from 0 to the longest order less 1.
        """
        return self._read(input_ids, document_ids)[1]

    def _read(self, input_ids: ArrayLike, document_ids: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The probability of every target, and what :meth:`known` says of it."""
        input_ids, document_ids = np.asarray(input_ids, np.int64), np.asarray(document_ids)
        starts = np.ones(input_ids.shape, dtype=bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        tokens, starts = input_ids.ravel(), starts.ravel()
        _require_known(tokens, self.vocab_size)
        contexts = np.zeros_like(tokens)
        probabilities = np.full(len(tokens), 1 / self.vocab_size)
        known = np.full(len(tokens), -1)  # the empty context counts too
        for order in self.orders:
            known += order.backoffs[contexts] < 1
            grams = order.find(contexts * self.vocab_size + tokens)
            probabilities = order.shares[grams] + order.backoffs[contexts] * probabilities
            contexts = _before(grams, starts, len(order.keys) - 1)
        return probabilities[~starts], known[~starts]


def train_ngram(documents: TokenizedDocuments, order: int, vocab_size: int) -> NGram:
    """Count and discount the n-grams of 1 to ``order`` tokens.

    Five orders of 9.4M tokens take 11 s on one core and 1.4 GiB.

    Raises:
        ValueError: ``order`` below 1, no token that follows another, or one outside the vocabulary.
    """
    if order < 1:
        raise ValueError(f"order={order} must be 1 or more")
    tokens = np.asarray(documents.tokens, dtype=np.int64)
    _require_known(tokens, vocab_size)
    starts = np.zeros(len(tokens), dtype=bool)
    starts[documents.offsets[:-1]] = True
    if starts.all():
        raise ValueError("no document has a second token, so there is nothing to predict")

    keys, examples = [np.arange(vocab_size)], []  # by n: n-grams, and where each ends once
    grams, ends = [tokens], [~starts]  # by n and position: the n-gram that ends there, if any
    for _ in range(1, order):
        before = _before(grams[-1], starts, len(keys[-1]))
        at = np.flatnonzero(before < len(keys[-1]))
        found, numbers = np.unique(before[at] * vocab_size + tokens[at], return_inverse=True)
        keys.append(found)
        examples.append(np.empty_like(found))
        examples[-1][numbers] = at
        grams.append(np.full(len(tokens), len(found)))
        grams[-1][at] = numbers
        ends.append(before < len(keys[-2]))

    orders, contexts = [], 1
    for n in range(order):
        counted = ends[n]
        if n + 1 < order:  # once per token before it, and wherever it opens a document
            counted = ends[n] & ~ends[n + 1]
            counted[examples[n]] = True
        counts = np.bincount(grams[n][counted], minlength=len(keys[n]))
        orders.append(_discount(keys[n], counts, contexts, vocab_size))
        contexts = len(keys[n]) + 1
    return NGram(orders, vocab_size)


def joined(streams: Iterable[TokenizedDocuments]) -> TokenizedDocuments:
    """The documents of several streams in one, the streams one after the other."""
    streams = list(streams)
    lengths = np.concatenate([np.diff(stream.offsets) for stream in streams])
    return TokenizedDocuments(
        np.concatenate([stream.tokens for stream in streams]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits of gzip's output at level 9 per UTF-8 byte of the texts, end to end.

    Raises:
        ValueError: no text.
    """
    data = _utf8(texts)
    return 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)


def xz_bits_per_byte(texts: Iterable[str], before: Iterable[str] = ()) -> float:
    """Bits of xz's output at preset 9e per UTF-8 byte of the texts, end to end.

    Args:
        before: what the compressor has read already, all of it within reach; only what ``texts``
            add to the output counts.

    Raises:
        ValueError: no text.
    """
    data, known = _utf8(texts), "".join(before).encode()
    added = _xz_bytes(known + data) - (_xz_bytes(known) if known else 0)
    return 8 * added / len(data)


def first_documents(documents: Sequence[Document], size: int) -> Sequence[Document]:
    """The documents up to the one with which they exceed ``size`` UTF-8 bytes; one at least."""
    ends = np.cumsum([document.bytes for document in documents])
    return documents[: max(1, int(np.searchsorted(ends, size, side="right")))]


def measure(
    train: Mapping[str, Sequence[Document]],
    streams: Mapping[str, TokenizedDocuments],
    heldout: Mapping[str, Sequence[Document]],
    rows: Mapping[str, HeldOut],
    ngram: NGram,
) -> dict[str, dict[str, float]]:
    """Bits per byte of every baseline in every category of ``heldout``.

    Args:
        train, streams: what the baselines read, as text and in tokens.
        heldout, rows: what they are judged by, as text for compressors and in rows for n-grams.
        ngram: one that has read all streams; beside it, one as long reads each category alone.
    """
    found: dict[str, dict[str, float]] = {}
    for category, documents in heldout.items():
        texts, known = [d.text for d in documents], [d.text for d in train[category]]
        own = train_ngram(streams[category], len(ngram.orders), ngram.vocab_size)
        row = rows[category]

        def bits(model: NGram, row: HeldOut = row) -> float:
            loss = float(model.losses(row.input_ids, row.document_ids).mean())
            return bits_per_byte(loss, row.bytes_per_token)

        figures = {
            "n-gram of all text": bits(ngram),
            "n-gram of its own text": bits(own),
            "xz after its own text": xz_bits_per_byte(texts, known),
            "xz": xz_bits_per_byte(texts),
            "gzip": gzip_bits_per_byte(texts),
        }
        for baseline, value in figures.items():
            found.setdefault(baseline, {})[category] = value
    return found


def _before(grams: np.ndarray, starts: np.ndarray, none: int) -> np.ndarray:
    """By position: the n-gram that ends just before, ``none`` where a document starts."""
    before = np.empty_like(grams)
    before[1:] = grams[:-1]
    before[starts] = none
    return before


def _discount(keys: np.ndarray, counts: np.ndarray, contexts: int, vocab_size: int) -> _Order:
    taken = _discounts(counts)[np.minimum(counts, 3)]
    of = keys // vocab_size
    totals = np.bincount(of, counts, minlength=contexts)
    backoffs = np.ones(contexts)
    np.divide(np.bincount(of, taken, minlength=contexts), totals, out=backoffs, where=totals > 0)
    shares = (counts - taken) / np.where(counts, totals[of], 1)
    end = np.iinfo(np.int64).max
    return _Order(np.append(keys, end), np.append(shares, 0.0), backoffs)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0), D(1), D(2) and D(3), float64 [4]."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        if min(found) > 0:
            return np.array([0, *found])
    return np.array([0, *_FALLBACK])


def _require_known(tokens: np.ndarray, vocab_size: int) -> None:
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"tokens from {tokens.min()} to {tokens.max()} do not fit vocab_size={vocab_size}; "
            "give the size of the tokenizer that made them"
        )


def _utf8(texts: Iterable[str]) -> bytes:
    data = "".join(texts).encode()
    if not data:
        raise ValueError("no text to compress")
    return data


def _xz_bytes(data: bytes) -> int:
    reach = max(len(data), 4096)  # liblzma's smallest
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": reach}
    return len(lzma.compress(data, lzma.FORMAT_XZ, filters=[options]))
