"""Items are well formed, balanced, and their oracles pass."""

import json
from collections import Counter

import pytest

from kexa.agents.sandbox import run_python
from kexa.eval import items


def choices():
    return [
        items.mmlu(60),
        items.kmmlu(60),
        items.mmlu_translated(60),
        items.tool_calls(60),
        items.decline_or_help(40),
    ]


def test_choice_benchmarks_are_well_formed():
    for benchmark in choices():
        assert 40 <= len(benchmark.items) <= 60
        assert len({item.id for item in benchmark.items}) == len(benchmark.items)
        for item in benchmark.items:
            assert len(item.options) == round(1 / benchmark.chance)
            assert 0 <= item.answer < len(item.options)
            assert item.text().strip()


@pytest.mark.parametrize("make", [items.mmlu, items.kmmlu, items.mmlu_translated])
def test_answers_are_spread_over_the_letters(make):
    counts = Counter(item.answer for item in make(1000).items)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 0.4 * sum(counts.values())


def test_whole_sets_have_the_sizes_in_the_card():
    assert [len(make(1000).items) for make in (items.mmlu, items.kmmlu)] == [281, 225]
    assert len(items.mmlu_translated(1000).items) == 570


def test_no_constant_preference_for_a_call_beats_chance():
    benchmark = items.tool_calls(64)
    written = Counter()
    for item in benchmark.items:
        calls = [json.dumps(option["tool_calls"][0]) for option in item.options]
        assert len(set(calls)) == 4
        written[calls[item.answer]] += 1
        value = next(iter(item.options[item.answer]["tool_calls"][0]["arguments"].values()))
        assert str(value) in item.text()
    assert set(written.values()) == {4}
    assert Counter(item.answer for item in benchmark.items) == dict.fromkeys(range(4), 16)


def test_declining_and_helping_are_balanced():
    counts = Counter(item.answer for item in items.decline_or_help(40).items)
    assert counts == {0: 20, 1: 20}


@pytest.mark.parametrize("family", ["math", "instruction"])
def test_chance_is_what_the_best_constant_answer_gets(family):
    benchmark = items.verifiable(family, family, 30, seed=1, max_terms=3, max_number=9)
    assert len({item.text() for item in benchmark.items}) == 30
    assert 1 / 30 <= benchmark.chance < 0.5


def test_humaneval_accepts_its_solutions_and_refuses_empty_ones():
    solutions = {p["task_id"]: p["canonical_solution"] for p in items.humaneval_problems()}
    assert len(solutions) == 164
    benchmark = items.humaneval(12, lambda program: run_python(program).ending == "passed")
    for item in benchmark.items:
        assert item.check(solutions[item.id]).outcome == "right"
        assert item.check("    pass\n").outcome == "wrong"
        assert item.check("    return (\n").outcome == "wrong"
