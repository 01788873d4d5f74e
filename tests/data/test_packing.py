"""Batches are a pure function of the step, drop no token, and mix by weight."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from kexa.data import Document, Mixture, encode
from kexa.data.packing import MULTILINGUAL, TABLE, TokenizedDocuments, balanced

BOS = 1


def stream(lengths, first=10):
    """Documents of given lengths: BOS, then tokens that occur nowhere else."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(first, first + offsets[-1], dtype=np.int32)
    tokens[offsets[:-1]] = BOS
    return TokenizedDocuments(tokens, offsets)


def test_encode_opens_each_document_with_bos():
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    documents = [Document(t, "s", "en", "en", str(i)) for i, t in enumerate(("a b", "b"))]
    encoded = encode(tokenizer, documents)
    assert encoded.tokens.tolist() == [1, 2, 3, 1, 3]
    assert encoded.offsets.tolist() == [0, 3, 5]
    assert encoded.document(1).tolist() == [1, 3]
    with pytest.raises(ValueError, match="no documents"):
        encode(tokenizer, [])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_first_documents_are_the_stream_up_to_there(count):
    documents = stream([4, 1, 5])
    first = documents.first(count)
    assert len(first) == count
    assert first.tokens.tolist() == documents.tokens[: [0, 4, 5, 10][count]].tolist()
    for i in range(count):
        assert first.document(i).tolist() == documents.document(i).tolist()


def test_text_that_spells_a_control_token_does_not_produce_it():
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "<": 2, "user": 3, ">": 4, "<user>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<user>"])
    encoded = encode(tokenizer, [Document("<user>", "s", "en", "en", "1")])
    assert encoded.tokens.tolist() == [1, 2, 3, 4]
    assert tokenizer.encode("<user>").ids == [5]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    length=st.integers(1, 12),
    batch=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_one_epoch_of_rows_holds_every_token_once(lengths, length, batch):
    documents = stream(lengths)
    mixture = Mixture({"en": documents}, {"en": 1.0}, length, batch, seed=0)
    rows = torch.cat([mixture.batch(step)[0] for step in range(sum(lengths))]).flatten().tolist()
    whole = sum(lengths)
    epochs = [rows[i : i + whole] for i in range(0, len(rows) - whole + 1, whole)]
    assert epochs
    for epoch in epochs:
        assert sorted(epoch) == sorted(documents.tokens.tolist())


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), step=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_document_ids_change_exactly_where_a_document_starts(lengths, step):
    mixture = Mixture({"en": stream(lengths)}, {"en": 1.0}, 16, 2, seed=3)
    input_ids, document_ids = mixture.batch(step)
    assert document_ids[:, 0].eq(0).all()
    assert torch.equal(document_ids[:, 1:] != document_ids[:, :-1], input_ids[:, 1:] == BOS)


def test_a_batch_depends_on_seed_and_step_alone():
    streams = {"en": stream([40, 7, 13]), "ko": stream([25, 25], first=1000)}
    make = lambda seed: Mixture(streams, {"en": 2, "ko": 1}, 8, 4, seed)  # noqa: E731
    one, two = make(5), make(5)
    forward = [one.batch(s)[0] for s in range(30)]
    backward = [two.batch(s)[0] for s in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(torch.cat(forward), torch.cat([make(6).batch(s)[0] for s in range(30)]))


def test_rows_follow_the_weights_exactly_over_the_table():
    streams = {"en": stream([50]), "ko": stream([50], first=1000), "vi": stream([50], first=2000)}
    mixture = Mixture(streams, {"en": 5, "ko": 3, "vi": 2}, 4, 8, seed=0)
    counts = Counter(name for step in range(TABLE // 8) for name in mixture.row_sources(step))
    assert counts == {"en": TABLE / 2, "ko": round(0.3 * TABLE), "vi": round(0.2 * TABLE)}
    input_ids, _ = mixture.batch(7)
    for row, name in zip(input_ids, mixture.row_sources(7), strict=True):
        assert (row.max() < 1000) == (name == "en")


def test_epochs_come_in_different_orders_and_the_table_may_wrap():
    documents = stream([3, 3, 3, 3, 3, 3])
    mixture = Mixture({"en": documents}, {"en": 1}, 18, 1, seed=0)
    assert not torch.equal(mixture.batch(0)[0], mixture.batch(1)[0])
    late = mixture.batch(TABLE + 5)[0]
    assert sorted(late.flatten().tolist()) == sorted(documents.tokens.tolist())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"xx": 1.0}, "name 'xx'"),
        ({"en": 0.0}, "not all zero"),
        ({"en": -1.0}, "non-negative"),
        ({}, "not all zero"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"en": stream([5])}, weights, 4, 1, 0)


SIZES = {"en": 900, "es": 400, "de": 100, "ja": 100, "vi": 25, "code": 1}


def test_a_group_of_languages_is_shared_out_by_size_and_temperature():
    by_size = balanced({"en": 0.5, "multilingual": 0.5}, SIZES, 1.0)
    assert by_size == pytest.approx(
        {"en": 0.5, "es": 0.32, "de": 0.08, "ja": 0.08, "vi": 0.02}, abs=1e-12
    )
    rooted = balanced({"multilingual": 9.0}, SIZES, 2.0)  # 20 : 10 : 10 : 5
    assert rooted == pytest.approx({"es": 4.0, "de": 2.0, "ja": 2.0, "vi": 1.0}, abs=1e-12)
    even = balanced({"multilingual": 1.0}, SIZES, 1e9)
    assert even == pytest.approx(dict.fromkeys(MULTILINGUAL, 0.25), abs=1e-6)


def test_weights_without_a_group_come_back_as_they_are():
    assert balanced({"en": 0.9, "vi": 0.1}, SIZES, 2.0) == {"en": 0.9, "vi": 0.1}


def test_groups_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match=r"language_temperature=0 must be above 0"):
        balanced({"multilingual": 1.0}, SIZES, 0)
    with pytest.raises(ValueError, match=r"name 'ja' and \"multilingual\", which contains it"):
        balanced({"multilingual": 1.0, "ja": 0.1}, SIZES, 2.0)
    with pytest.raises(ValueError, match=r"\"multilingual\" but no stream is one of"):
        balanced({"multilingual": 1.0}, {"en": 5}, 2.0)
