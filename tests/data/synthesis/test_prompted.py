"""Replies of a model: what is kept, what is dropped, and why."""

import pytest

from kexa.data.synthesis import Endpoint
from kexa.data.synthesis.endpoint import Reply
from kexa.data.synthesis.prompted import carry, carry_fault, numbers, think, think_fault
from kexa.data.synthesis.provenance import Text

ENGLISH = "The total area is 99,720 square kilometres.\n3 × 4 = 12"
GERMAN = "Die gesamte Fläche beträgt 99.720 Quadratkilometer.\n3 × 4 = 12"
DOCUMENT = "The river Thames flows through London.\nIt is 346 kilometres long. Ships use it."
THOUGHT = 'The length of the river is given: "It is 346 kilometres long." So it is a long river.'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-3 and 1,024.5 km, 3 times", {"3": 2, "10245": 1}),
        ("99,720; 99.720; 99 720", {"99720": 2, "99": 1, "720": 1}),
        ("\uff11\uff12 and 12.", {"12": 2}),
        ("none", {}),
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("reply", "language", "fault"),
    [
        (GERMAN, "de", ""),
        ("전체 면적은 99,720제곱킬로미터이다.\n3 × 4 = 12", "ko", ""),
        ("", "de", "empty reply"),
        (ENGLISH, "de", "not in German"),
        (GERMAN, "ko", "not in Korean"),
        (GERMAN.replace("99.720", "99.270"), "de", "other numbers than the source"),
        (GERMAN.replace("\n3 × 4 = 12", ""), "de", "other numbers than the source"),
        (GERMAN + "\ufffd", "de", "characters that are no text"),
        (GERMAN + "\x00", "de", "characters that are no text"),
        (GERMAN + " Als KI-Modell kann ich das.", "de", "speaks of itself as a machine"),
        (GERMAN + " 12", "de", "other numbers than the source"),
        (
            "전체 면적은 9만 9720제곱킬로미터이다.\n3 × 4 = 12",
            "ko",
            "other numbers than the source",
        ),
    ],
)
def test_translations(reply, language, fault):
    assert carry_fault(ENGLISH, Reply(reply, True), language) == fault


def test_a_source_that_comes_back():
    assert carry_fault("Oslo 12", Reply("Oslo 12", True), "de") == "not translated"
    assert carry_fault(ENGLISH, Reply(GERMAN, False), "de") == "cut off"


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (THOUGHT, ""),
        (f"1. {THOUGHT}\n2. That is all of the text.", ""),
        (f"Step 1: {THOUGHT}", ""),
        (THOUGHT.replace('"It is', "“It  is").replace('long."', "long.”"), ""),
        ("The river is long and it is in the text.", "no quotation"),
        (THOUGHT.replace("346", "364"), "a quotation that is not in the document"),
        (THOUGHT + " That is 215 miles.", "a number that is not in the document"),
        (
            '"It is 346 kilometres long." 그래서 이 강은 아주 길고 배가 다닌다고 한다.',
            "not in English",
        ),
        ("", "empty reply"),
    ],
)
def test_thinking(reply, fault):
    assert think_fault(DOCUMENT, Reply(reply, True), "en") == fault


def test_a_quotation_may_run_over_a_line_break():
    reply = Reply('The text says this: "flows through London. It is 346 kilometres long"', True)
    assert think_fault(DOCUMENT, reply, "en") == ""


def test_what_is_asked_and_what_is_made(server, cache):
    def answer(body, _):
        return 200, {}, GERMAN if "into German" in body["messages"][0]["content"] else THOUGHT

    url, requests = server(answer)
    endpoint = Endpoint(url, "tiny")
    assert carry(endpoint, Text(ENGLISH, "en", "s/1"), "de", 0) == Text(GERMAN, "de", "s/1")
    assert think(endpoint, Text(DOCUMENT, "en", "s/2"), 0) == Text(
        f"{DOCUMENT}\n\n{THOUGHT}", "en", "s/2"
    )
    prompts = [body["messages"][0]["content"] for _, _, body in requests]
    assert f"<text>\n{ENGLISH}\n</text>" in prompts[0]
    assert f"<document>\n{DOCUMENT}\n</document>" in prompts[1] and "Write in English" in prompts[1]
    assert carry(endpoint, Text(ENGLISH, "en", "s/1"), "ko", 0) == "not in Korean"
