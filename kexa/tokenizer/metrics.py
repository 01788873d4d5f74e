"""What a vocabulary buys: bytes per token, its make-up, and how much its superwords are used."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer

from kexa.tokenizer import bpe
from kexa.tokenizer.superbpe import words_in


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes of the texts as given (before normalisation) over the tokens that encode them.

    Raises:
        ValueError: the texts are empty.
    """
    texts = list(texts)
    tokens = len(bpe.encode(tokenizer, texts).ids)
    if not tokens:
        raise ValueError("bytes per token of no text is undefined; give at least one non-empty document")
    return sum(len(text.encode("utf-8")) for text in texts) / tokens


def superword_share(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Share of the tokens of an encoding that span two words or more."""
    ids = bpe.encode(tokenizer, texts).ids
    return float(np.isin(ids, list(superwords(tokenizer))).mean()) if len(ids) else 0.0


def superwords(tokenizer: Tokenizer) -> dict[int, str]:
    """Superword ids with their text, in id order."""
    found = {i: token for token, i in tokenizer.get_vocab().items() if words_in(token) > 1}
    return {i: readable(tokenizer, i) for i in sorted(found)}


def overlap(tokenizer: Tokenizer, baseline: Tokenizer) -> float:
    """Share of the baseline's tokens that are tokens of ``tokenizer`` too."""
    theirs = set(baseline.get_vocab())
    return len(theirs & set(tokenizer.get_vocab())) / len(theirs)


def readable(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token; bytes that are part of a character only show as U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)
