"""Each step removes what is planted for it and nothing else; what it removed is told by source."""

import pytest

from kexa.data.cleaning import EXAMPLES, STEPS, Cleaner, clean, effect_table
from kexa.data.document import Document
from kexa.data.sources import SourceError
from tests.data.test_filters import ENGLISH, FRENCH, KOREAN, TEXTS

QUESTION = "Which of the following bodies of the solar system is the closest to the sun at noon?"
ITEMS = {"quiz/1": QUESTION}
FERRY = (
    "In the spring of the year the ferry is painted in green, and that is a work for the whole "
    "crew: the captain takes the brush for the name on the bow, as it was always done by him."
)
PLANTED = {  # step: text that it removes
    "is_text": ENGLISH + "\ud800",
    "has_length": "Short.",
    "has_script": "Открыть файл и закрыть окно, а потом сохранить документ. " * 4,
    "is_language": FRENCH,
    "has_variety": "\n".join(["The same line of the text is here again"] * 9),
    "has_fresh_phrases": "The same words of the song are sung once more and then " * 12,
    "has_own_text": "Accept all cookies to read the news of the day on this page\n" * 2
    + "Read the privacy policy and the terms of use of the site\nSign in to see more of it",
    "has_little_markup": ENGLISH + "<td class='x'>of the</td>" * 8,
    "has_few_symbols": ENGLISH + " === --- *** /// " * 10,
    "is_unlabelled": ENGLISH + " The text of this page was AI-generated.",
    "exact_duplicates": ENGLISH,
    "near_duplicates": ENGLISH.replace("monks", "nuns"),
    "decontaminate": f"It is the question of the day. {QUESTION.upper()} {ENGLISH[60:]}",
}


def document(text: str, name: str, source: str = "web", category: str = "en") -> Document:
    return Document(text, source, category, category, f"{source}/{name}")


def test_every_step_removes_what_is_planted_for_it():
    good = [document(text, c, category=c) for c, text in TEXTS.items()]
    bad = [document(text, step) for step, text in PLANTED.items()]
    masked = document("Write to the editor of the page: jane@mail.org. " + FERRY, "address")
    kept, effects = clean([*good, *bad, masked], STEPS, ITEMS)
    assert kept[:-1] == good
    assert kept[-1].text == masked.text.replace("jane@mail.org", "PI:EMAIL")
    removed = {e.step: e.examples for e in effects if e.removed}
    assert {step: [e.split(": ")[0] for e in examples] for step, examples in removed.items()} == {
        step: [f"web/{step}"] for step in PLANTED
    }
    [change] = [e for e in effects if e.changed]
    assert (change.step, change.removed, change.changed, change.bytes) == ("mask_personal", 0, 1, 5)
    assert [e.step for e in effects] == [s for s in STEPS if s in PLANTED or s == "mask_personal"]


def test_read_is_kept_plus_removed_by_source_and_bytes_add_up():
    documents = [
        document(text, f"{name}/{i}", source)
        for source in ("a", "b")
        for i in range(5)
        for name, text in {"short": "Short.", "good": f"{ENGLISH} {i} {source}"}.items()
    ]
    kept, effects = clean(documents, ("is_text", "has_length", "exact_duplicates"))
    assert len(kept) == 10
    assert [(e.step, e.source, e.removed, e.bytes) for e in effects] == [
        ("has_length", "a", 5, 30),
        ("has_length", "b", 5, 30),
    ]
    assert all(len(e.examples) == EXAMPLES for e in effects)


def test_duplicates_are_named_with_what_they_repeat():
    first, again = document(KOREAN, "1", "a", "ko"), document(KOREAN, "2", "b", "ko")
    near = document(KOREAN.replace("책임", "믿음"), "3", "b", "ko")
    asked = document(PLANTED["decontaminate"], "4")
    _, effects = clean([first, again, near, asked], STEPS, ITEMS)
    assert {e.step: e.examples for e in effects} == {
        "exact_duplicates": ["b/2: equals a/1"],
        "near_duplicates": ["b/3: resembles a/1"],
        "decontaminate": ["web/4: repeats quiz/1"],
    }


def test_the_table_has_a_line_for_each_effect():
    _, effects = clean([document(t, s) for s, t in PLANTED.items()], STEPS, ITEMS)
    head, *lines = effect_table(effects)
    assert head.startswith("step ")
    assert head.endswith("example")
    assert [line.split()[:4] for line in lines] == [[e.step, "web", "en", "1"] for e in effects]
    assert effect_table([]) == [head]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("is_text", "has_lenght"), r"data.steps names 'has_lenght'; the steps are: is_text, "),
        (("is_text", "has_length", "has_length"), r"names 'has_length' twice"),
        (("has_length", "is_text"), r"must begin with 'is_text'"),
        ((), r"data.steps is \[\]; it must begin with 'is_text'"),
        (("is_text", "decontaminate"), r"'decontaminate' but there are no evaluation items"),
    ],
)
def test_a_list_of_steps_that_cannot_work_is_refused(steps, message):
    with pytest.raises(SourceError, match=message):
        Cleaner(steps, {})


def test_bad_input_is_counted_and_never_crashes():
    bad = {
        "nul": ENGLISH + "\0",
        "invalid": (ENGLISH.encode() + b"\xff\xfe").decode("utf-8", "replace"),
        "surrogate": "\udcff" + ENGLISH,
        "long line": "a line of the text that never ends and " * 60_000,
        "empty": "",
    }
    kept, effects = clean([document(text, name) for name, text in bad.items()], STEPS, ITEMS)
    assert kept == []
    assert {(e.step, e.removed) for e in effects} == {("is_text", 3), ("has_length", 2)}


def test_a_text_of_any_length_passes_through_every_step():
    """Without the length filter a line of 7 MB meets all the others."""
    words = [f"w{i}" for i in range(1_000_000)]
    line = document(" ".join(words), "long")
    assert line.bytes > 7_000_000
    steps = [s for s in STEPS if s not in ("has_length", "is_language")]
    kept, _ = clean([line], steps, ITEMS)
    assert kept == [line]
