"""Two tokenizers: an EXAONE-4-style baseline and the K-EXAONE tokenizer that grows out of it.

Baseline: byte-level BPE inside words, NFKC, on Korean, English, Spanish and code.

K-EXAONE (reported: sizes, shares, NFC, SuperBPE):

1. *Retention.* Re-encode the whole new text with the baseline's merges and keep the 70% of its tokens that
   are formed most often; the merges a kept token passes through are kept by construction.
2. *New subwords.* Resume BPE inside words on the new languages, STEM and code until 80% of the vocabulary
   is full.
3. *Superwords* (SuperBPE, arXiv 2503.13423). Resume without the cut at single spaces until the vocabulary is
   full: English, then Korean, then multilingual text, 2 : 3 : 1. A superword joins tokens at word
   boundaries only, so each of these ids is a token of several words and the shares are exact.

Where the report is silent:
chosen: "most frequent" is counted on the new training text, cut by the new pattern, so baseline tokens that
the new pattern can no longer form go first.
chosen: a superword spans at most ``max_superword_words`` words (4, as in the SuperBPE authors' runs) and
starts after a colon, never on one.
chosen: a group of languages without text leaves its superwords to the other groups, with a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from tokenizers import Tokenizer

from kexa.config import TokenizerConfig
from kexa.tokenizer import bpe
from kexa.tokenizer.vocabulary import (
    BASELINE_CATEGORIES,
    BASELINE_WORDS,
    CATEGORIES,
    NEW_CATEGORIES,
    PHRASES,
    SUPERWORD_GROUPS,
    WORDS,
    baseline_size,
    budget,
)

Corpora = Mapping[str, Iterable[str]]

_SURROGATE = re.compile("[\ud800-\udfff]")
# In byte-level strings the space is U+0120, the line feed U+010A, the tab U+0109, the carriage return U+010D.
_BOUNDARY = re.compile("(?<=[^\u0120\u010a\u0109\u010d])\u0120(?=[^\u0120\u010a\u0109\u010d])")
_WORD_START = re.compile("\u0120[^\u0120\u010a\u0109\u010d]")


def train_baseline(corpora: Corpora, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer to compare with: ``baseline_ratio * vocab_size`` tokens, no superwords.

    Args:
        corpora: documents by category; the categories in ``BASELINE_CATEGORIES`` are read.

    Raises:
        ValueError: unknown category, no text, a document that is not valid Unicode, or too little text.
    """
    corpora = _checked(corpora)
    present = [c for c in BASELINE_CATEGORIES if c in corpora]
    if not present:
        raise ValueError(
            f"the baseline reads {', '.join(BASELINE_CATEGORIES)}, but the corpora hold only {', '.join(corpora)}"
        )
    return bpe.train(_texts(corpora, present), baseline_size(config), BASELINE_WORDS, "NFKC")


def train_tokenizer(corpora: Corpora, config: TokenizerConfig, baseline: Tokenizer | None = None) -> Tokenizer:
    """Train the K-EXAONE tokenizer: ``config.vocab_size`` tokens that stock libraries load.

    Args:
        corpora: documents by category (``en ko es de ja vi code stem``). Each is read several times, so a
            generator is first copied into a list.
        baseline: a result of :func:`train_baseline` on the same corpora; trained here when absent.

    Raises:
        ValueError: unknown category, no text, a document that is not valid Unicode, a vocabulary too small
            for its parts, or too little text for its size.
    """
    corpora = _checked(corpora)
    sizes = budget(config, _groups_with_text(corpora))
    baseline = baseline or train_baseline(corpora, config)

    vocab, merges = bpe.parts(baseline)
    text = bpe.encode(bpe.build(vocab, merges, WORDS, "NFC"), _texts(corpora, corpora))
    usage = np.bincount(text.ids, minlength=len(vocab))
    vocab, merges = bpe.keep_most_frequent(usage, vocab, merges, sizes.kept)

    fresh = [c for c in NEW_CATEGORIES if c in corpora] or list(corpora)
    text = bpe.encode(bpe.build(vocab, merges, WORDS, "NFC"), _texts(corpora, fresh))
    bpe.resume(vocab, merges, text, sizes.new, f"new subwords from {', '.join(fresh)}")

    for group, count in sizes.superwords.items():
        present = [c for c in SUPERWORD_GROUPS[group] if c in corpora]
        text = bpe.encode(bpe.build(vocab, merges, PHRASES, "NFC"), _texts(corpora, present))
        text = _joined_at_words(text, vocab)
        bpe.resume(
            vocab, merges, text, count, f"superwords from {', '.join(present)}",
            accept=lambda token: words_in(token) <= config.max_superword_words,
        )
    assert len(vocab) == sizes.total == config.vocab_size
    return bpe.build(vocab, merges, PHRASES, "NFC")


def words_in(token: str) -> int:
    """Number of words that a byte-level token string spans; 2 or more makes it a superword."""
    return 1 + len(_BOUNDARY.findall(token))


def _joined_at_words(text: bpe.Encoded, vocab: list[str]) -> bpe.Encoded:
    """Allow merges only where a new word starts, and none after a colon."""
    starts_word = np.array([bool(_WORD_START.match(token)) for token in vocab])
    has_colon = np.array([":" in token for token in vocab])
    next_starts = np.append(starts_word[text.ids[1:]], False)[: len(text.ids)]
    return bpe.Encoded(text.ids, text.joined & next_starts & ~has_colon[text.ids])


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
            if not isinstance(document, str):
                kind = type(document).__name__
                raise ValueError(f"document {i} of {category!r} is {kind}, not str; decode it as UTF-8 first")
            if found := _SURROGATE.search(document):
                raise ValueError(
                    f"document {i} of {category!r} holds the lone surrogate U+{ord(found[0]):04X} at character "
                    f"{found.start()}: it is not valid Unicode and cannot be written as UTF-8"
                )
            has_text = has_text or bool(document)
        if has_text:
            checked[category] = documents
        else:
            warnings.warn(f"category {category!r} has no text and is skipped", stacklevel=3)
    if not checked:
        raise ValueError(f"the corpora hold no text; give documents in {', '.join(CATEGORIES)}")
    return checked


def _groups_with_text(corpora: Corpora) -> tuple[str, ...]:
    groups = tuple(g for g, members in SUPERWORD_GROUPS.items() if any(c in corpora for c in members))
    if not groups:
        raise ValueError(f"superwords need text in a language; the corpora hold only {', '.join(corpora)}")
    for group in set(SUPERWORD_GROUPS) - set(groups):
        warnings.warn(
            f"no text for the superwords of {group!r}; its share goes to {', '.join(groups)}", stacklevel=3
        )
    return groups


def _texts(corpora: Corpora, categories: Iterable[str]) -> Iterator[str]:
    for category in categories:
        yield from corpora[category]
