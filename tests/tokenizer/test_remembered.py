"""Strings and their tokens are remembered, also over a table that is full."""

import numpy as np
import pytest

from kexa.tokenizer import remembered
from kexa.tokenizer.cuts import codes_of
from kexa.tokenizer.remembered import Remembered


def encode(strings):
    """A token for each character, and one for the length."""
    rows = [[ord(c) for c in string] + [len(string)] for string in strings]
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    return np.array([token for row in rows for token in row], dtype=np.int32), sizes


def numbers(seen, text):
    """Of the words of a text; a word holds its space."""
    starts = np.array([0, *(i for i, c in enumerate(text) if c == " ")])
    sizes = np.diff(starts, append=len(text))
    seen.make_room(len(starts))
    return seen.numbers(text, codes_of(text), starts, sizes)


def test_each_string_is_encoded_once():
    asked = []
    seen = Remembered(lambda strings: asked.append(strings) or encode(strings), {"x": [7, 8]})
    x, ab, x_later, ab_later = numbers(seen, "x ab x ab").tolist()
    assert x == 0 and ab == ab_later
    plain, again = numbers(seen, "ab ab").tolist()
    assert again == ab and len({x, ab, x_later, plain}) == 4
    assert [sorted(strings) for strings in asked] == [[" ab", " x"], ["ab"]]
    tokens, sizes = seen.tokens(np.array([x, plain, x]))
    assert (tokens.tolist(), sizes.tolist()) == ([7, 8, 97, 98, 2, 7, 8], [2, 3, 2])
    first, last = seen.ends(np.array([plain, x]))
    assert (first.tolist(), last.tolist()) == ([97, 7], [2, 8])


@pytest.mark.parametrize("limit", ["STRINGS", "CHARACTERS"])
def test_a_full_table_is_started_afresh(monkeypatch, limit):
    monkeypatch.setattr(remembered, "STRINGS", 3)
    monkeypatch.setattr(remembered, limit, 1)
    seen = Remembered(encode, {"x": [7]})
    for text in ("x a bc", "x bc def g", "bc a x"):
        tokens, _ = seen.tokens(numbers(seen, text))
        wanted = [
            [7] if w == "x" else encode([w])[0].tolist() for w in text.replace(" ", "| ").split("|")
        ]
        assert tokens.tolist() == [token for row in wanted for token in row]
    assert len(seen._table) < 8
