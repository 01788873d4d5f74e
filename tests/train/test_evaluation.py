"""Held-out measures and probes by hand, and the file that carries them to other processes."""

import math

import pytest
import torch

from kexa.data import Document
from kexa.data.choices import Question
from kexa.model.likelihood import choose
from kexa.record import CannotWrite
from kexa.train.evaluation import (
    Evaluation,
    accuracy,
    bits_per_byte,
    chance,
    evaluate,
    held_out,
    load_evaluation,
    pooled,
    save_evaluation,
    target_losses,
    unigram_entropy,
    validate,
)


def test_unigram_entropy_by_hand():
    assert unigram_entropy(torch.tensor([5, 5, 5, 5])) == 0
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert unigram_entropy(torch.tensor([7, 7, 0, 3])) == pytest.approx(expected, abs=1e-12)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), bytes_per_token=1.0) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4.0) == pytest.approx(2)


def test_held_out_targets_stay_inside_documents(sets):
    assert sets["en"].input_ids[0].tolist() == [1, 2, 3, 2, 3] * 2
    assert sets["en"].targets.tolist() == [2, 3, 2, 3] * 4
    assert sets["en"].bytes_per_token == 9 / 4
    assert sets["code"].bytes_per_token == 5 / 3


@pytest.mark.parametrize(("length", "rows"), [(2, 5), (3, 3), (5, 2), (10, 1), (99, 1)])
def test_held_out_without_a_number_is_every_row_that_the_text_fills(vocabulary, length, rows):
    text = [Document("aa b aa b", "test", "en", "en", str(i)) for i in range(2)]  # 10 tokens
    found = held_out(vocabulary, {"en": text}, length, None, seed=0)["en"]
    assert found.input_ids.shape == (rows, length)
    assert found.input_ids.flatten().tolist() == ([1, 2, 3, 2, 3] * 20)[: rows * length]


def test_pooled_weighs_by_targets(sets):
    # 16 targets in en; 20 tokens of code in documents of 4: each row of 10 holds 3 + 3 + 1 targets
    assert len(sets["code"].targets) == 14
    expected = (16 * 2.0 + 14 * 5.0) / 30
    assert pooled({"en": 2.0, "code": 5.0}, sets) == pytest.approx(expected)


def test_validate_is_the_mean_loss_of_the_targets_and_keeps_the_mode(sets, model):
    model.train()
    losses = validate(model, sets)
    assert model.training
    rows = sets["code"]
    logits = model.eval()(rows.input_ids, rows.document_ids)[:, :-1]
    same = rows.document_ids[:, 1:] == rows.document_ids[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[same], rows.input_ids[:, 1:][same])
    assert losses["code"] == pytest.approx(expected.item(), abs=1e-5)


def test_rows_read_in_several_passes_give_the_same_means(sets, model):
    whole = validate(model, sets)
    assert validate(model, sets, batch_tokens=10) == pytest.approx(whole, rel=1e-6)
    assert validate(model, sets, batch_tokens=1) == validate(model, sets, batch_tokens=10)


def test_losses_of_single_targets_have_the_mean_of_the_whole(sets, model):
    model.train()
    for category, rows in sets.items():
        losses = target_losses(model, rows, batch_tokens=10)
        assert losses.shape == rows.targets.shape and losses.min() > 0
        assert losses.std() > 0.01
        assert losses.mean().item() == pytest.approx(validate(model, sets)[category], rel=1e-6)
        torch.testing.assert_close(target_losses(model, rows), losses)
    assert model.training


def questions(model, answers):
    """Questions whose right option is, item by item, the one the model takes or another."""
    drawn = [Question([1, 2 + i], [[2], [3, 4], [4]], [1, 2, 1], 0) for i in range(len(answers))]
    picks = choose(model, drawn)
    return [
        Question(q.prompt, q.options, q.sizes, pick if right else (pick + 1) % 3)
        for q, pick, right in zip(drawn, picks, answers, strict=True)
    ]


def test_accuracy_and_chance_by_hand(model):
    asked = questions(model, [True, False, True, True])
    assert accuracy(model, asked) == 0.75
    assert chance(asked) == pytest.approx(1 / 3)
    two = Question([1], [[2], [3]], [1, 1], 0)
    assert chance([*asked, two, two]) == pytest.approx((4 / 3 + 2 / 2) / 6)


def test_evaluate_names_every_category_and_probe(model, sets):
    evaluation = Evaluation(sets, {"recall": questions(model, [True, False])})
    figures = evaluate(model, evaluation)
    losses = validate(model, sets)
    assert figures == {
        "bits per byte, en": losses["en"] / math.log(2) / sets["en"].bytes_per_token,
        "bits per byte, code": losses["code"] / math.log(2) / sets["code"].bytes_per_token,
        "probe recall": 0.5,
    }


def test_an_evaluation_read_back_gives_the_same_figures(model, sets, tmp_path):
    evaluation = Evaluation(sets, {"recall": questions(model, [True, False, False])})
    save_evaluation(evaluation, tmp_path / "evaluation.pt")
    again = load_evaluation(tmp_path / "evaluation.pt")
    assert again.probes == evaluation.probes
    assert torch.equal(again.sets["en"].targets, sets["en"].targets)
    assert evaluate(model, again) == evaluate(model, evaluation)


def test_an_evaluation_that_cannot_be_written_is_told(sets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write evaluation.pt"):
        save_evaluation(Evaluation(sets, {}), tmp_path / "file" / "evaluation.pt")
