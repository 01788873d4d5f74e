"""Verifiers on right, wrong and unreadable answers, and on anything a model may write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.post import tasks
from kexa.post.rewards import (
    AtMostCharacters,
    BoxedInteger,
    CountedUp,
    EndsInQuestion,
    ListOf,
    NoCommas,
    RepeatedWord,
)

CASES = [
    (BoxedInteger(12), "\\boxed{12}", "right"),
    (BoxedInteger(12), "It is \\boxed{3}, no: \\boxed{ 12 }.", "right"),
    (BoxedInteger(12), "\\boxed{012}", "right"),
    (BoxedInteger(-4), "\\boxed{-4}", "right"),
    (BoxedInteger(12), "\\boxed{21}", "wrong"),
    (BoxedInteger(12), "\\boxed{12} or \\boxed{13}", "wrong"),
    (BoxedInteger(12), "12", "unreadable"),
    (BoxedInteger(12), "\\boxed{}", "unreadable"),
    (BoxedInteger(12), "\\boxed{12", "unreadable"),
    (BoxedInteger(12), "\\boxed{twelve}", "unreadable"),
    (BoxedInteger(12), "\\boxed{" + "1" * 5000 + "}", "unreadable"),
    (BoxedInteger(12), "\\boxed{１２}", "unreadable"),
    (RepeatedWord("cat", 3), "cat cat cat", "right"),
    (RepeatedWord("cat", 3), "Cat, cat, cat.", "right"),
    (RepeatedWord("수박", 2), "수박 수박", "right"),
    (RepeatedWord("cat", 3), "cat cat", "wrong"),
    (RepeatedWord("cat", 3), "cat cat cat cat", "wrong"),
    (RepeatedWord("cat", 3), "catcatcat", "wrong"),
    (RepeatedWord("cat", 3), "the cat cat cat", "wrong"),
    (RepeatedWord("cat", 3), " ... ", "unreadable"),
    (ListOf(3, "commas"), "red, green, blue.", "right"),
    (ListOf(2, "commas"), "赤、青", "right"),
    (ListOf(3, "commas"), "red, green", "wrong"),
    (ListOf(3, "commas"), "red, red, blue", "wrong"),
    (ListOf(3, "commas"), "red, , blue", "wrong"),
    (ListOf(2, "commas"), "red,\nblue", "wrong"),
    (ListOf(2, "commas"), "red\nblue", "wrong"),
    (ListOf(2, "commas"), ", ,", "unreadable"),
    (ListOf(2, "lines"), "red\nblue\n", "right"),
    (ListOf(2, "lines"), "- red\n- blue.", "right"),
    (ListOf(2, "lines"), "red, blue", "wrong"),
    (ListOf(2, "lines"), "red\n\nblue", "wrong"),
    (ListOf(3, "lines"), "red\nblue, green", "wrong"),
    (ListOf(2, "lines"), "red\nRed", "wrong"),
    (ListOf(2, "lines"), "\n", "unreadable"),
    (CountedUp(8, 11), "8, 9, 10, 11", "right"),
    (CountedUp(8, 10), "8、9、10。", "right"),
    (CountedUp(8, 11), "8, 9, 10", "wrong"),
    (CountedUp(8, 10), "8, 9, 10, 11", "wrong"),
    (CountedUp(8, 10), "10, 9, 8", "wrong"),
    (CountedUp(8, 10), "8, 9, ten", "wrong"),
    (CountedUp(8, 10), "8 9 10", "wrong"),
    (CountedUp(8, 10), "eight", "unreadable"),
    (AtMostCharacters(5), " Hello\n", "right"),
    (AtMostCharacters(5), "Hello.", "wrong"),
    (AtMostCharacters(5), "...", "unreadable"),
    (NoCommas(), "Yes. It is.", "right"),
    (NoCommas(), "Yes, it is.", "wrong"),
    (NoCommas(), "はい、そうです。", "wrong"),
    (NoCommas(), "", "unreadable"),
    (EndsInQuestion(), "Is it? ", "right"),
    (EndsInQuestion(), "そうですか？", "right"),
    (EndsInQuestion(), "Is it? Yes.", "wrong"),
    (EndsInQuestion(), "?", "unreadable"),
]


@pytest.mark.parametrize("check, answer, outcome", CASES)
def test_outcomes(check, answer, outcome):
    verdict = check(answer)
    assert verdict.outcome == outcome
    assert verdict.reward == (1.0 if outcome == "right" else 0.0)


checks = st.sampled_from(
    [
        BoxedInteger(7),
        RepeatedWord("bär", 2),
        ListOf(2, "lines"),
        CountedUp(7, 8),
        AtMostCharacters(9),
        NoCommas(),
        EndsInQuestion(),
    ]
)
pieces = st.sampled_from(["\\boxed{", "}", "7", "bär ", ", ", "말", "\n", "\\", "\x00", "\ud800"])
answers = st.text() | st.lists(pieces | st.text(max_size=3), max_size=12).map("".join)


@given(checks, answers)
def test_checks_never_raise(check, answer):
    assert check(answer).outcome in ("right", "wrong", "unreadable")


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_no_constant_answer_earns_much(family):
    """A reward that a fixed string collects teaches that string."""
    drawn = tasks.generate(family, "sft", 400, 1)
    constants = ["", "0", "\\boxed{}", "\\boxed{0}", "\\boxed{5}", "a", "a, b", "a, b, c", "yes."]
    for answer in constants:
        share = sum(t.check(answer).reward for t in drawn) / len(drawn)
        assert share < 0.15, (answer, share)
