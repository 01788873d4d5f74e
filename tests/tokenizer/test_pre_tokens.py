"""Pre-tokens one by one against the library, and long ones in windows."""

import copy
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.tokenizer import bpe, pre_tokens
from kexa.tokenizer.neighbours import Neighbours
from kexa.tokenizer.pre_tokens import PreTokenEncoder, encode
from tests.tokenizer.conftest import whole

ALPHABET = "ab\u00e9\ud55c\U0001f600 "


@pytest.fixture(scope="module")
def parts(tokenizer):
    return bpe.parts(tokenizer)


def uncut(encoder):
    """The same encoder, but windows are all that it is cut into."""
    other = copy.copy(encoder)
    other._neighbours = Neighbours([])
    other._neighbours.apart = lambda codes: np.zeros(len(codes), dtype=bool)
    return other


def test_cut_pre_tokens_come_back_in_their_places(parts):
    encoder, library = PreTokenEncoder(*parts), whole(*parts)
    strings = ["the", "\u6f22\u5b57\u3068\u4eee\u540d", "a", "\U0001f600\u00e9x", "the"]
    for _ in range(2):  # new, then remembered
        ids, sizes = encoder(strings)
        rows = np.split(ids, np.cumsum(sizes)[:-1])
        assert [row.tolist() for row in rows] == [e.ids for e in library.encode_batch(strings)]


def test_ids_and_ends_by_hand():
    vocab = ["a", "b", "c", "ab"]
    text = encode(vocab, [("a", "b")], {"abc": 2, "ba": 7})
    assert text.ids.tolist() == [3, 2, 1, 0]
    assert text.joined.tolist() == [True, False, True, False]
    assert text.counts.tolist() == [2, 2, 7, 7]
    nothing = encode(vocab, [], {})
    assert (len(nothing.ids), len(nothing.joined), len(nothing.counts)) == (0, 0, 0)


def test_long_pre_tokens_have_the_ids_of_the_library(parts, corpora, monkeypatch):
    encoder, library, rng = PreTokenEncoder(*parts), whole(*parts), random.Random(0)
    text = " ".join(corpora["en"] + corpora["ko"] + corpora["ja"]).replace("\n", " ")
    long = [text, "".join(rng.choices(text, k=30_000)), "the of " * 4000, "a" * 20_000, "한" * 9000]
    assert all(len(string) > pre_tokens.WINDOW for string in long)
    expected = [e.ids for e in library.encode_batch(["a b", *long, "c"])]
    for each in (encoder, uncut(encoder)):
        ids, lengths = each(["a b", *long, "c"])
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        assert [row.tolist() for row in rows] == expected


@given(
    st.text(ALPHABET, min_size=1, max_size=200),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=60),
    st.integers(1, 12),
)
def test_windows_agree_with_the_library_for_any_merges(text, pairs, window):
    """Random merges, most of them in no order that training would give."""
    vocab, merges = bpe.byte_alphabet(), []
    for i, j in pairs:
        left, right = vocab[i % len(vocab)], vocab[j % len(vocab)]
        if len(left + right) <= 8 and left + right not in vocab:
            merges.append((left, right))
            vocab.append(left + right)
    encoder = PreTokenEncoder(vocab, merges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pre_tokens, "WINDOW", window + 12)
        patch.setattr(pre_tokens, "OVERLAP", 12)
        for each in (encoder, uncut(encoder)):
            ids, lengths = each([text])
            assert ids.tolist() == whole(vocab, merges).encode(text).ids
            assert lengths.tolist() == [len(ids)]
