"""Retention and resumption against plain counting."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.tokenizer import SPECIAL_TOKENS, bpe, split
from kexa.tokenizer.pre_tokens import encode
from kexa.tokenizer.splitter import count_pre_tokens

PATTERN = r"\S+|\s"
FIXED = [*SPECIAL_TOKENS, *bpe.byte_alphabet()]


def test_formed_counts_by_hand():
    # Used: abc 5 times, ab alone 2 times, c alone once. So ab is formed 7 times, c 6, a and b 7.
    vocab, merges = ["a", "b", "c", "ab", "abc"], [("a", "b"), ("ab", "c")]
    formed = bpe.formed_counts(np.array([0, 0, 1, 2, 5]), vocab, merges)
    assert formed.tolist() == [7, 7, 6, 7, 5]


def test_a_doubled_part_counts_twice():
    formed = bpe.formed_counts(np.array([0, 3]), ["a", "aa"], [("a", "a")])
    assert formed.tolist() == [6, 3]


@given(st.lists(st.integers(0, 1000), min_size=6, max_size=6), st.integers(0, 6))
def test_kept_tokens_bring_their_parts(usage, count):
    tokens = ["ab", "abc", "bc", "cd", "abcd", "dd"]
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "d"), ("abc", "d"), ("d", "d")]
    usage = np.array([0] * len(FIXED) + usage)
    kept, kept_merges = bpe.keep_most_frequent(usage, FIXED + tokens, merges, count)
    assert len(kept) == len(FIXED) + count
    assert [a + b for a, b in kept_merges] == kept[len(FIXED) :]
    assert all(a in kept and b in kept for a, b in kept_merges)


def pair_counts(runs: list[list[str]]) -> Counter:
    return Counter(pair for run in runs for pair in itertools.pairwise(run))


def merge(runs: list[list[str]], left: str, right: str) -> None:
    for run in runs:
        i = 0
        while i + 1 < len(run):
            if (run[i], run[i + 1]) == (left, right):
                run[i : i + 2] = [left + right]
            i += 1


@pytest.mark.parametrize("seed", range(5))
def test_every_resumed_merge_leads_the_counts_at_its_step(seed):
    """Against plain counting on lists, whatever the order of ties."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcd ", [5, 3, 2, 1, 3], k=40)) for _ in range(30)]
    runs = [list(word.replace(" ", "\u0120")) for text in texts for word in split(PATTERN, text)]
    vocab, merges = list(FIXED), []
    bpe.resume(vocab, merges, encode(FIXED, [], count_pre_tokens(texts, PATTERN)), 25)
    for left, right in merges:
        counts = pair_counts(runs)
        assert counts[left, right] == max(counts.values())
        merge(runs, left, right)
    assert vocab[len(FIXED) :] == list(dict.fromkeys(a + b for a, b in merges))


def test_resuming_compresses_as_training_in_one_go_does():
    words = ("low", "lower", "newer", "newest", "wider", "widest", "slow", "slower", "show")
    texts = [" ".join(words[: i % 9 + 1]) for i in range(200)]
    whole = bpe.train(texts, len(FIXED) + 20, r" ?\S+", "NFC")
    start = bpe.train(texts, len(FIXED) + 8, r" ?\S+", "NFC")
    vocab, merges = bpe.parts(start)
    bpe.resume(vocab, merges, encode(vocab, merges, count_pre_tokens(texts, r" ?\S+")), 12)
    resumed = bpe.build(vocab, merges, r" ?\S+", "NFC")
    lengths = [sum(len(t.encode(text).ids) for text in texts) for t in (whole, resumed)]
    assert lengths[0] == lengths[1]


def test_refused_tokens_take_no_place():
    vocab, merges = list(FIXED), []
    text = encode(vocab, merges, {"abcabc": 5})
    bpe.resume(vocab, merges, text, 2, accept=lambda token: len(token) <= 3)
    assert max(len(token) for token in vocab[len(FIXED) :]) == 3
    assert len(vocab) == len(FIXED) + 2


def test_resuming_stops_where_the_text_does():
    vocab, merges = list(FIXED), []
    assert bpe.resume(vocab, merges, encode(vocab, merges, {"abab": 1, "cd": 1}), 10) == 1
    assert vocab[len(FIXED) :] == ["ab"]


def test_whole_characters_are_told_from_parts():
    assert bpe.is_text("Ġthe")
    assert bpe.is_text("íķľ")  # the three bytes of one Korean syllable
    assert not bpe.is_text("íķ")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("asked", [3, 12, 40])
def test_cutting_rare_meetings_changes_no_merge(seed, asked, monkeypatch):
    """With any first floor the merges are those of the lowest."""
    rng = random.Random(seed)
    counts = {
        "".join(rng.choices("abcd", [5, 3, 2, 1], k=rng.randint(2, 12))): 1 for _ in range(80)
    }
    text = encode(FIXED, [], {word: rng.randint(1, 50) for word in counts})
    found = []
    for floor in (bpe.MIN_COUNT, 20, 10_000):
        monkeypatch.setattr(bpe, "_first_floor", lambda counts, asked, floor=floor: floor)
        vocab, merges = list(FIXED), []
        bpe.resume(vocab, merges, text, asked)
        found.append((vocab, merges))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == len(FIXED) + asked


def test_usage_weighs_each_pre_token_by_its_count():
    text = encode(FIXED, [], {"ab": 3, "b": 4})
    used = text.usage(len(FIXED))
    assert (used[FIXED.index("a")], used[FIXED.index("b")], used.sum()) == (3, 7, 10)


def test_too_little_text_is_a_clear_error():
    with pytest.raises(ValueError, match=r"supplies \d+ of 999 .* lower tokenizer.vocab_size"):
        bpe.train(["a b c"], 999, r"\S+|\s", "NFC")


def test_a_vocabulary_beyond_the_published_size_can_be_resumed():
    vocab = [*FIXED, *(f"<{i}>" for i in range(200_000))]
    left, right = len(vocab) - 1, len(vocab) - 2
    text = bpe.Encoded(np.array([left, right]), np.array([True, False]), np.array([3, 3]))
    merges = []
    assert bpe.resume(vocab, merges, text, 1) == 1
    assert merges == [("<199999>", "<199998>")]
    assert vocab[-1] == "<199999><199998>"
