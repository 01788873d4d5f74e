"""The public tokenizers: their sizes, ids that are known, and text that comes back."""

import unicodedata
from unittest import mock

import pytest
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from kexa import config
from kexa.data import SourceError, sources
from kexa.tokenizer import public, utf8_bytes

NAMES = config.load("smoke").comparison.public
SIZES = {"tekken": 130_072, "o200k": 199_998, "qwen": 151_643}  # what their owners state


@pytest.fixture(scope="module")
def loaded():
    return {name: public.load_public(name) for name in NAMES}


def test_every_profile_compares_with_all_of_them():
    readers = {
        path.stem
        for path in (config.ROOT / "data_cards").glob("*.md")
        if sources.load_card(path.stem).reader in public.TOKENIZER_READERS
    }
    for profile in ("smoke", "laptop", "h100", "full"):
        assert set(config.load(profile).comparison.public) == readers


def test_sizes(loaded):
    assert {name: each.size for name, each in loaded.items()} == SIZES
    assert [each.label for each in loaded.values()] == [
        "tekken (130K)",
        "o200k (200K)",
        "qwen (152K)",
    ]


def test_known_ids(loaded):
    assert loaded["o200k"].encode(["hello world"]) == [[24912, 2375]]
    assert loaded["qwen"].encode(["hello world"]) == [[14990, 1879]]
    assert loaded["tekken"].encoding.decode_single_token_bytes(0) == b"\0"
    assert [len(ids) for ids in loaded["tekken"].encode(["hello world", "12"])] == [2, 2]


def test_the_pattern_of_o200k_is_the_library_s():
    module = tiktoken_ext.openai_public
    with mock.patch.object(module, "load_tiktoken_bpe", return_value={}):
        assert module.o200k_base()["pat_str"] == public.O200K_PATTERN


def test_text_comes_back(loaded, corpora):
    texts = [text for documents in corpora.values() for text in documents[:5]]
    for each in loaded.values():
        rows = each.encode(texts)
        assert each.decode(rows) == [unicodedata.normalize("NFC", text) for text in texts]
        assert each.token_counts(texts).tolist() == [len(row) for row in rows]
        assert (each.token_counts(texts) <= utf8_bytes(texts)).all()


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_comes_back(loaded, text):
    for each in loaded.values():
        form = each.normalization
        wanted = unicodedata.normalize(form, text) if form else text
        assert each.decode(each.encode([text])) == [wanted]


def test_special_tokens_are_ordinary_text(loaded):
    for each in loaded.values():
        assert each.token_counts(["<|endoftext|>"])[0] > 1


def test_a_card_of_something_else_is_refused():
    with pytest.raises(
        SourceError, match="humaneval.md names reader 'programming_problems'.*tekken"
    ):
        public.load_public("humaneval")


def test_without_cache_and_index_source_and_command_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KEXA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(SourceError, match="'qwen' is not in the cache.*pip download.*dashscope=="):
        public.load_public("qwen")
