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

import itertools
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer

from kexa.config import TokenizerConfig
from kexa.tokenizer import bpe
from kexa.tokenizer.pre_tokens import encode
from kexa.tokenizer.runs import Runs
from kexa.tokenizer.splitter import require_text
from kexa.tokenizer.vocabulary import (
    BASELINE_CATEGORIES,
    BASELINE_WORDS,
    CATEGORIES,
    PHRASES,
    SUPERWORD_GROUPS,
    baseline_size,
    budget,
)
from kexa.tokenizer.words import Words, read_words

Corpora = Mapping[str, Iterable[str]]

# In byte-level strings U+0120 is the space, U+010A the line feed, U+0109 the tab and U+010D the
# carriage return.
_BOUNDARY = re.compile("(?<=[^\u0120\u010a\u0109\u010d])\u0120(?=[^\u0120\u010a\u0109\u010d])")


def train_baseline(corpora: Corpora, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer to compare with: ``baseline_ratio * vocab_size`` tokens, no superwords.

    Args:
        corpora: documents by category; the categories in ``BASELINE_CATEGORIES`` are read.

    Raises:
        ValueError: unknown category, no text, a document that is not valid Unicode, a vocabulary
            too small for its parts, or too little text for its size.
    """
    budget(config)  # refuses a vocabulary that is too small
    corpora, has_text = _named(corpora), {}
    for category, documents in corpora.items():
        for i, document in enumerate(documents):
            require_text(document, f"document {i} of {category!r}")
            has_text[category] = has_text.get(category, False) or bool(document)
    return _baseline(_with_text(corpora, has_text), config)


def train_tokenizer(
    corpora: Corpora, config: TokenizerConfig, baseline: Tokenizer | None = None
) -> Tokenizer:
    """Train the K-EXAONE tokenizer: ``config.vocab_size`` tokens that stock libraries load.

    Args:
        corpora: documents by category (``en ko es de ja vi code stem``). Each is read several
            times and never held: give an object that reads its files afresh whenever it is
            iterated. A generator can be read only once, so it is first copied into a list. The
            order of the words stays in temporary files meanwhile, about a byte for a byte of text.
        baseline: a result of :func:`train_baseline` on the same corpora; trained here when absent.

    Raises:
        ValueError: unknown category, no text, a document that is not valid Unicode, a vocabulary
            too small for its parts, or too little text for its size.
    """
    budget(config)  # refuses a vocabulary that is too small
    corpora = _named(corpora)
    with tempfile.TemporaryDirectory() as folder:
        texts = {c: read_words(corpora[c], c, Path(folder) / c) for c in corpora}
        corpora = _with_text(corpora, {c: len(text.strings) > 1 for c, text in texts.items()})
        baseline = baseline or _baseline(corpora, config)
        vocab, merges = _grown(*bpe.parts(baseline), {c: texts[c] for c in corpora}, config)
    return bpe.build(vocab, merges, PHRASES, "NFC")


def words_in(token: str) -> int:
    """Number of words that a byte-level token string spans; 2 or more makes it a superword."""
    return 1 + len(_BOUNDARY.findall(token))


def _baseline(corpora: dict[str, Iterable[str]], config: TokenizerConfig) -> Tokenizer:
    read = [c for c in BASELINE_CATEGORIES if c in corpora]
    if not read:
        raise ValueError(
            f"the baseline reads {', '.join(BASELINE_CATEGORIES)}; the corpora hold only "
            f"{', '.join(corpora)}"
        )
    documents = itertools.chain.from_iterable(corpora[c] for c in read)
    return bpe.train(documents, baseline_size(config), BASELINE_WORDS, "NFKC")


def _grown(
    vocab: list[str], merges: list[bpe.Merge], texts: dict[str, Words], config: TokenizerConfig
) -> tuple[list[str], list[bpe.Merge]]:
    """Steps 1 to 3: the baseline's vocabulary and merges made those of K-EXAONE."""
    sizes = budget(config, texts)
    for group in (g for g in SUPERWORD_GROUPS if g not in sizes.superwords):
        warnings.warn(
            f"no text for superwords in {group!r}; the other groups share them", stacklevel=3
        )
    usage = sum(
        encode(vocab, merges, texts[c].by_count()).usage(len(vocab))
        for c in BASELINE_CATEGORIES
        if c in texts
    )
    vocab, merges = bpe.keep_most_frequent(usage, vocab, merges, sizes.kept)
    missing = 0
    for category, count in sizes.new.items():
        words = encode(vocab, merges, texts[category].by_count())
        missing += count - bpe.resume(vocab, merges, words, count)
    if missing:
        words = sum((Counter(text.by_count()) for text in texts.values()), Counter())
        learned = bpe.resume(vocab, merges, encode(vocab, merges, words), missing)
        bpe.require("the last new subwords", learned, missing)
    for group, count in sizes.superwords.items():
        members = [texts[c] for c in SUPERWORD_GROUPS[group] if c in texts]
        learned = bpe.resume(
            vocab,
            merges,
            Runs(members, vocab, merges),
            count,
            lambda token: words_in(token) <= config.max_superword_words,
        )
        bpe.require(f"superwords in {group!r}", learned, count)
    assert len(vocab) == config.vocab_size
    return vocab, merges


def _named(corpora: Corpora) -> dict[str, Iterable[str]]:
    """Categories in the canonical order, their documents in a form that can be read again."""
    unknown = set(corpora) - set(CATEGORIES)
    if unknown:
        raise ValueError(f"unknown category {sorted(unknown)[0]!r}; use {', '.join(CATEGORIES)}")
    found = {c: corpora[c] for c in CATEGORIES if c in corpora}
    return {c: list(texts) if iter(texts) is texts else texts for c, texts in found.items()}


def _with_text(
    corpora: dict[str, Iterable[str]], has_text: Mapping[str, bool]
) -> dict[str, Iterable[str]]:
    """The categories that hold text."""
    for category in (c for c in corpora if not has_text.get(c)):
        warnings.warn(f"category {category!r} has no text and is skipped", stacklevel=3)
    if not any(has_text.values()):
        raise ValueError(f"the corpora hold no text; give documents in {', '.join(CATEGORIES)}")
    return {c: documents for c, documents in corpora.items() if has_text.get(c)}
