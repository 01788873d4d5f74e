"""Synthetic questions: the right option follows from the prompt, a blind answer scores 1/4."""

from collections import Counter

import pytest

from kexa.data.choices import arithmetic, draw, facts, in_tokens, recall
from kexa.data.synthesis import KEYS, rules
from kexa.data.synthesis.facts import Country, Fact
from kexa.tokenizer import SPECIAL_TOKENS, bpe
from kexa.tokenizer.vocabulary import WORDS

COUNTRIES = [
    Country(f"world-factbook/{i}", name, (Fact("area", 10.0 + i), Fact("capital", name=capital)))
    for i, (name, capital) in enumerate(
        {
            "South Korea": "Seoul",
            "Vietnam": "Hanoi",
            "Japan": "Tokyo",
            "Germany": "Berlin",
            "Spain": "Madrid",
        }.items()
    )
]
CAPITALS = {country.name: country.facts[1].name for country in COUNTRIES}


def assert_well_formed(items, count):
    assert len(items) == count
    assert len({item.id for item in items}) == count
    for item in items:
        assert len(set(item.options)) == 4
        assert all(option.startswith(" ") for option in item.options)
        assert not item.prompt.endswith(" ")
    places = Counter(item.answer for item in items)
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 0.35 * count


def share_right(items, pick):
    return sum(pick(item) == item.options[item.answer] for item in items) / len(items)


def test_recall_asks_for_a_value_that_the_document_states():
    items = recall(400, seed=3)
    assert_well_formed(items, 400)
    for item in items:
        *lines, cue = item.prompt.split("\n")
        key = cue.removesuffix(" =")
        assert key in KEYS and rules.cue(key) == cue
        assert rules.fact(key, item.options[item.answer].strip()) in lines[:6]
        stated = {line.split(" = ")[1] for line in lines[:6]}
        assert {option.strip() for option in item.options} <= stated
    # which key is asked says everything: the value read most often says nothing
    most = share_right(items, lambda i: max(i.options, key=i.prompt.count))
    assert 0.18 <= most <= 0.32


def test_sums_are_right_and_their_size_tells_nothing():
    items = arithmetic(400, seed=3)
    assert_well_formed(items, 400)
    for item in items:
        *worked, asked = item.prompt.split("\n")
        assert len(worked) == 3
        for line in worked:
            left, right = line.split(" = ")
            assert sum(map(int, left.split(" + "))) == int(right)
        a, b = asked.removesuffix(" =").split(" + ")
        assert int(a) + int(b) == int(item.options[item.answer])
    for blind in (max, min, lambda options, key: sorted(options, key=key)[1]):
        assert 0.18 <= share_right(items, lambda i, f=blind: f(i.options, key=int)) <= 0.32


def test_capitals_are_asked_in_the_words_of_the_documents():
    items = facts(240, seed=3, countries=COUNTRIES)
    assert_well_formed(items, 240)
    for item in items[::6]:
        name, cue = item.prompt.split("\n")
        assert cue == "The capital is"
        assert item.options[item.answer] == f" {CAPITALS[name]}."
    assert any(item.prompt == "대한민국\n수도의 이름은 다음과 같다:" for item in items)


def test_too_few_capitals_are_an_error():
    with pytest.raises(ValueError, match="3 countries with a capital: questions need 4"):
        facts(1, seed=0, countries=COUNTRIES[:3])


@pytest.mark.parametrize("kind", ["recall", "arithmetic", "facts"])
def test_equal_seeds_give_equal_questions(kind):
    first, again, other = (draw(kind, 8, seed, COUNTRIES) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "kind, first", [("mmlu", "mmlu_"), ("kmmlu", "kmmlu_"), ("mmlu_translated", "mmlu_")]
)
def test_exemplars_are_drawn_evenly_by_name(kind, first):
    items = draw(kind, 6, seed=0)
    assert len({item.id for item in items}) == 6
    assert all(item.id.startswith(first) and len(item.options) == 4 for item in items)
    assert items == draw(kind, 6, seed=1)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown kind of question 'riddles'; kinds: mmlu, kmmlu,"):
        draw("riddles", 1, seed=0)


def test_a_question_in_tokens():
    tokenizer = bpe.build([*SPECIAL_TOKENS, *bpe.byte_alphabet()], [], WORDS, "NFC")
    [item] = arithmetic(1, seed=0)
    question = in_tokens(tokenizer, item)
    assert question.prompt[0] == tokenizer.token_to_id("[BOS]")
    assert tokenizer.decode(question.prompt) == item.prompt
    assert [tokenizer.decode(option) for option in question.options] == list(item.options)
    assert question.sizes == [len(option) for option in item.options]
    assert question.answer == item.answer
