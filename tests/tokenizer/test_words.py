"""Words of a text by number: counts, order, and what nothing is learned across."""

import numpy as np

from kexa.tokenizer.words import END, read_words


def test_words_counts_and_order_by_hand(tmp_path):
    words = read_words(["a b a", "b"], "en", tmp_path / "order")
    assert words.strings == ["", "a", " b", " a", "b"]
    assert words.by_count() == {"a": 1, " b": 1, " a": 1, "b": 1}
    [order] = words.chunks()
    assert order.tolist() == [1, 2, 3, END, 4, END]


def test_a_placeholder_is_no_word_and_ends_what_stands_before_it(tmp_path):
    words = read_words(["mail PI:EMAIL now"], "en", tmp_path / "order")
    order = np.concatenate(list(words.chunks()))
    assert [words.strings[i] for i in order] == ["mail", " ", "", " now", ""]
