"""Needle tasks are exactly what they claim; scoring is greedy decoding; the gate counts right."""

import numpy as np
import pytest
import torch

from kexa.data import TokenizedDocuments, encode, synthesis
from kexa.longctx import niah
from kexa.model import generate
from kexa.statistics import wilson
from tests.longctx.conftest import documents

DEPTHS = (0.0, 0.1, 0.5, 0.77, 1.0)


@pytest.mark.parametrize("length", [40, 63, 100, 257])
@pytest.mark.parametrize("distractors", [0, 1])
def test_prompt_and_answer_together_have_exactly_the_length(any_tokenizer, length, distractors):
    haystack = encode(any_tokenizer, documents(40))
    for depth in DEPTHS:
        tasks = niah.make_tasks(
            any_tokenizer, haystack, length, depth, 5, seed=3, digits=1, distractors=distractors
        )
        assert [len(t.prompt) + len(t.answer) for t in tasks] == [length] * 5


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_stands_exactly_at_its_depth_in_unbroken_text(any_tokenizer, depth):
    haystack = encode(any_tokenizer, documents(40))
    facts = niah.Facts(any_tokenizer)
    for task in niah.make_tasks(any_tokenizer, haystack, 90, depth, 8, seed=0):
        fact = facts(task.key, task.value)
        assert task.prompt[0] == facts.bos
        assert list(task.prompt[-len(fact.cue) :]) == fact.cue
        assert list(task.answer) == fact.value
        body = list(task.prompt[1 : -len(fact.cue)])
        free = len(body) - len(fact.line)
        at = round(depth * free)
        assert body[at : at + len(fact.line)] == fact.line
        around = body[:at] + body[at + len(fact.line) :]
        tokens = haystack.tokens.tolist()
        assert any(tokens[i : i + free] == around for i in range(len(tokens) - free + 1))


def test_the_prompt_reads_as_the_header_says(tokenizer, haystack):
    [task] = niah.make_tasks(tokenizer, haystack, 80, 0.5, 1, seed=1)
    said = tokenizer.decode(list(task.prompt))
    assert f"\n{synthesis.fact(task.key, task.value)}\n" in said
    assert said.endswith(f"\n{synthesis.cue(task.key)}")
    assert tokenizer.decode(list(task.answer)) == f" {task.value}"


def test_distractors_have_other_keys_and_the_asked_key_has_one_value(tokenizer, haystack):
    for task in niah.make_tasks(tokenizer, haystack, 200, 0.3, 10, seed=2, distractors=4):
        lines = tokenizer.decode(list(task.prompt)).split("\n")
        stated = [line.split(" = ") for line in lines if " = " in line]
        assert len(stated) == 5
        assert len({key for key, _ in stated}) == 5
        assert [value for key, value in stated if key == task.key] == [task.value]


def test_probe_keys_are_in_no_training_document(tokenizer):
    assert not set(synthesis.PROBE_KEYS) & set(synthesis.KEYS)
    asked = {d.text.split(" = ")[0] for d in synthesis.documents("recall", 200, seed=0)}
    assert asked <= set(synthesis.KEYS)


def test_equal_seeds_give_equal_tasks_and_others_differ(tokenizer, haystack):
    def make(seed, length=64, depth=0.5):
        return niah.make_tasks(tokenizer, haystack, length, depth, 4, seed)

    assert make(0) == make(0)
    assert make(0)[:2] == niah.make_tasks(tokenizer, haystack, 64, 0.5, 2, 0)
    assert make(0) != make(1)
    assert [t.value for t in make(0)] != [t.value for t in make(0, length=65)]
    assert [t.value for t in make(0)] != [t.value for t in make(0, depth=0.51)]


def test_bad_tasks_say_what_is_wrong(tokenizer, haystack):
    with pytest.raises(ValueError, match=r"depth=1.5 must lie in 0..1"):
        niah.make_tasks(tokenizer, haystack, 64, 1.5, 1, 0)
    with pytest.raises(ValueError, match="length=5 is .* tokens too short"):
        niah.make_tasks(tokenizer, haystack, 5, 0.5, 1, 0)
    with pytest.raises(ValueError, match="tokens of text, the haystack has 10"):
        short = TokenizedDocuments(haystack.tokens[:10], haystack.offsets[:1])
        niah.make_tasks(tokenizer, short, 64, 0.5, 1, 0)
    with pytest.raises(ValueError, match="distractors=99: there are 14 keys"):
        niah.make_tasks(tokenizer, haystack, 64, 0.5, 1, 0, distractors=99)


def greedy(model, task, count):
    ids = generate(model, torch.tensor([task.prompt]), count, temperature=0.0)
    return tuple(ids[0, len(task.prompt) :].tolist())


def test_a_hit_is_what_greedy_decoding_gives(tokenizer, haystack, model):
    model.eval()
    tasks = []
    for length in (50, 64, 40):
        for task in niah.make_tasks(tokenizer, haystack, length, 0.5, 2, seed=0):
            right = niah.Task(task.prompt, greedy(model, task, 3), task.key, task.value)
            for wrong_at in (None, 0, 1, 2):
                answer = list(right.answer)
                if wrong_at is not None:
                    answer[wrong_at] = (answer[wrong_at] + 1) % 300
                tasks.append(niah.Task(right.prompt, tuple(answer), task.key, task.value))
    expected = [True, False, False, False] * 6
    assert niah.score(model, tasks).tolist() == expected
    assert niah.score(model, tasks, batch_tokens=1).tolist() == expected


def test_scoring_leaves_the_mode_alone(tokenizer, haystack, model):
    tasks = niah.make_tasks(tokenizer, haystack, 40, 0.5, 1, seed=0)
    for training in (True, False):
        model.train(training)
        niah.score(model, tasks)
        assert model.training is training


def test_measure_puts_each_cell_where_its_tasks_are(tokenizer, haystack, model, monkeypatch):
    """A scorer that knows where the needle is: hits iff it stands at depth 0 or length is 40."""
    batches = []

    def score(_, tasks):
        facts = niah.Facts(tokenizer)
        hits = []
        for task in tasks:
            fact = facts(task.key, task.value).line
            first = list(task.prompt[1 : 1 + len(fact)]) == fact
            hits.append(first or len(task.prompt) + len(task.answer) == 40)
        batches.append(len(tasks))
        return np.array(hits)

    monkeypatch.setattr(niah, "score", score)
    grid = niah.measure(model, tokenizer, haystack, (40, 80), (0.0, 0.5, 1.0), 3, seed=0)
    assert grid.hits.tolist() == [[3, 3], [3, 0], [3, 0]]
    assert grid.accuracy.tolist() == [[1, 1], [1, 0], [1, 0]]
    assert batches == [9, 9]


def test_pooled_accuracy_has_wilsons_interval(cells):
    grid = cells.grid((32, 64, 128), [[10, 10], [0, 0], [9, 8]])
    assert grid.at(32) == wilson(20, 20) and grid.at(32).high == 1.0 and grid.at(32).low < 0.9
    assert grid.at(64) == wilson(0, 20) and grid.at(64).low == 0.0 and grid.at(64).high > 0.1
    assert grid.at(128).estimate == 0.85


def test_the_gate_needs_every_length_up_to_the_target_and_no_longer_one(cells):
    grid = cells.grid((32, 64, 128), [[10, 10], [9, 9], [0, 0]])
    at_64 = niah.gate(grid, 0.9, 64)
    assert at_64.green and at_64.length == 64 and at_64.accuracy == grid.at(64)
    assert not niah.gate(grid, 0.91, 64).green
    at_128 = niah.gate(grid, 0.9, 128)
    assert not at_128.green and at_128.length == 128
    with pytest.raises(ValueError, match="the grid has no length 96; it has 32, 64, 128"):
        niah.gate(grid, 0.9, 96)


def test_one_bad_short_length_keeps_the_gate_red(cells):
    grid = cells.grid((32, 64), [[5, 5], [10, 10]])
    verdict = niah.gate(grid, 0.9, 64)
    assert not verdict.green and verdict.length == 32
