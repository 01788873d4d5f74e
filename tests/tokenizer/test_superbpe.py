"""The exported tokenizer: shares, barriers, round trip, repeatability, files, bad input."""

import os
import re
import subprocess
import sys
import unicodedata
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.tokenizer import YOUNG, strings, unlike
from kexa.config import ROOT
from kexa.data.packing import literal
from kexa.tokenizer import (
    PHRASES,
    SPECIAL_TOKENS,
    WORDS,
    CorpusEncoder,
    bpe,
    budget,
    bytes_per_token,
    gain_interval,
    load,
    longest_superwords,
    overlap,
    renyi_efficiency,
    save,
    split,
    superword_usage,
    superwords,
    token_counts,
    train_baseline,
    train_tokenizer,
    usage,
    utf8_bytes,
)
from kexa.tokenizer.ranks import encode_with_ranks, load_ranks
from kexa.tokenizer.splitter import nfc
from kexa.tokenizer.superbpe import words_in
from kexa.tokenizer.vocabulary import PLACEHOLDERS
from tests.tokenizer.conftest import WORDS as VOCABULARY
from tests.tokenizer.conftest import documents


def test_the_superwords_are_exactly_the_last_ids(tokenizer, config):
    ranges = budget(config).ranges()
    expected = [i for part, ids in ranges.items() if part.startswith("superwords") for i in ids]
    assert list(superwords(tokenizer)) == expected
    assert tokenizer.get_vocab_size() == config.vocab_size


def test_superwords_keep_the_barriers(tokenizer, config):
    for text in superwords(tokenizer).values():
        assert len(text.split()) <= config.max_superword_words
        assert not any(c in "\n\r:" or c.isdigit() for c in text)
        assert "\ufffd" not in text


def test_every_merge_joins_earlier_tokens(tokenizer):
    vocab, merges = bpe.parts(tokenizer)
    rank = {token: i for i, token in enumerate(vocab)}
    for left, right in merges:
        assert max(rank[left], rank[right]) < rank[left + right]


def test_kept_tokens_come_from_the_baseline_in_its_order(tokenizer, baseline, config):
    vocab, old = bpe.parts(tokenizer)[0], bpe.parts(baseline)[0]
    kept = [vocab[i] for i in budget(config).ranges()["kept"]]
    assert kept == [token for token in old if token in set(kept)]
    assert overlap(tokenizer, baseline) >= (384 + len(kept)) / len(old)


def test_superwords_only_join_tokens_of_stage_one(tokenizer, corpora, config):
    """Without superwords the cuts are finer, never elsewhere."""
    vocab, merges = bpe.parts(tokenizer)
    first = budget(config).ranges()["superwords en"].start
    stage_one = bpe.build(
        vocab[:first], [m for m in merges if words_in("".join(m)) == 1], WORDS, "NFC"
    )

    def ends(tokens):
        return {sum(map(len, tokens[: i + 1])) for i in range(len(tokens))}

    for texts in corpora.values():
        for text in texts[:5]:
            fine, coarse = stage_one.encode(text).tokens, tokenizer.encode(text).tokens
            assert ends(coarse) <= ends(fine)


def test_baseline_has_no_superwords(baseline, config):
    assert not superwords(baseline)
    assert baseline.get_vocab_size() == round(config.vocab_size * config.baseline_ratio)


def test_bytes_per_token_rise_in_every_category(tokenizer, baseline, corpora):
    for texts in corpora.values():
        assert bytes_per_token(tokenizer, texts) > bytes_per_token(baseline, texts)


# -- round trip

UNICODE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=sorted(YOUNG)))
MIXED = st.lists(
    st.one_of(
        UNICODE,
        st.sampled_from(SPECIAL_TOKENS),
        st.sampled_from(["\u0338", "\u0301", "<|user", "|>", " ", "\n\n", "the of and", "할 수"]),
    )
).map("".join)


@settings(max_examples=1000)
@given(text=MIXED, literal=st.booleans())
def test_decoding_an_encoding_gives_nfc(tokenizer, text, literal):
    tokenizer.encode_special_tokens = literal
    ids = tokenizer.encode(text).ids
    tokenizer.encode_special_tokens = False
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    if literal:
        special = [SPECIAL_TOKENS[i] for i in ids if i < len(SPECIAL_TOKENS)]
        assert special == re.findall("|".join(PLACEHOLDERS), nfc(text))


def test_every_scalar_value_survives(tokenizer):
    """Assigned or not, alone and beside others."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [" x".join(characters[i : i + 4096]) for i in range(0, len(characters), 4096)]
    assert unlike(tokenizer, texts) == []


def test_thirty_thousand_strings_survive(tokenizer, corpora):
    """A million: ``python -m benchmarks.tokenizer round-trip``."""
    documents = [text for texts in corpora.values() for text in texts]
    assert unlike(tokenizer, strings(30_000, 1, documents)) == []


def test_marks_that_only_python_orders_are_few_and_young():
    assert len(YOUNG) < 200
    assert not [c for c in YOUNG if c < "\u07fd" or unicodedata.category(c)[0] not in "ML"]


def test_special_tokens_are_read_where_they_are_written(tokenizer):
    ids = tokenizer.encode("<|user|>\nhi<|endofturn|>").ids
    assert ids[0] == 51
    assert ids[-1] == 53


# -- repeatability and files


def test_neither_thread_count_nor_hash_seed_matters(tokenizer, tmp_path):
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.tokenizer.conftest import CONFIG, WORDS, documents\n"
        "from kexa.tokenizer import train_tokenizer\n"
        "print(train_tokenizer({c: documents(c) for c in WORDS}, CONFIG).to_str(), end='')"
    )
    expected = tokenizer.to_str()
    for threads in ("1", "3"):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, check=True
        )
        assert done.stdout.decode() == expected


def test_stock_libraries_load_it_with_equal_ids(tokenizer, corpora, tmp_path):
    from transformers import AutoTokenizer

    save(tokenizer, tmp_path)
    loaded, stock = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.to_str() == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str()
    samples = [texts[0] for texts in corpora.values()] + ["<|user|>\nhi <|user|\u0338>", "\0", ""]
    for text in samples:
        ids = tokenizer.encode(text).ids
        assert loaded.encode(text).ids == ids
        assert stock(text)["input_ids"] == ids
        assert stock.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
        literal = stock(text, split_special_tokens=True)["input_ids"]
        assert not any(i < len(SPECIAL_TOKENS) for i in literal)
    assert (stock.pad_token_id, stock.bos_token_id, stock.eos_token_id) == (0, 1, 53)


def test_three_exports_and_the_corpus_encoder_give_equal_ids(tokenizer, corpora, tmp_path):
    from transformers import AutoTokenizer

    save(tokenizer, tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stock = AutoTokenizer.from_pretrained(tmp_path)
    ranks = load_ranks(tmp_path / "ranks.tiktoken")
    drawn = strings(1500, 2, [text for texts in corpora.values() for text in texts])
    texts = [nfc(text) for text in drawn] + [texts[0] for texts in corpora.values()]
    rows = [row.tolist() for row in CorpusEncoder(library).encode_batch(texts)]
    with literal(library):
        assert rows == [e.ids for e in library.encode_batch(texts)]
    assert rows == stock(texts, split_special_tokens=True)["input_ids"]
    assert rows == [encode_with_ranks(ranks, split(PHRASES, text)) for text in texts]


def test_stock_chat_template_gives_the_ids_of_our_renderer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    from kexa.data.chat import encode_chat

    save(tokenizer, tmp_path)
    messages = [{"role": "user", "content": "the of"}, {"role": "assistant", "content": "and to"}]
    stock = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages)
    assert stock["input_ids"] == encode_chat(tokenizer, messages)[0]


def test_loading_from_the_wrong_place_says_so(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json in .*; run notebook 01_tokenizer"):
        load(tmp_path)


# -- metrics


def test_metrics_by_hand(tokenizer, config):
    assert utf8_bytes(["ab", "é"]).tolist() == [2, 2]
    assert token_counts(tokenizer, ["<|user|>", ""]).tolist()[1] == 0
    assert token_counts(tokenizer, ["<|user|>"])[0] > 1  # literal text, not the special token
    text = "the of and to in"
    ids = tokenizer.encode(text).ids
    assert bytes_per_token(tokenizer, [text]) == pytest.approx(len(text) / len(ids))
    assert sum(usage(tokenizer, [text], budget(config)).values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="bytes per token of no text"):
        bytes_per_token(tokenizer, [""])


def test_superword_shares_by_hand(tokenizer):
    longest = longest_superwords(tokenizer, 5)
    sizes = [len(text.encode()) for _, text in longest]
    assert (
        sizes == sorted((len(t.encode()) for t in superwords(tokenizer).values()), reverse=True)[:5]
    )
    (token_id, text), word = longest[0], "the"
    assert tokenizer.encode(text).ids == [token_id]
    alone = len(tokenizer.encode(word).ids)
    assert superword_usage(tokenizer, [text, word]) == pytest.approx(1 / (1 + alone))
    with pytest.raises(ValueError, match="share of superwords of no text"):
        superword_usage(tokenizer, [])


def test_renyi_efficiency_by_hand(tokenizer):
    size = tokenizer.get_vocab_size()
    assert renyi_efficiency(tokenizer, ["1111"]) == pytest.approx(0)
    # Digits stand alone: "1" twice, "2" and "3" once, so the sum of p^2 is 3/8.
    two = renyi_efficiency(tokenizer, ["1213"], alpha=2)
    assert two == pytest.approx(np.log(8 / 3) / np.log(size))
    shannon = renyi_efficiency(tokenizer, ["1213"], alpha=1)
    assert shannon == pytest.approx(1.5 * np.log(2) / np.log(size))
    assert renyi_efficiency(tokenizer, ["1213"], alpha=1.0001) == pytest.approx(shannon, rel=1e-3)
    with pytest.raises(ValueError, match="alpha=0 must be positive"):
        renyi_efficiency(tokenizer, ["1"], alpha=0)
    with pytest.raises(ValueError, match="Rényi efficiency of no text"):
        renyi_efficiency(tokenizer, [""])


def test_gain_interval_of_a_constant_ratio_has_no_width():
    gain = gain_interval(np.array([15, 30, 60]), np.array([10, 20, 40]), seed=0)
    assert gain == pytest.approx((0.5, 0.5, 0.5))


# -- bad input


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ({}, "the corpora hold no text"),
        ({"fr": ["bonjour"]}, "unknown category 'fr'; use en, ko"),
        ({"en": [b"bytes"]}, "document 0 of 'en' is bytes, not str"),
        ({"en": ["fine", "a\ud800b"]}, "document 1 of 'en' holds the lone surrogate U\\+D800"),
        ({"ja": ["日本"]}, "the baseline reads en, ko, es;"),
        ({"en": ["too short"]}, "lower tokenizer.vocab_size"),
    ],
)
def test_bad_text_is_a_clear_error(corpora, message, config):
    with pytest.raises(ValueError, match=message):
        train_baseline(corpora, config)


@pytest.mark.parametrize("train", [train_baseline, train_tokenizer])
def test_a_vocabulary_too_small_is_a_clear_error(train, corpora, config):
    with pytest.raises(ValueError, match="vocab_size=400 leaves .* raise vocab_size"):
        train(corpora, replace(config, vocab_size=400))


def test_an_empty_category_is_skipped_by_name(corpora, config):
    with pytest.warns(UserWarning, match="category 'vi' has no text and is skipped"):
        train_tokenizer(corpora | {"vi": ["", ""]}, config)


def test_a_missing_group_leaves_its_superwords_to_the_others(corpora, config):
    part = {c: corpora[c] for c in ("en", "ko", "code")}
    with pytest.warns(UserWarning, match="no text for superwords in 'multilingual'"):
        tokenizer = train_tokenizer(part, replace(config, vocab_size=800))
    assert len(superwords(tokenizer)) == 160


def test_text_too_small_for_the_superwords_is_a_clear_error(corpora, config):
    few = corpora | {"ko": corpora["ko"][:2]}
    with pytest.raises(ValueError, match=r"superwords in 'ko': the text supplies \d+ of 100 "):
        train_tokenizer(few, config)


def test_a_source_is_read_and_not_kept(corpora, config, tokenizer):
    """Training asks for the documents again and again, and holds none of them."""
    alive, most = weakref.WeakSet(), 0

    class Text(str):
        __slots__ = ("__weakref__",)

    class Source:
        def __init__(self, texts):
            self.texts = texts

        def __iter__(self):
            nonlocal most
            for text in self.texts:
                made = Text(text)
                alive.add(made)
                most = max(most, len(alive))
                yield made

    again = train_tokenizer({c: Source(texts) for c, texts in corpora.items()}, config)
    assert again.to_str() == tokenizer.to_str()
    assert most < len(corpora["en"])


@pytest.mark.parametrize("size", [2_000, 3_000])
def test_a_trained_vocabulary_has_its_shares(size, config):
    rich = {c: documents(c, count=400, made=2000) for c in VOCABULARY}
    config = replace(config, vocab_size=size)
    baseline = train_baseline(rich, config)
    trained = train_tokenizer(rich, config, baseline)
    found, sizes = superwords(trained), budget(config)
    assert trained.get_vocab_size() == size
    assert abs(len(found) / size - 0.2) <= 0.005
    assert list(found) == list(range(size - sum(sizes.superwords.values()), size))
    assert overlap(trained, baseline) >= 0.7 - 0.005


def test_generators_and_nul_are_fine(corpora, config, tokenizer):
    texts = {c: corpora[c] for c in corpora}
    again = train_tokenizer({c: (t for t in texts[c]) for c in texts}, config)
    assert again.to_str() == tokenizer.to_str()
    with_nul = texts | {"en": ["the\0of", *texts["en"]]}
    assert train_tokenizer(with_nul, config).decode(tokenizer.encode("\0").ids) == "\0"
