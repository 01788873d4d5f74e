"""Two tokenizers: an EXAONE-4-style baseline and the K-EXAONE tokenizer that grows out of it.

Baseline: byte-level BPE inside words, NFKC, on Korean, English, Spanish and code.

K-EXAONE (reported: sizes, shares, NFC, SuperBPE):

1. *Retention.* Re-encode the baseline's categories with its own merges and keep the 70% of its
   tokens that are formed most often, with the merges they pass through.
2. *New subwords.* Resume BPE inside words on multilingual text, STEM and code until 80% of the
   vocabulary is full.
3. *Superwords* (SuperBPE, arXiv 2503.13423). Resume without the cut at single spaces until it is
   full: English, then Korean, then multilingual text, 2 : 3 : 1. A superword joins tokens where a
   word starts, so each of these ids is a token of several words and the shares are exact.

Where the report is silent:
chosen: "most frequent" counts the new pattern's pre-tokens in NFC, so baseline tokens that can no
longer be formed go first.
chosen: a superword spans at most ``max_superword_words`` words (4, as in the SuperBPE authors'
runs), holds no colon before a word (their other barrier) and no part of a character at a join.
chosen: NFC by the library's tables, which are those of Unicode 9. A combining mark of a later
version keeps the place where it is written; what is decoded is equivalent to the text even then.
chosen: a category whose text is too small for its new subwords leaves the rest to all text; a
group without text leaves its superwords to the other groups, with a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from kexa.config import TokenizerConfig
from kexa.tokenizer import bpe
from kexa.tokenizer.pre_tokens import encode
from kexa.tokenizer.splitter import count_pre_tokens, require_text
from kexa.tokenizer.vocabulary import (
    BASELINE_CATEGORIES,
    BASELINE_WORDS,
    CATEGORIES,
    PHRASES,
    SUPERWORD_GROUPS,
    WORDS,
    baseline_size,
    budget,
)

Corpora = Mapping[str, Iterable[str]]

# In byte-level strings U+0120 is the space, U+010A the line feed, U+0109 the tab and U+010D the
# carriage return.
_BOUNDARY = re.compile("(?<=[^\u0120\u010a\u0109\u010d])\u0120(?=[^\u0120\u010a\u0109\u010d])")
_WORD_START = re.compile("\u0120[^\u0120\u010a\u0109\u010d]")


def train_baseline(corpora: Corpora, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer to compare with: ``baseline_ratio * vocab_size`` tokens, no superwords.

    Args:
        corpora: documents by category; the categories in ``BASELINE_CATEGORIES`` are read.

    Raises:
        ValueError: unknown category, no text, a document that is not valid Unicode, a vocabulary
            too small for its parts, or too little text for its size.
    """
    corpora = _checked(corpora)
    if not set(corpora) & set(BASELINE_CATEGORIES):
        raise ValueError(
            f"the baseline reads {', '.join(BASELINE_CATEGORIES)}; the corpora hold only "
            f"{', '.join(corpora)}"
        )
    budget(config)  # refuses a vocabulary that is too small
    texts = _texts(corpora, BASELINE_CATEGORIES)
    return bpe.train(texts, baseline_size(config), BASELINE_WORDS, "NFKC")


def train_tokenizer(
    corpora: Corpora, config: TokenizerConfig, baseline: Tokenizer | None = None
) -> Tokenizer:
    """Train the K-EXAONE tokenizer: ``config.vocab_size`` tokens that stock libraries load.

    Args:
        corpora: documents by category (``en ko es de ja vi code stem``). Each is read several
            times and never held: give an object that reads its files afresh whenever it is
            iterated. A generator can be read only once, so it is first copied into a list.
        baseline: a result of :func:`train_baseline` on the same corpora; trained here when absent.

    Raises:
        ValueError: unknown category, no text, a document that is not valid Unicode, a vocabulary
            too small for its parts, or too little text for its size.
    """
    corpora = _checked(corpora)
    sizes = budget(config, corpora)
    for group in (g for g in SUPERWORD_GROUPS if g not in sizes.superwords):
        warnings.warn(
            f"no text for superwords in {group!r}; the other groups share them", stacklevel=2
        )
    baseline = baseline or train_baseline(corpora, config)

    vocab, merges = bpe.parts(baseline)
    words = count_pre_tokens(_texts(corpora, BASELINE_CATEGORIES), WORDS)
    usage = encode(vocab, merges, words).usage(len(vocab))
    vocab, merges = bpe.keep_most_frequent(usage, vocab, merges, sizes.kept)
    missing = 0
    for category, count in sizes.new.items():
        words = count_pre_tokens(_texts(corpora, [category]), WORDS)
        missing += count - bpe.resume(vocab, merges, encode(vocab, merges, words), count)
    if missing:
        words = count_pre_tokens(_texts(corpora, corpora), WORDS)
        learned = bpe.resume(vocab, merges, encode(vocab, merges, words), missing)
        bpe.require("the last new subwords", learned, missing)
    for group, count in sizes.superwords.items():
        phrases = count_pre_tokens(_texts(corpora, SUPERWORD_GROUPS[group]), PHRASES)
        text = _joined_at_words(encode(vocab, merges, phrases), vocab)
        learned = bpe.resume(
            vocab, merges, text, count, lambda token: words_in(token) <= config.max_superword_words
        )
        bpe.require(f"superwords in {group!r}", learned, count)
    assert len(vocab) == config.vocab_size
    return bpe.build(vocab, merges, PHRASES, "NFC")


def words_in(token: str) -> int:
    """Number of words that a byte-level token string spans; 2 or more makes it a superword."""
    return 1 + len(_BOUNDARY.findall(token))


def _joined_at_words(text: bpe.Encoded, vocab: list[str]) -> bpe.Encoded:
    """Allow joins only where a word starts, between whole characters, and none after a colon."""
    starts = np.array([bool(_WORD_START.match(token)) and bpe.is_text(token) for token in vocab])
    may_precede = np.array([":" not in token and bpe.is_text(token) for token in vocab])
    starts_next = np.append(starts[text.ids[1:]], False)[: len(text.ids)]
    return replace(text, joined=text.joined & may_precede[text.ids] & starts_next)


def _checked(corpora: Corpora) -> dict[str, Iterable[str]]:
    """Categories that hold text, in the canonical order; every document is valid Unicode."""
    unknown = set(corpora) - set(CATEGORIES)
    if unknown:
        raise ValueError(f"unknown category {sorted(unknown)[0]!r}; use {', '.join(CATEGORIES)}")
    checked = {}
    for category in (c for c in CATEGORIES if c in corpora):
        documents = corpora[category]
        documents = list(documents) if iter(documents) is documents else documents
        has_text = False
        for i, document in enumerate(documents):
            require_text(document, f"document {i} of {category!r}")
            has_text = has_text or bool(document)
        if has_text:
            checked[category] = documents
        else:
            warnings.warn(f"category {category!r} has no text and is skipped", stacklevel=3)
    if not checked:
        raise ValueError(f"the corpora hold no text; give documents in {', '.join(CATEGORIES)}")
    return checked


def _texts(corpora: Corpora, categories: Iterable[str]) -> Iterator[str]:
    for category in categories:
        yield from corpora.get(category, ())
