"""The cuts found with masks against the library's regular expression."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kexa.tokenizer import WORDS, cuts, joins, split

NASTY = st.text(
    " \n\r\t\x00\x1c\x85\u3000'sStTlLvVeErRmMdD\u017fK"
    "\u0301\u0308a\u00e91\u0663.:/-한あ\U0001f600\U00010400"
)


def pieces(texts):
    """The pieces of all texts with what stands between them, and which of them are words."""
    between = chr(cuts.END)
    text = between + "".join(t + between for t in texts)
    starts, is_word = cuts.word_starts(cuts.codes_of(text))
    ends = [*starts[1:].tolist(), len(text)]
    return [text[a:b] for a, b in zip(starts.tolist(), ends, strict=True)], is_word.tolist()


def expected(texts):
    found = [chr(cuts.END)]
    for text in texts:
        found += [*split(WORDS, text), chr(cuts.END)]
    return found, [piece != chr(cuts.END) and joins.sides(piece)[0] for piece in found]


def is_left_to_the_library(texts):
    between = chr(cuts.END)
    text = between + "".join(t + between for t in texts)
    return cuts.word_starts(cuts.codes_of(text)) is None


@settings(max_examples=500)
@given(texts=st.lists(st.one_of(NASTY, st.text()), max_size=3))
def test_pieces_are_those_of_the_library(texts):
    if is_left_to_the_library(texts):
        assert any("'" in text and cuts.codes_of(text).max() > 0x2FF for text in texts)
    else:
        assert pieces(texts) == expected(texts)


def test_only_a_mark_after_a_contraction_is_left_to_the_library():
    assert is_left_to_the_library(["fine", "it's\u0301"])
    for text in ("its\u0301", "it's \u0301", "it'x\u0301", "it's", "..'s\u0301", " 's\u0301"):
        assert not is_left_to_the_library([text])
        assert pieces([text]) == expected([text])


def test_every_character_is_classed_as_the_library_does():
    """Before and after a letter, a space, punctuation and a line break."""
    characters = [chr(c) for c in range(0, 0x110000, 5) if not 0xD800 <= c < 0xE000]
    for shape in ("a{} {}b", ".{}\n{} \n", "'{} x{}1"):
        texts = [
            "|".join(shape.format(c, c) for c in characters[i : i + 256])
            for i in range(0, len(characters), 256)
        ]
        assert pieces(texts) == expected(texts)


def test_a_corpus_is_cut_as_the_library_does(corpora):
    documents = [text for texts in corpora.values() for text in texts]
    assert pieces(documents) == expected(documents)


def test_codes_are_characters():
    assert np.array_equal(cuts.codes_of("a\ud800\U0001f600"), [97, 0xD800, 0x1F600])
