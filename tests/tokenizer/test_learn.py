"""Learning from counts against the library's trainer, which reads the text."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kexa.tokenizer import SPECIAL_TOKENS, bpe, train_baseline
from kexa.tokenizer.learn import learn
from kexa.tokenizer.vocabulary import BASELINE_CATEGORIES, BASELINE_WORDS, baseline_size


def in_the_library(rows: dict[str, int], asked: int, floor: int) -> list:
    """What the library's trainer learns, as rows of the characters' code points."""
    alphabet = {c for row in rows for c in row if len(row) > 1}
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + asked,
        min_frequency=floor,
        special_tokens=[],
        show_progress=False,
    )
    texts = [(row + " ") * count for row, count in rows.items() if len(row) > 1]
    tokenizer.train_from_iterator(texts, trainer)
    merges = bpe.parts(tokenizer)[1]
    return [(tuple(map(ord, left)), tuple(map(ord, right))) for left, right in merges]


@pytest.mark.parametrize(("asked", "floor"), [(5, 2), (40, 2), (200, 1), (40, 15)])
def test_merges_are_those_of_the_library(asked, floor):
    """Few letters, so that runs of one letter and tokens with two spellings are common."""
    for seed in range(100):
        rng = random.Random(seed)
        rows = {
            "".join(rng.choices("abcd", [5, 3, 2, 1], k=rng.randint(1, 14))): rng.randint(1, 20)
            for _ in range(rng.randint(1, 40))
        }
        ids = np.array([ord(c) for row in rows for c in row], np.int32)
        lengths = [len(row) for row in rows]
        joined = np.ones(len(ids), dtype=bool)
        joined[np.cumsum(lengths) - 1] = False
        counts = np.repeat(np.array(list(rows.values())), lengths)
        assert learn(ids, joined, counts, asked, floor) == in_the_library(rows, asked, floor)


def test_no_rows_give_no_merges():
    nothing = np.zeros(0, np.int32)
    assert learn(nothing, nothing.astype(bool), nothing.astype(np.int64), 5, 2) == []


def test_the_baseline_is_what_the_library_trains(corpora, config):
    """Special tokens in the text included: to the library each is one pre-token."""
    marked = corpora | {"en": [f"{text} PI:EMAIL xPI:EMAILx <think>" for text in corpora["en"]]}
    baseline = bpe.parts(train_baseline(marked, config))
    alphabet = bpe.byte_alphabet()
    library = bpe.build([*SPECIAL_TOKENS, *alphabet], [], BASELINE_WORDS, "NFKC")
    trainer = BpeTrainer(
        vocab_size=baseline_size(config),
        min_frequency=bpe.MIN_COUNT,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    library.train_from_iterator([t for c in BASELINE_CATEGORIES for t in marked[c]], trainer)
    assert baseline == bpe.parts(library)
