"""The fast encoder against the stock one, document by document."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from kexa.data.packing import literal
from kexa.tokenizer import SPECIAL_TOKENS, CorpusEncoder, bpe, joins, remembered
from kexa.tokenizer.vocabulary import PHRASES

PIECES = [
    "the of and",
    " ",
    "\n\n",
    "할 수",
    "\u0301",
    "\u0338",
    "<|user|>",
    "PI:EMAIL",
    "of PI:PHONE_NUM the",
    "don't",
    "'S",
    "a's it",
]
DOCUMENT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PIECES))).map("".join)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return CorpusEncoder(tokenizer)


def stock(tokenizer, texts):
    with literal(tokenizer):
        return [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def as_lists(rows):
    return [row.tolist() for row in rows]


def test_every_document_has_the_ids_of_the_stock_encoder(tokenizer, baseline, corpora):
    documents = [text for texts in corpora.values() for text in texts]
    for each in (tokenizer, baseline):
        fast = CorpusEncoder(each)
        assert as_lists(fast.encode_batch(documents)) == stock(each, documents)
        assert as_lists(fast.encode_batch(documents[::-1])) == stock(each, documents[::-1])


@settings(max_examples=500)
@given(texts=st.lists(DOCUMENT, max_size=4))
def test_any_text_has_the_ids_of_the_stock_encoder(encoder, tokenizer, texts):
    rows = encoder.encode_batch(texts)
    assert as_lists(rows) == stock(tokenizer, texts)
    assert all(row.dtype == np.int32 for row in rows)


def test_phrases_of_frequent_words_have_the_ids_of_the_stock_encoder(encoder, tokenizer, corpora):
    """Words in any order: runs that training never saw, of any length."""
    rng = random.Random(0)
    words = sorted(
        {word for c in ("en", "ko", "es", "vi") for t in corpora[c] for word in t.split()}
    )
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(3000)]
    assert as_lists(encoder.encode_batch(texts)) == stock(tokenizer, texts)


def test_characters_from_the_whole_range(encoder, tokenizer):
    characters = [chr(c) for c in range(0, 0x110000, 17) if not 0xD800 <= c < 0xE000]
    texts = [" x".join(characters[i : i + 4096]) for i in range(0, len(characters), 4096)]
    assert as_lists(encoder.encode_batch(texts)) == stock(tokenizer, texts)


def test_special_tokens_are_ordinary_text(encoder):
    for row in encoder.encode_batch(["<|user|>hi<|endofturn|>", "[BOS]"]):
        assert min(row) >= len(SPECIAL_TOKENS)


def test_a_table_started_afresh_changes_nothing(tokenizer, corpora, monkeypatch):
    monkeypatch.setattr(remembered, "STRINGS", 50)
    fast = CorpusEncoder(tokenizer)
    for text in corpora["en"][:20]:
        assert as_lists(fast.encode_batch([text, text])) == stock(tokenizer, [text, text])


def test_an_interrupt_changes_nothing(tokenizer, corpora, monkeypatch):
    fast, texts = CorpusEncoder(tokenizer), corpora["ko"]
    fast.encode_batch(texts[:5])

    def interrupted(strings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fast._seen, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast.encode_batch(texts[5:10])
    assert as_lists(fast.encode_batch(texts)) == stock(tokenizer, texts)


def test_hashes_that_collide_change_nothing(tokenizer, corpora, monkeypatch):
    monkeypatch.setattr(joins, "HASH_BITS", 2)
    fast = CorpusEncoder(tokenizer)
    assert as_lists(fast.encode_batch(corpora["es"])) == stock(tokenizer, corpora["es"])


def test_merges_in_no_order_are_encoded_whole():
    """Across a space before within a word: "a b" is joined first, then "c" is."""
    space = "\u0120"
    alphabet = [*SPECIAL_TOKENS, *bpe.byte_alphabet()]
    merges = [(space, "b"), ("a", space + "b"), (f"a{space}b", "c")]
    vocab = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = bpe.build(vocab, merges, PHRASES, "NFC")
    texts = ["a bc a b a bcc", "c a bc"]
    assert as_lists(CorpusEncoder(tokenizer).encode_batch(texts)) == stock(tokenizer, texts)


def test_no_text_is_no_rows_and_empty_text_is_an_empty_row(encoder):
    assert encoder.encode_batch([]) == []
    assert as_lists(encoder.encode_batch(["", "a", ""]))[::2] == [[], []]


def test_a_document_without_a_break(encoder, tokenizer, corpora):
    words = " ".join(corpora["en"]).replace("\n", " ").replace(".", "").replace(",", "")
    texts = [words, "x" * 50_000, "の" * 20_000]
    assert as_lists(encoder.encode_batch(texts)) == stock(tokenizer, texts)


def test_bad_text_is_named(encoder):
    with pytest.raises(ValueError, match="text 1 holds the lone surrogate U.DC80"):
        encoder.encode_batch(["fine", "a\udc80"])
    with pytest.raises(ValueError, match="text 0 is bytes, not str"):
        encoder.encode_batch([b"\xff"])


def test_a_foreign_tokenizer_is_refused():
    foreign = Tokenizer(models.BPE())
    with pytest.raises(ValueError, match="cuts text by None, which is none of the patterns"):
        CorpusEncoder(foreign)
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(ValueError, match="cuts text by 'ByteLevel', which is none of"):
        CorpusEncoder(foreign)


def test_placeholders_alone_are_read_from_a_corpus(encoder, tokenizer):
    (row,) = encoder.encode_batch(["<|user|> writes to PI:EMAIL."])
    assert [i for i in row.tolist() if i < len(SPECIAL_TOKENS)] == [75]
    assert tokenizer.decode(row, skip_special_tokens=True) == "<|user|> writes to PI:EMAIL."
