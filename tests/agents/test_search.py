"""Ranking, the two sub-agents, and what the compressor is for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.agents import towns
from kexa.agents.compressor import Compressor, Record, rewritten, transcript
from kexa.agents.episode import StopReason
from kexa.agents.policies import Meter, Reply, ShortMemory, call, say, silent
from kexa.agents.search import Index, Page, research
from kexa.agents.summarizer import EXCERPT, Summary, summarize


def answering(text):
    return lambda requests: [Reply(say(text)) for _ in requests]


def words(messages):
    return sum(len(m["content"].split()) for m in messages)


# -- search


def test_rare_terms_rank_first_and_ties_are_alphabetical():
    index = Index([Page("b", "red apple"), Page("a", "red apple"), Page("c", "red pear tree")])
    assert index.search("pear") == ["c"]
    assert index.search("apple") == ["a", "b"]
    assert index.search("red pear")[0] == "c"
    assert index.search("grape") == []
    assert Index([]).search("x") == []


def test_bm25_by_hand():
    # N = 2, n = 1, f = 1, len = 2 and 4 with mean 3 (the title counts): idf = log(1 + 1.5 / 1.5)
    index = Index([Page("t", "x"), Page("u", "y y y")])
    expected = 0.6931471805599453 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))
    assert index._score("t", {"x"}) == pytest.approx(expected)


def test_titles_are_addresses():
    with pytest.raises(ValueError, match="two pages share a title"):
        Index([Page("a", ""), Page("a", "")])


# -- summarizer


def test_a_summary_has_two_parts():
    summary = summarize(answering("Summary: A page.\nAnswer: 7"), "text", "How many?")
    assert summary == Summary("A page.", "7", True)
    assert str(summary) == "Summary: A page.\nAnswer to the question: 7"


@pytest.mark.parametrize("reply", ["", "Summary: only", "Answer: 7", "Summary:\nAnswer:"])
def test_a_summary_without_its_parts_falls_back_to_the_page(reply):
    summary = summarize(answering(reply), "page " * 500, "How many?")
    assert not summary.followed
    assert summary.text == ("page " * 500)[:EXCERPT]


# -- compressor

MESSAGES = [
    {"role": "system", "content": "rules"},
    {"role": "user", "content": "task"},
    call("search", query="q"),
    {"role": "tool", "content": "result"},
]


@given(st.lists(st.text()), st.lists(st.text()))
def test_records_survive_json(facts, open_questions):
    record = Record(tuple(facts), tuple(open_questions))
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", '{"key_facts": []}', '{"key_facts": "a", "open_questions": []}',
        '{"key_facts": [1], "open_questions": []}',
        '{"key_facts": [], "open_questions": [], "more": []}',
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(text):
    assert Record.from_json(text) is None


def test_everything_becomes_one_record():
    record = Record(("a",), ("b",))
    once = rewritten(MESSAGES, record)
    notes = 'task\n\nNotes so far: {"key_facts": ["a"], "open_questions": ["b"]}'
    assert once == [MESSAGES[0], {"role": "user", "content": notes}]
    assert rewritten([*once, *MESSAGES[2:]], record) == once  # the old record is replaced


def test_the_compressor_waits_for_its_step_and_survives_nonsense():
    compressor = Compressor(answering("no json"), every=2)
    assert compressor(1, MESSAGES) is MESSAGES
    assert (compressor.records, compressor.failures) == (0, 0)
    assert compressor(2, MESSAGES) is MESSAGES
    assert (compressor.records, compressor.failures) == (0, 1)
    good = Compressor(answering(Record((), ()).to_json()), every=1)
    assert len(good(1, MESSAGES)) == 2
    with pytest.raises(ValueError, match="every=0"):
        Compressor(silent, every=0)


def test_the_transcript_holds_calls_and_results():
    lines = transcript(MESSAGES).split("\n")
    assert lines[0] == "user: task"
    assert json.loads(lines[1].removeprefix("assistant: ")) == {
        "name": "search",
        "arguments": {"query": "q"},
    }
    assert lines[2] == "tool: result"


# -- all of it

PAGES = towns.pages(seed=0)
INDEX = Index(PAGES)
[QUESTION] = towns.questions(PAGES, 1, towns=12, seed=0)


def ask(policy, compress_every=0, max_steps=40):
    return research(policy, INDEX, QUESTION.text, QUESTION.answer, max_steps, compress_every)


def test_an_unlimited_reader_answers_with_a_search_and_a_page_per_town():
    report = ask(towns.reader)
    assert report.correct
    assert [c.name for c in report.episode.calls] == ["search", "open"] * 12
    assert (report.summaries, report.unfollowed, report.episode.repeated) == (12, 0, 0)


def test_the_compressor_keeps_contexts_short_and_the_answer_right():
    plain, short = Meter(towns.reader, words), Meter(towns.reader, words)
    assert ask(plain).correct
    report = ask(short, compress_every=4)
    assert report.correct
    assert (report.records, report.failures) == (6, 0)
    assert max(short.sent) < 0.75 * max(plain.sent)
    assert sum(short.sent) < sum(plain.sent)
    assert report.episode.repeated == 0


def test_a_short_memory_repeats_itself_unless_it_takes_notes():
    limit = 200
    forgetful = ask(ShortMemory(towns.reader, limit, words))
    assert not forgetful.correct
    assert forgetful.episode.stop is StopReason.STEP_LIMIT
    assert forgetful.episode.repeated > 0
    noting = ask(ShortMemory(towns.reader, limit, words), compress_every=4)
    assert noting.correct
    assert noting.episode.repeated == 0


def test_a_policy_that_says_nothing_is_wrong_not_an_error():
    report = ask(silent, compress_every=1)
    assert not report.correct
    assert report.episode.stop is StopReason.ANSWERED


def test_opening_an_unknown_page_is_refused():
    def lost(requests):
        return [Reply(call("open", page="Atlantis", question="?")) for _ in requests]

    report = ask(lost, max_steps=2)
    assert report.episode.refused == 2
    assert report.summaries == 0


def test_every_question_names_distinct_towns_with_one_oldest():
    for question in towns.questions(PAGES, 20, towns=5, seed=1):
        names = towns._towns(question.text)
        assert len(set(names)) == 5
        assert question.answer in names
