"""Packed batches from a weighted mixture of token streams, as a pure function of the step.

Each category is one endless stream: its documents in a seeded order, reshuffled every epoch, laid
end to end, each opened by ``[BOS]``. A row is filled from one stream, chosen by weight, with that
stream's next ``sequence_length`` tokens; a document that crosses the row's edge goes on in the
stream's next row, so no token is dropped. ``document_ids`` number the documents of a row from 0;
attention and loss keep them apart. With T the row length and choice a fixed table:

    k(r)  = |{r' < r : choice(r') = choice(r)}|
    row r = tokens [k(r) T, (k(r) + 1) T) of the endless stream choice(r)

So ``batch(step)`` needs no state: a resumed run asks for step n and gets what the first run got.
The table covers :data:`TABLE` rows and repeats; in it each stream has exactly its share (largest
remainder) in a seeded order, so weights hold in every run and not only on average.

How the languages other than English and Korean share their part of a mixture: :func:`balanced`.

chosen: all of it; the report gives no packing details.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kexa.data.corpus import Document

if TYPE_CHECKING:
    import torch

TABLE = 4096
MULTILINGUAL = ("es", "de", "ja", "vi")


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents end to end; document i is ``tokens[offsets[i] : offsets[i + 1]]``."""

    tokens: np.ndarray  # int32 [N]
    offsets: np.ndarray  # int64 [documents + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        """The tokens of one document, ``[BOS]`` first."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def first(self, count: int) -> TokenizedDocuments:
        """The first ``count`` documents, not copied."""
        return TokenizedDocuments(self.tokens[: self.offsets[count]], self.offsets[: count + 1])


@contextlib.contextmanager
def literal(tokenizer) -> Iterator[None]:
    """Within the block the strings of a ``tokenizers.Tokenizer``'s special tokens are text."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before


def encode(tokenizer, documents: Iterable[Document]) -> TokenizedDocuments:
    """Tokenise documents with a ``tokenizers.Tokenizer``; each starts with ``[BOS]``.

    Strings of its special tokens are ordinary text: a document that spells ``<|user|>`` must not
    produce the control token.

    Raises:
        ValueError: the tokenizer has no ``[BOS]`` token, or there are no documents.
    """
    bos = tokenizer.token_to_id("[BOS]")
    if bos is None:
        raise ValueError("the tokenizer has no [BOS] token; use one made by kexa.tokenizer")
    texts = [d.text for d in documents]
    with literal(tokenizer):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    if not encodings:
        raise ValueError("no documents to encode")
    lengths = np.array([len(e.ids) + 1 for e in encodings], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.empty(offsets[-1], dtype=np.int32)
    for start, encoding in zip(offsets[:-1], encodings, strict=True):
        tokens[start] = bos
        tokens[start + 1 : start + 1 + len(encoding.ids)] = encoding.ids
    return TokenizedDocuments(tokens, offsets)


def balanced(
    weights: Mapping[str, float], sizes: Mapping[str, int], temperature: float
) -> dict[str, float]:
    """Weights in which "multilingual" is shared out among the languages of :data:`MULTILINGUAL`.

    With n the size of a language's stream and tau the temperature,

        w_l = w_multilingual n_l^(1/tau) / sum over k of n_k^(1/tau)

    so that tau = 1 follows the sizes and a large tau gives every language the same.

    Args:
        weights: of streams and of "multilingual"; without the latter they come back as they are.
        sizes: tokens of each stream; a language without a stream gets no share.
        temperature: tau, above 0.

    Raises:
        ValueError: the temperature is not above 0, a language is named beside its group, or there
            is a share but no language.
    """
    if temperature <= 0:
        raise ValueError(f"language_temperature={temperature} must be above 0")
    shared = {name: weight for name, weight in weights.items() if name != "multilingual"}
    if "multilingual" not in weights:
        return shared
    if both := [name for name in MULTILINGUAL if name in shared]:
        raise ValueError(
            f'mixture weights name {both[0]!r} and "multilingual", which contains it; name one'
        )
    powers = {name: sizes[name] ** (1 / temperature) for name in MULTILINGUAL if name in sizes}
    if not powers:
        raise ValueError(
            f'mixture weights name "multilingual" but no stream is one of {MULTILINGUAL}'
        )
    total = sum(powers.values())
    return shared | {name: weights["multilingual"] * p / total for name, p in powers.items()}


class Mixture:
    """Batches of ``batch_size`` rows of ``sequence_length`` tokens from weighted streams."""

    def __init__(
        self,
        streams: Mapping[str, TokenizedDocuments],
        weights: Mapping[str, float],
        sequence_length: int,
        batch_size: int,
        seed: int,
    ):
        missing = sorted(set(weights) - set(streams))
        if missing:
            raise ValueError(
                f"mixture weights name {missing[0]!r}; streams are {', '.join(sorted(streams))}"
            )
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(
                f"mixture weights must be non-negative and not all zero, got {dict(weights)}"
            )
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self._streams = [_Stream(streams[n], seed, i) for i, n in enumerate(self.names)]
        share = np.array([weights[n] for n in self.names], dtype=np.float64)
        counts = _largest_remainder(share / share.sum(), TABLE)
        choices = np.repeat(np.arange(len(self.names)), counts)
        self._choices = np.random.default_rng([seed, 0x7AB1E]).permutation(choices)
        # _before[r, c]: rows of stream c among the first r rows of the table
        one_hot = np.eye(len(self.names), dtype=np.int64)[self._choices]
        self._before = np.concatenate(
            [np.zeros((1, len(self.names)), np.int64), np.cumsum(one_hot, axis=0)]
        )

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``input_ids`` and ``document_ids``, both int64 ``[batch_size, sequence_length]``."""
        length = self.sequence_length
        input_ids = np.empty((self.batch_size, length), dtype=np.int64)
        document_ids = np.empty((self.batch_size, length), dtype=np.int64)
        for b in range(self.batch_size):
            cycle, row = divmod(step * self.batch_size + b, TABLE)
            stream = self._choices[row]
            k = cycle * self._before[-1, stream] + self._before[row, stream]
            input_ids[b], starts = self._streams[stream].read(int(k) * length, length)
            document_ids[b] = np.cumsum(starts) - starts[0]
        import torch  # here, so that processes that only encode start without it

        return torch.from_numpy(input_ids), torch.from_numpy(document_ids)

    def row_sources(self, step: int) -> list[str]:
        """Which stream each row of a batch comes from."""
        rows = (step * self.batch_size + np.arange(self.batch_size)) % TABLE
        return [self.names[c] for c in self._choices[rows]]


class _Stream:
    """An endless sequence of tokens: epochs of all documents, each epoch in its own order."""

    def __init__(self, documents: TokenizedDocuments, seed: int, index: int):
        self._documents, self._seed = documents, [seed, index]
        self._size = len(documents.tokens)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[start, start + length)`` and a mask that is 1 where a document starts."""
        pieces = []
        while length:
            epoch, at = divmod(start, self._size)
            tokens, starts = self._epoch(epoch)
            take = min(length, self._size - at)
            pieces.append((tokens[at : at + take], starts[at : at + take]))
            start, length = start + take, length - take
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # rows of one batch touch at most two epochs at a time
                self._epochs.clear()
            offsets, lengths = self._documents.offsets, np.diff(self._documents.offsets)
            order = np.random.default_rng([*self._seed, epoch]).permutation(len(lengths))
            starts_at = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
            index = np.repeat(offsets[:-1][order] - starts_at, lengths[order]) + np.arange(
                self._size
            )
            starts = np.zeros(self._size, dtype=np.int64)
            starts[starts_at] = 1
            self._epochs[epoch] = self._documents.tokens[index], starts
        return self._epochs[epoch]


def _largest_remainder(share: np.ndarray, total: int) -> np.ndarray:
    counts = np.floor(share * total).astype(np.int64)
    rest = np.argsort(counts - share * total, kind="stable")[: total - counts.sum()]
    counts[rest] += 1
    return counts
