"""What a vocabulary buys: bytes per token, its gain over another vocabulary, its superwords."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from kexa.statistics import Interval
from kexa.tokenizer import bpe
from kexa.tokenizer.superbpe import words_in
from kexa.tokenizer.vocabulary import Budget

_RESAMPLES = 1000


def utf8_bytes(texts: Sequence[str]) -> np.ndarray:
    """UTF-8 bytes of each text as given, before any normalisation; int64 [documents]."""
    return np.array([len(text.encode("utf-8")) for text in texts], dtype=np.int64)


def token_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, strings of special tokens read as ordinary text; int64 [documents]."""
    with bpe.literal(tokenizer):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.array([len(encoding) for encoding in encodings], dtype=np.int64)


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """All UTF-8 bytes of the texts over all tokens that encode them.

    Raises:
        ValueError: the texts are empty.
    """
    tokens = int(token_counts(tokenizer, texts).sum())
    if not tokens:
        raise ValueError("bytes per token of no text is undefined; give a non-empty document")
    return int(utf8_bytes(texts).sum()) / tokens


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
    """Share of the tokens of an encoding that come from each part of the vocabulary."""
    ids = bpe.encode(tokenizer, texts).ids
    parts = sizes.ranges()
    edges = [part.start for part in parts.values()] + [tokenizer.get_vocab_size()]
    counts = np.histogram(ids, bins=edges)[0] / len(ids)
    return dict(zip(parts, counts.tolist(), strict=True))


def split(pattern: str, text: str) -> list[str]:
    """The pre-tokens that a pattern cuts a text into."""
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
    return [piece for piece, _ in pieces]


def superwords(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens of two words or more, in id order; bytes of a partial character show as U+FFFD."""
    found = sorted(i for token, i in tokenizer.get_vocab().items() if words_in(token) > 1)
    return {i: tokenizer.decode([i], skip_special_tokens=False) for i in found}


def overlap(tokenizer: Tokenizer, baseline: Tokenizer) -> float:
    """Share of the baseline's tokens that are tokens of ``tokenizer`` too."""
    theirs = set(baseline.get_vocab())
    return len(theirs & set(tokenizer.get_vocab())) / len(theirs)
