"""What a vocabulary buys: bytes per token, its gain over another vocabulary, its superwords."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from kexa.data.packing import literal
from kexa.statistics import Interval
from kexa.tokenizer.superbpe import words_in
from kexa.tokenizer.vocabulary import Budget

_RESAMPLES = 1000


def utf8_bytes(texts: Sequence[str]) -> np.ndarray:
    """UTF-8 bytes of each text as given, before any normalisation; int64 [documents]."""
    return np.array([len(text.encode("utf-8")) for text in texts], dtype=np.int64)


def token_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, strings of special tokens read as ordinary text; int64 [documents]."""
    with literal(tokenizer):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.array([len(encoding) for encoding in encodings], dtype=np.int64)


def id_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """How often the texts use each id, read as ordinary text; int64 [vocabulary]."""
    with literal(tokenizer):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for encoding in encodings:
        np.add.at(counts, encoding.ids, 1)
    return counts


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """All UTF-8 bytes of the texts over all tokens that encode them.

    Raises:
        ValueError: the texts are empty.
    """
    tokens = _used(token_counts(tokenizer, texts), "bytes per token")
    return int(utf8_bytes(texts).sum()) / int(tokens.sum())


def gain_interval(before: np.ndarray, after: np.ndarray, seed: int) -> Interval:
    """Gain in bytes per token, ``sum(before) / sum(after) - 1``, from token counts by document.

    The 95% interval is a percentile bootstrap over documents: it says how far other documents of
    the same kind may differ, not how other kinds of text would.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(before), np.full(len(before), 1 / len(before)), size=_RESAMPLES)
    resampled = (weights @ before) / (weights @ after) - 1
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(before.sum() / after.sum() - 1), float(low), float(high))


def usage(tokenizer: Tokenizer, texts: Sequence[str], sizes: Budget) -> dict[str, float]:
    """Share of the tokens of an encoding that come from each part of the vocabulary.

    Raises:
        ValueError: the texts are empty.
    """
    counts = _used(id_counts(tokenizer, texts), "usage")
    total = int(counts.sum())
    return {n: int(counts[ids.start : ids.stop].sum()) / total for n, ids in sizes.ranges().items()}


def superword_usage(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Share of the tokens of an encoding that are superwords.

    Raises:
        ValueError: the texts are empty.
    """
    counts = _used(id_counts(tokenizer, texts), "the share of superwords")
    return int(counts[list(superwords(tokenizer))].sum()) / int(counts.sum())


def renyi_efficiency(tokenizer: Tokenizer, texts: Sequence[str], alpha: float = 2.5) -> float:
    """Rényi entropy of the tokens in use over its largest value (Zouhar et al., arXiv 2306.16842).

    With p_i the share of id i in the encoding and V the size of the vocabulary:

        H_alpha / log V,   H_alpha = log(sum_i p_i^alpha) / (1 - alpha)

    and Shannon's entropy for alpha = 1. It is 1 when every id is used equally often, 0 when one id
    is all there is. chosen: alpha = 2.5, at which that paper finds it to follow translation quality
    best; larger values weigh frequent tokens more.

    Raises:
        ValueError: the texts are empty, or alpha is not positive.
    """
    if alpha <= 0:
        raise ValueError(f"alpha={alpha} must be positive; 2.5 is usual")
    counts = _used(id_counts(tokenizer, texts), "Rényi efficiency")
    p = counts[counts > 0] / counts.sum()
    entropy = -(p @ np.log(p)) if alpha == 1 else np.log((p**alpha).sum()) / (1 - alpha)
    return float(entropy / np.log(len(counts)))


def split(pattern: str, text: str) -> list[str]:
    """The pre-tokens that a pattern cuts a text into."""
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
    return [piece for piece, _ in pieces]


def superwords(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens of two words or more, in id order; bytes of a partial character show as U+FFFD."""
    found = sorted(i for token, i in tokenizer.get_vocab().items() if words_in(token) > 1)
    return {i: tokenizer.decode([i], skip_special_tokens=False) for i in found}


def longest_superwords(tokenizer: Tokenizer, count: int) -> list[tuple[int, str]]:
    """The ``count`` superwords of most UTF-8 bytes as (id, text), longest first, ties by id."""
    found = superwords(tokenizer).items()
    return sorted(found, key=lambda item: (-len(item[1].encode("utf-8")), item[0]))[:count]


def overlap(tokenizer: Tokenizer, baseline: Tokenizer) -> float:
    """Share of the baseline's tokens that are tokens of ``tokenizer`` too."""
    theirs = set(baseline.get_vocab())
    return len(theirs & set(tokenizer.get_vocab())) / len(theirs)


def _used(counts: np.ndarray, what: str) -> np.ndarray:
    if not counts.any():
        raise ValueError(f"{what} of no text is undefined; give a non-empty document")
    return counts
