"""The fast splitter against the library's regular expressions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from kexa.tokenizer import PHRASES, WORDS, split
from kexa.tokenizer.splitter import Splitter, count_pre_tokens, nfc, require_text
from kexa.tokenizer.vocabulary import BASELINE_WORDS

PATTERNS = {"words": WORDS, "phrases": PHRASES, "baseline": BASELINE_WORDS}
TRICKY = st.text(" \n\r\t\x1c\x85'sStTlLvVeEſK\u0301aé1.:/한あ\U0001f600\U00010400")


@pytest.fixture(scope="module", params=PATTERNS.values(), ids=PATTERNS)
def pattern(request):
    return request.param


def test_every_character_of_the_basic_plane_is_classed_as_the_library_does(pattern):
    fast = Splitter(pattern)
    plane = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    for shape in ("a{} {}b", "'{} x", "{}{}\n"):
        for i in range(0, len(plane), 1024):
            text = "".join(shape.format(c, c) for c in plane[i : i + 1024])
            assert fast(text) == split(pattern, text)


@given(text=st.one_of(st.text(), TRICKY))
def test_pieces_are_those_of_the_library(pattern, text):
    pieces = Splitter(pattern)(text)
    assert pieces == split(pattern, text)
    assert "".join(pieces) == text


def test_counts_by_hand():
    counts = count_pre_tokens(["a b a", nfc("cafe\u0301 a")], WORDS)
    assert counts == {"a": 1, " b": 1, " a": 2, "caf\u00e9": 1}
    assert count_pre_tokens(iter([]), WORDS) == {}


def test_nfc_leaves_ascii_alone():
    assert nfc("a\0b") == "a\0b"
    assert nfc("e\u0301\u1112\u1161\u11ab") == "\u00e9\ud55c"


@given(
    text=st.one_of(
        st.text(), st.text("eE\u00e9\u1ebf\u0301\u0323\u1112\u1161\u11ab\ud55c\ud558\u212b")
    )
)
def test_nfc_is_that_of_the_library(text):
    assert nfc(text) == normalizers.NFC().normalize_str(text)


def test_nfc_of_every_pair_that_the_library_composes():
    """Also of every character between letters."""
    library = normalizers.NFC().normalize_str
    for c in (chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000):
        apart = normalizers.NFD().normalize_str(c)
        for text in (f"a{c}\u00e9", apart, f"{apart[0]}\u00e9{apart[1:]}"):
            if nfc(text) != library(text):
                raise AssertionError(f"U+{ord(c):04X}: {nfc(text)!r} is not {library(text)!r}")


def test_what_has_no_utf8_form_is_refused_by_name():
    require_text("a\0b", "document 3")
    with pytest.raises(ValueError, match="document 3 is bytes, not str; decode it as UTF-8 first"):
        require_text(b"\xff", "document 3")
    with pytest.raises(ValueError, match="document 3 holds the lone surrogate U.D800 at charac"):
        require_text("a\ud800b", "document 3")
