"""Tasks: oracles pass their checks, sides do not meet, every language appears, draws repeat."""

import random
from collections import Counter

import pytest

from kexa.config import load
from kexa.post import tasks
from kexa.post.rewards import AtMostCharacters, ListOf


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
    first = list(dict.fromkeys(t.prompt for t in drawn))
    assert [t.prompt for t in tasks.distinct("instruction", "sft", len(first), 0)] == first


def test_more_different_prompts_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"9999 different heldout prompts.*'math'.* found"):
        tasks.distinct("math", "heldout", 9999, 0, max_terms=3, max_number=2)


def test_a_list_is_one_question_in_every_language():
    drawn = [t for s in ("sft", "rl", "heldout") for t in tasks.generate("instruction", s, 900, 0)]
    sides, languages = {}, {}
    for task in drawn:
        if isinstance(task.check, ListOf):
            sides.setdefault(task.question, set()).add(task.side)
            languages.setdefault(task.question, set()).add(task.language)
    assert {len(s) for s in sides.values()} == {1}
    assert max(len(spoken) for spoken in languages.values()) == len(tasks.LANGUAGES)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match="'maths'.*math, instruction"):
        tasks.generate("maths", "sft", 1, 0)


@pytest.mark.parametrize("profile", ["smoke", "laptop", "h100", "full"])
def test_every_profile_finds_the_prompts_it_asks_for(profile):
    config = load(profile)
    size = (config.sft.max_terms, config.sft.max_number)
    for family in tasks.FAMILIES:
        stages = (config.sft, config.rl, config.preference)
        for count in (150, *(stage.heldout_prompts for stage in stages)):
            assert len(tasks.distinct(family, "heldout", count, 0, *size)) == count


def test_every_constraint_comes_in_every_language_with_its_check():
    rng = random.Random(0)
    seen = set()
    for language in tasks.LANGUAGES:
        for _ in range(60):
            prompt, check = tasks.constrain("Hi.", language, rng)
            assert prompt.startswith("Hi. ") and len(prompt) > 8
            assert "{" not in prompt
            if isinstance(check, AtMostCharacters):
                assert str(check.count) in prompt
            seen.add((language, type(check)))
    assert len(seen) == 3 * len(tasks.LANGUAGES)
