"""Characters that never meet in a token, against all pieces of all tokens."""

import itertools

import numpy as np
import pytest

from kexa.tokenizer import bpe, neighbours
from kexa.tokenizer.cuts import codes_of
from kexa.tokenizer.neighbours import Neighbours


def byte_level(data):
    character = {byte: c for c, byte in bpe.byte_of_character().items()}
    return "".join(character[byte] for byte in data)


def apart(vocab, text):
    return Neighbours([*bpe.byte_alphabet(), *vocab]).apart(codes_of(text)).tolist()


def test_characters_by_hand():
    assert apart([byte_level(b"abc")], "abcab") == [False, False, False, True, False]
    assert apart([byte_level("한국".encode())], "한국한") == [False, False, True]
    assert apart([], "ab") == [False, True]
    assert apart([], "") == [False]


def test_parts_of_characters_hold_all_that_share_them_together():
    """The last byte of a syllable and the first of the next, as BPE on bytes may join them."""
    token = byte_level("국".encode()[-1:] + "한".encode()[:2])
    others = "국한", "국학", "곭한"  # U+AD6D ends in the byte of U+AD6D
    assert [apart([token], text)[1] for text in others] == [False] * 3
    assert apart([token], "국a")[1] and apart([token], "한한")[1]


@pytest.mark.parametrize("bits", [4, 20])
def test_no_token_of_a_trained_vocabulary_crosses_a_cut(tokenizer, corpora, monkeypatch, bits):
    """Every place of every token's occurrences in text, however full the table of hashes is."""
    monkeypatch.setattr(neighbours, "HASH_BITS", bits)
    vocab, _ = bpe.parts(tokenizer)
    known = Neighbours(vocab)
    texts = {c: "".join(corpora[c]) for c in ("ja", "ko", "vi")}
    for text in texts.values():
        places = np.flatnonzero(known.apart(codes_of(text)))
        ends = np.cumsum([len(c.encode()) for c in text])
        cut_bytes = set(ends[places - 1].tolist())
        encoding = bpe.build(*bpe.parts(tokenizer), r"[\s\S]+", "NFC").encode(text)
        token_ends = itertools.accumulate(len(t) for t in encoding.tokens)
        assert cut_bytes <= set(token_ends)
    assert bits == 4 or len(np.flatnonzero(known.apart(codes_of(texts["ja"])))) > 0
