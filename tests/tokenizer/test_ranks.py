"""The ranks file: its bytes, its reader, and the ids it gives."""

import random

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from kexa.data.packing import literal
from kexa.tokenizer import SPECIAL_TOKENS, CorpusEncoder, bpe, save, split
from kexa.tokenizer.ranks import (
    encode_with_ranks,
    load_ranks,
    save_ranks,
    single_spelling,
    token_bytes,
)
from kexa.tokenizer.vocabulary import PHRASES
from tests.tokenizer.conftest import whole


@pytest.fixture(scope="module")
def ranks(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save(tokenizer, folder)
    return load_ranks(folder / "ranks.tiktoken")


def test_every_token_but_the_special_ones_has_its_id(ranks, tokenizer):
    assert sorted(ranks.values()) == list(range(len(SPECIAL_TOKENS), tokenizer.get_vocab_size()))
    assert {len(token) for token in ranks if ranks[token] < 384} == {1}
    for text in ("the", " and", "할", "\n"):
        for token in tokenizer.encode(text).tokens:
            assert ranks[token_bytes(token)] == tokenizer.token_to_id(token)
    assert b"".join(map(token_bytes, tokenizer.encode("한 \0é").tokens)) == "한 \0é".encode()


def test_merging_by_rank_by_hand():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert encode_with_ranks(ranks, ["abc", "abab", "", "c"]) == [5, 4, 4, 2]


def test_where_a_ranks_file_cannot_give_the_ids():
    """``a`` beside ``bc`` spells a token that only ``ab + c`` makes."""
    alphabet = bpe.byte_alphabet()
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    vocab = [*alphabet, "bc", "ab", "abc"]
    rank = {token_bytes(token): i for i, token in enumerate(vocab)}
    assert whole(vocab, merges).encode("abc").tokens == ["a", "bc"]
    assert encode_with_ranks(rank, ["abc"]) == [vocab.index("abc")]


def test_trained_merges_spell_each_token_once(tokenizer, baseline):
    assert single_spelling(tokenizer)
    assert single_spelling(baseline)
    doubled = bpe.build(
        [*SPECIAL_TOKENS, *bpe.byte_alphabet(), "ab", "bc", "abc"],
        [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],
        PHRASES,
        "NFC",
    )
    assert not single_spelling(doubled)


def test_ids_are_equal_on_the_corpus(ranks, tokenizer, corpora):
    texts = [texts[i] for texts in corpora.values() for i in range(4)]
    for text, row in zip(texts, CorpusEncoder(tokenizer).encode_batch(texts), strict=True):
        assert encode_with_ranks(ranks, split(PHRASES, text)) == row.tolist()


def test_ids_are_equal_on_tokens_in_any_order(ranks, tokenizer):
    rng, tokens = random.Random(0), sorted(ranks)
    for _ in range(2000):
        text = b"".join(rng.choices(tokens, k=4)).decode("utf-8", errors="ignore")
        text = tokenizer.normalizer.normalize_str(text)
        with literal(tokenizer):
            ids = tokenizer.encode(text).ids
        assert encode_with_ranks(ranks, split(PHRASES, text)) == ids


@settings(max_examples=300)
@given(text=st.text())
def test_ids_are_equal_on_any_text(ranks, tokenizer, text):
    text = tokenizer.normalizer.normalize_str(text)
    with literal(tokenizer):
        ids = tokenizer.encode(text).ids
    assert encode_with_ranks(ranks, split(PHRASES, text)) == ids


def test_tiktoken_gives_the_ids(ranks, tokenizer, corpora):
    encoding = tiktoken.Encoding("kexa", pat_str=PHRASES, mergeable_ranks=ranks, special_tokens={})
    texts = [text for documents in corpora.values() for text in documents]
    for text, row in zip(texts, CorpusEncoder(tokenizer).encode_batch(texts), strict=True):
        assert encoding.encode_ordinary(text) == row.tolist()


def test_a_bad_line_is_named(tmp_path, tokenizer):
    path = tmp_path / "ranks.tiktoken"
    save_ranks(tokenizer, tmp_path)
    for bad in ("YQ== x", "YQ==", "Y*== 5"):
        path.write_text(f"YQ== 0\n{bad}\n", encoding="ascii")
        with pytest.raises(ValueError, match="line 2 of ranks.tiktoken is .* not 'base64 rank'"):
            load_ranks(path)
