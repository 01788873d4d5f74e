"""Tasks: oracles pass their checks, sides do not meet, every language appears, draws repeat."""

from collections import Counter

import pytest

from kexa.post import tasks


@pytest.mark.parametrize("side", ["sft", "rl", "heldout"])
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_the_worked_answer_passes_its_own_check(family, side):
    for task in tasks.generate(family, side, 400, 3, max_terms=4, max_number=20):
        assert task.check(task.answer).outcome == "right", task
        assert task.side == side


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_sides_share_no_question_whatever_the_seed(family):
    drawn = {
        side: [t for seed in (0, 1) for t in tasks.generate(family, side, 600, seed)]
        for side in ("sft", "rl", "heldout")
    }
    for key in ("question", "prompt"):
        sets = [{getattr(t, key) for t in side} for side in drawn.values()]
        assert all(sets) and len(set().union(*sets)) == sum(map(len, sets))


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_every_language_has_a_fair_share(family):
    counts = Counter(t.language for t in tasks.generate(family, "sft", 1200, 5))
    assert set(counts) == set(tasks.LANGUAGES)
    assert min(counts.values()) > 100


def test_reasoning_of_a_sum_is_true_step_by_step():
    for task in tasks.generate("math", "sft", 200, 7):
        total = None
        for line in task.reasoning.splitlines():
            left, right = line.split("=")
            assert eval(left) == int(right)
            assert total is None or left.startswith(str(total))
            total = int(right)
        assert task.check.value == total == eval(task.question)


def test_draws_repeat_and_seeds_differ():
    first = tasks.generate("math", "sft", 20, 0)
    assert first == tasks.generate("math", "sft", 20, 0)
    assert first != tasks.generate("math", "sft", 20, 1)


def test_distinct_keeps_the_first_of_each_prompt():
    drawn = tasks.generate("instruction", "sft", 100, 0)
    kept = tasks.distinct(drawn + drawn)
    assert [t.prompt for t in kept] == list(dict.fromkeys(t.prompt for t in drawn))


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match="'maths'.*math, instruction"):
        tasks.generate("maths", "sft", 1, 0)
