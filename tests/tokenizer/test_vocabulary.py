"""The published ids, the arithmetic of the shares, and what the split patterns cut."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.config import load
from kexa.tokenizer import PHRASES, SPECIAL_TOKENS, WORDS, budget, split
from kexa.tokenizer.vocabulary import apportion, baseline_size


def test_special_tokens_have_their_published_ids():
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 128
    published = {
        0: "[PAD]",
        1: "[BOS]",
        50: "<|system|>",
        51: "<|user|>",
        52: "<|assistant|>",
        53: "<|endofturn|>",
        54: "<think>",
        55: "</think>",
        66: "<|vision_pad|>",
        67: "<|image_pad|>",
        68: "<|video_pad|>",
        73: "<vision>",
        74: "</vision>",
    }
    assert {i: SPECIAL_TOKENS[i] for i in published} == published


def test_full_profile_has_the_published_sizes():
    config = load("full").tokenizer
    sizes = budget(config)
    assert baseline_size(config) == 102_405
    assert sizes.superwords == {"en": 10_240, "ko": 15_360, "multilingual": 5_120}
    assert sizes.kept == round(0.7 * (102_405 - 384))
    assert sum(len(ids) for ids in sizes.ranges().values()) == 153_600


@pytest.mark.parametrize(
    "size",
    [2_000, 2_001, 2_500, 3_333, 4_096, 6_144, 8_192, 16_000, 32_768, 65_537, 99_999, 153_600],
)
def test_shares_hold_at_every_size(config, size):
    _shares_hold(replace(config, vocab_size=size))


@given(st.integers(2_000, 153_600))
def test_shares_hold_at_any_size(config, size):
    _shares_hold(replace(config, vocab_size=size))


def _shares_hold(config):
    """Superwords 20% within half a point, 2 : 3 : 1 within 2%, 70% of the baseline kept."""
    sizes = budget(config)
    superwords = sum(sizes.superwords.values())
    assert sum(len(ids) for ids in sizes.ranges().values()) == config.vocab_size
    assert abs(superwords / config.vocab_size - 0.2) <= 0.005
    for group, share in {"en": 2 / 6, "ko": 3 / 6, "multilingual": 1 / 6}.items():
        assert abs(sizes.superwords[group] / (share * superwords) - 1) <= 0.02
    fixed = sizes.special + sizes.bytes
    assert (fixed + sizes.kept) / baseline_size(config) >= 0.7 - 0.005
    assert sizes.kept / (baseline_size(config) - fixed) >= 0.7 - 0.005


def test_ranges_follow_each_other(config):
    sizes = budget(config)
    ids = [i for part in sizes.ranges().values() for i in part]
    assert ids == list(range(config.vocab_size))
    assert sizes.ranges()["bytes"] == range(128, 384)
    assert list(sizes.ranges())[-3:] == [
        "superwords en",
        "superwords ko",
        "superwords multilingual",
    ]


def test_parts_without_text_leave_their_ids_to_the_others(config):
    whole, part = budget(config), budget(config, ["en", "ko", "code"])
    assert set(part.superwords) == {"en", "ko"}
    assert set(part.new) == {"code"}
    assert sum(part.superwords.values()) == sum(whole.superwords.values())
    assert sum(part.new.values()) == sum(whole.new.values())


def test_apportion_by_hand():
    assert apportion(10, {"a": 1, "b": 2}) == {"a": 3, "b": 7}
    assert apportion(819, {"en": 2, "ko": 3, "multilingual": 1}) == {
        "en": 273,
        "ko": 410,
        "multilingual": 136,
    }


@given(
    st.integers(0, 10_000),
    st.dictionaries(st.text(max_size=3), st.floats(0.01, 100), min_size=1, max_size=8),
)
def test_apportion_adds_up_and_is_within_one_of_exact(total, shares):
    parts = apportion(total, shares)
    assert sum(parts.values()) == total
    for name, part in parts.items():
        assert abs(part - total * shares[name] / sum(shares.values())) < 1 + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 500}, "vocab_size=500 leaves"),
        ({"superword_share": 0.0}, "0 for superwords"),
        ({"superword_share": 0.9}, "raise vocab_size or change the shares"),
        ({"superword_split": {"en": 1.0}}, "needs a positive share for each"),
        ({"superword_split": {"en": 1.0, "ko": 0.0, "multilingual": 1.0}}, "positive share"),
    ],
)
def test_shares_that_leave_no_room_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        budget(replace(config, **change))


def test_superwords_need_a_language(config):
    with pytest.raises(ValueError, match="superwords need text in a language, not only code"):
        budget(config, ["code"])


@pytest.mark.parametrize(
    ("text", "words", "phrases"),
    [
        ("Hello big world", ["Hello", " big", " world"], ["Hello big world"]),
        ("in 1997 it", ["in", " ", "1", "9", "9", "7", " it"], None),
        ("one  two", ["one", " ", " two"], None),
        ("a b\nc d", ["a", " b", "\n", "c", " d"], ["a b", "\n", "c d"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"], None),
        ("Name: the value", ["Name", ":", " the", " value"], ["Name", ":", " the value"]),
        ("don't you", ["don", "'t", " you"], None),
        ("f(x):\n", ["f", "(x", "):\n"], None),
        ("할 수 있다", ["할", " 수", " 있다"], ["할 수 있다"]),
        ("cafe\u0301 au", ["cafe\u0301", " au"], ["cafe\u0301 au"]),
    ],
)
def test_patterns_cut_where_they_should(text, words, phrases):
    assert split(WORDS, text) == words
    assert split(PHRASES, text) == (phrases or words)


@given(st.text())
def test_stage_one_cuts_wherever_stage_two_does(text):
    def cuts(pattern):
        ends, position = set(), 0
        for piece in split(pattern, text):
            position += len(piece)
            ends.add(position)
        return ends

    assert "".join(split(PHRASES, text)) == text
    assert cuts(PHRASES) <= cuts(WORDS)
