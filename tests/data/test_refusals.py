"""Safety dialogues are balanced, reproducible, labelled as the rule judge reads them, and new."""

from collections import Counter

from kexa.data import refusals
from kexa.eval import safety
from kexa.eval.judge import declines

DRAWN = refusals.dialogues(240, seed=0)


def test_languages_and_kinds_are_balanced():
    counts = Counter((d.language, d.harmful) for d in DRAWN)
    assert len(counts) == 12
    assert set(counts.values()) == {20}
    assert refusals.dialogues(240, seed=0) == DRAWN != refusals.dialogues(240, seed=1)


def test_every_frame_stands_before_both_kinds():
    for language, phrases in refusals._PHRASES.items():
        drawn = [d for d in refusals.dialogues(2000, seed=2) if d.language == language]
        for frame in phrases.frames:
            before, after = frame.split("{}")
            framed = [
                d for d in drawn if d.request.startswith(before) and d.request.endswith(after)
            ]
            assert {d.harmful for d in framed} == {True, False}


def test_only_replies_to_harmful_requests_decline():
    assert all(declines(d.reply) == d.harmful for d in DRAWN)


def test_no_request_stands_in_the_safety_set():
    asked = {item.messages[-1]["content"] for item in safety.load()[1]}
    assert not asked & {d.request for d in refusals.dialogues(5000, seed=3)}
