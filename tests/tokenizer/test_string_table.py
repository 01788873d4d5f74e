"""Numbers of strings against a dictionary, also when all hashes are equal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.tokenizer import string_table
from kexa.tokenizer.string_table import StringTable, spans

BATCHES = st.lists(st.lists(st.text("ab\0\U0001f600", min_size=1, max_size=4), min_size=1))


def numbered(batches, between=0):
    """The numbers that the table gives, and those that a dictionary of the new ones gives."""
    table, known, found, wanted = StringTable(room=sum(map(len, batches))), {}, [], []
    for strings in batches:
        text = "".join(string + "." * between for string in strings)
        sizes = np.array([len(string) for string in strings])
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        numbers, new = table.number(codes, np.cumsum(sizes + between) - sizes - between, sizes)
        known |= {strings[i]: len(known) + k for k, i in enumerate(new.tolist())}
        found.append(numbers.tolist())
        wanted.append([known[string] for string in strings])
    assert len(table) == len(known) == len({s for strings in batches for s in strings})
    return found, wanted


@given(batches=BATCHES, between=st.integers(0, 2))
def test_numbers_are_those_of_a_dictionary(batches, between):
    found, wanted = numbered(batches, between)
    assert found == wanted


def test_equal_hashes_change_nothing(monkeypatch):
    monkeypatch.setattr(
        string_table, "_hashes", lambda codes, starts, sizes: np.zeros(len(starts), np.uint64)
    )
    batches = [["a", "b", "ab", "a"], ["ba", "b", "abc", "ab"], ["x", "a", "ba"]]
    for between in (0, 1):
        found, wanted = numbered(batches, between)
        assert found == wanted


@pytest.mark.parametrize("together", [1, 3])
def test_parts_of_a_batch_change_nothing(monkeypatch, together):
    monkeypatch.setattr(string_table, "_TOGETHER", together)
    found, wanted = numbered([["a", "b", "a", "c", "b"], ["c", "d"]])
    assert found == wanted


def test_spans_by_hand():
    assert spans(np.array([5, 1]), np.array([2, 3])).tolist() == [5, 6, 1, 2, 3]
    assert spans(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
