"""Two tokenizers on the same text: equal bytes, equal models, and bits counted for every byte."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa import config
from kexa.data import Document
from kexa.tokenizer import PHRASES, SPECIAL_TOKENS, bpe
from kexa.train.comparison import (
    bits_per_byte_interval,
    document_bits,
    first_bytes,
    packed,
    paired_model,
    parameter_counts,
    passages,
    train_with,
)
from tests.train.conftest import CONFIG, checkpoint_times

MODEL = dataclasses.replace(CONFIG, num_nextn_predict_layers=0, max_position_embeddings=512)
COMPARISON = dataclasses.replace(
    config.load("smoke").comparison, steps=12, batch_size=2, row_bytes=60, model=MODEL
)
CPU = torch.device("cpu")


def tokenizer(*merges):
    vocab = [*SPECIAL_TOKENS, *bpe.byte_alphabet(), *(left + right for left, right in merges)]
    return bpe.build(vocab, list(merges), PHRASES, "NFC")


BYTES = tokenizer()
PAIRS = tokenizer(("a", "b"), ("c", "d"), ("ab", "cd"))


def documents(*texts):
    return [Document(text, "made", "en", "en", f"made/{i}") for i, text in enumerate(texts)]


TEXTS = documents(*("ab cd " * n + "abcd. 한" for n in (3, 9, 1, 14, 6, 11, 2)))


@given(text=st.text(), size=st.integers(4, 40))
def test_passages_are_the_text_in_pieces_of_the_size(text, size):
    pieces = passages(text, size)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode("utf-8")) <= size for piece in pieces)


def test_passages_are_cut_before_a_space_of_their_second_half():
    assert passages("one two three", 8) == ["one two", " three"]
    assert passages("a b" + "c" * 9, 8) == ["a bccccc", "cccc"]  # that space comes too soon
    assert passages("한국어", 4) == ["한", "국", "어"]
    assert passages("", 8) == []
    with pytest.raises(ValueError, match="passages of 3 bytes.*at least 4"):
        passages("text", 3)


def test_the_first_documents_that_fit_are_taken():
    texts = documents("aaaa", "bbbbbbbb", "한", "cc")
    assert [d.text for d in first_bytes(texts, 9)] == ["aaaa", "한", "cc"]
    with pytest.raises(ValueError, match="no document has at most 1 bytes"):
        first_bytes(texts, 1)


@pytest.mark.parametrize("each", [BYTES, PAIRS], ids=["bytes", "pairs"])
def test_every_document_is_read_once_in_the_same_order(each):
    rows, document_ids = packed(each, TEXTS, COMPARISON, seed=1)
    assert rows.shape == document_ids.shape
    read = each.decode(rows.flatten().tolist(), skip_special_tokens=False).split("[BOS]")[1:]
    order = np.random.default_rng([1, 0, 0]).permutation(len(TEXTS))
    assert read[: len(TEXTS)] == [TEXTS[i].text for i in order]
    tokens = sum(len(each.encode(d.text).ids) + 1 for d in TEXTS)
    assert 0 <= rows.numel() - tokens < len(rows)
    assert rows.shape == (24, math.ceil(tokens / 24))


def test_models_differ_in_the_rows_of_the_vocabulary_only():
    small, large = (
        paired_model(dataclasses.replace(MODEL, vocab_size=size), seed=3) for size in (50, 90)
    )
    vocabulary, theirs = {"model.embed_tokens.weight", "lm_head.weight"}, large.state_dict()
    for name, value in small.state_dict().items():
        assert name in vocabulary or torch.equal(value, theirs[name])
    (few, rest), (many, same) = parameter_counts(small), parameter_counts(large)
    assert (few, many, rest) == (2 * 50 * 16, 2 * 90 * 16, same)
    other = paired_model(dataclasses.replace(MODEL, vocab_size=50), seed=4)
    assert not torch.equal(other.lm_head.weight, small.lm_head.weight)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(other.state_dict()[name], small.state_dict()[name])


@torch.no_grad()
def bits_by_hand(model, each, text):
    ids = torch.tensor([[each.token_to_id("[BOS]"), *each.encode(text).ids]])
    shares = model(ids)[0, :-1].double().log_softmax(-1)
    return -float(shares.gather(1, ids[0, 1:, None]).sum()) / math.log(2)


@pytest.mark.parametrize("each", [BYTES, PAIRS], ids=["bytes", "pairs"])
def test_bits_of_a_document_are_those_of_its_passages(each):
    model = paired_model(dataclasses.replace(MODEL, vocab_size=each.get_vocab_size()), 0).eval()
    bits = document_bits(model, each, TEXTS, size=32)
    for document, measured in zip(TEXTS, bits, strict=True):
        pieces = passages(document.text, 32)
        by_hand = sum(bits_by_hand(model, each, piece) for piece in pieces)
        assert measured == pytest.approx(by_hand, rel=1e-5)
    alone = document_bits(model, each, TEXTS[3:4], size=32)
    assert alone == pytest.approx(bits[3:4], rel=1e-5)


def test_a_uniform_model_needs_the_bits_of_its_vocabulary():
    model = paired_model(dataclasses.replace(MODEL, vocab_size=BYTES.get_vocab_size()), 0)
    torch.nn.init.zeros_(model.lm_head.weight)
    bits = document_bits(model, BYTES, TEXTS, size=1000)
    sizes = np.array([d.bytes for d in TEXTS])
    assert bits == pytest.approx(sizes * math.log2(BYTES.get_vocab_size()), rel=1e-5)
    assert model.training


def test_interval_of_the_difference_in_bits_per_byte():
    sizes, one = np.array([10, 20, 30, 40]), np.array(["en"] * 4)
    before = sizes * 2.0
    same = bits_per_byte_interval(before, before - 0.5 * sizes, sizes, one, seed=0)
    assert same == pytest.approx((-0.5, -0.5, -0.5))  # every document gains alike: no spread
    mixed = bits_per_byte_interval(before, before + np.array([9, -9, 9, -9]), sizes, one, seed=0)
    assert mixed.estimate == 0
    assert mixed.low < 0 < mixed.high


def test_categories_are_resampled_each_by_itself():
    """Two that differ, whose documents do not: nothing is left to chance."""
    sizes, categories = np.array([10, 10, 10, 10]), np.array(["en", "ko", "en", "ko"])
    after = np.array([5.0, -3.0, 5.0, -3.0])
    found = bits_per_byte_interval(np.zeros(4), after, sizes, categories, seed=0)
    assert found == pytest.approx((0.1, 0.1, 0.1))


def test_a_model_learns_and_a_finished_run_is_read_back(tmp_path):
    shape = dataclasses.replace(MODEL, vocab_size=PAIRS.get_vocab_size())
    before = document_bits(paired_model(shape, 0), PAIRS, TEXTS, 60).sum()
    model = train_with(PAIRS, TEXTS, COMPARISON, 0, CPU, tmp_path)
    after = document_bits(model, PAIRS, TEXTS, 60)
    assert after.sum() < 0.8 * before
    written = checkpoint_times(tmp_path)
    assert written
    again = train_with(PAIRS, TEXTS, COMPARISON, 0, CPU, tmp_path)
    assert np.array_equal(document_bits(again, PAIRS, TEXTS, 60), after)
    assert checkpoint_times(tmp_path) == written
