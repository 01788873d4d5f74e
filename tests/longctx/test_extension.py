"""Stage batches hold what the recipe says; the loss weighs components; rounds end at the gate."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kexa.data import encode
from kexa.longctx import niah
from kexa.longctx.extension import (
    COMPONENTS,
    StageBatches,
    fits,
    loss_by_position,
    retrieval_document,
    stage_loss,
    train_stage,
)
from tests.longctx.conftest import documents, train


@pytest.fixture
def batches(tokenizer, config, stage):
    streams = {"en": encode(tokenizer, documents(40))}
    return StageBatches(tokenizer, streams, {"en": 1.0}, ("en",), config, stage, seed=5)


def rows_of(batch, component):
    mine = batch["component"] == COMPONENTS.index(component)
    return {name: value[mine] for name, value in batch.items()}


def test_batches_are_a_function_of_the_step(batches, config, stage, tokenizer):
    streams = {"en": encode(tokenizer, documents(40))}
    again = StageBatches(tokenizer, streams, {"en": 1.0}, ("en",), config, stage, seed=5)
    other = StageBatches(tokenizer, streams, {"en": 1.0}, ("en",), config, stage, seed=6)
    later = batches.batch(7)
    for name, value in batches.batch(3).items():
        assert torch.equal(value, again.batch(3)[name])
    for different in (later, other.batch(3)):
        assert not torch.equal(batches.batch(3)["input_ids"], different["input_ids"])


def test_each_component_has_its_rows(batches, stage):
    batch = batches.batch(0)
    assert batch["input_ids"].shape == (8, 64)
    for name in COMPONENTS:
        assert len(rows_of(batch, name)["input_ids"]) == stage.rows[name]
    assert rows_of(batch, "rehearsal")["targets"].all()


def test_long_rows_are_whole_documents(batches, tokenizer):
    held = encode(tokenizer, documents(40))
    whole = {tuple(held.document(i)) for i in np.flatnonzero(fits(held, 64))}
    seen = set()
    for step in range(20):
        rows = rows_of(batches.batch(step), "long")
        for ids, document, targets in zip(
            rows["input_ids"], rows["document_ids"], rows["targets"], strict=True
        ):
            inside = document == 0
            assert torch.equal(inside, targets) and (document[~inside] == -1).all()
            assert tuple(ids[inside].tolist()) in whole
            seen.add(tuple(ids[inside].tolist()))
    assert seen == whole


def test_fits_takes_more_than_half_and_no_more_than_all(tokenizer):
    held = encode(tokenizer, documents(40))
    sizes = np.diff(held.offsets)
    assert set(sizes[fits(held, 64)]) == {n for n in sizes if 32 < n <= 64}


def test_reasoning_rows_ask_only_for_what_they_state(batches, tokenizer, stage):
    lengths, asked = set(), 0
    for step in range(20):
        rows = rows_of(batches.batch(step), "reasoning")
        for ids, document, targets in zip(
            rows["input_ids"], rows["document_ids"], rows["targets"], strict=True
        ):
            for d in document.unique().tolist():
                inside = document == d
                lengths.add(int(inside.sum()))
                tokens, answer = ids[inside], targets[inside]
                said = tokenizer.decode(tokens.tolist()).split("\n")
                lines = [line for line in said if " = " in line]
                stated, questions = lines[: len(lines) // 2], lines[len(lines) // 2 :]
                assert sorted(stated) == sorted(questions)
                assert 1 <= len(stated) <= stage.needles
                values = tokenizer.decode(tokens[answer].tolist()).split()
                assert values == [line.split(" = ")[1] for line in questions]
                asked += len(questions)
    assert lengths == {32, 64}
    assert asked > 100


TOKENIZER = train(300)
TEXT = encode(TOKENIZER, documents(40)).tokens


@given(st.integers(24, 200), st.integers(1, 6), st.integers(0, 2**31))
def test_retrieval_documents_have_exactly_the_length(length, needles, seed):
    ids, asked = retrieval_document(
        niah.Facts(TOKENIZER), TEXT, length, needles, 1, np.random.default_rng(seed)
    )
    assert len(ids) == len(asked) == length
    assert any(asked)


def test_bad_stages_say_what_is_wrong(tokenizer, config, stage):
    streams = {"en": encode(tokenizer, documents(40))}
    make = partial(StageBatches, tokenizer, streams, {"en": 1.0}, ("en",), config, seed=0)
    rows = {"rehearsal": 2, "reasoning": 0, "long": 2}
    with pytest.raises(ValueError, match="give each of rehearsal, reasoning, long at least 1"):
        make(dataclasses.replace(stage, rows=rows))
    with pytest.raises(ValueError, match="no document has 2048 to 4096 tokens"):
        make(dataclasses.replace(stage, sequence_length=4096))
    with pytest.raises(ValueError, match="shortest=12 tokens cannot hold a fact"):
        rng = np.random.default_rng(0)
        retrieval_document(niah.Facts(tokenizer), streams["en"].tokens, 12, 1, 2, rng)


def test_the_loss_is_the_row_weighted_mean_of_component_means(batches, model, config):
    model.eval()
    batch = batches.batch(0)
    loss = stage_loss(model, batch, dataclasses.replace(config, balance_weight=0.0))
    expected = 0.0
    for name, share in zip(COMPONENTS, (2 / 8, 4 / 8, 2 / 8), strict=True):
        rows = rows_of(batch, name)
        logits = model(rows["input_ids"], rows["document_ids"])[:, :-1]
        documents_ = rows["document_ids"]
        counted = rows["targets"][:, 1:] & (documents_[:, 1:] == documents_[:, :-1])
        mean = F.cross_entropy(logits[counted], rows["input_ids"][:, 1:][counted])
        torch.testing.assert_close(getattr(loss, name), mean)
        expected = expected + share * mean
    torch.testing.assert_close(loss.total, expected)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(model, batches, config, directory, green_at, cells):
    def probe(number):
        hits = 10 if number == green_at else 8
        return cells.grid((32, 64), [[10, 10], [hits, hits]])

    rounds = train_stage(model, batches, config, "first", probe, directory, identity="a")
    return list(rounds)


def test_rounds_end_when_the_gate_is_green(batches, model, config, tmp_path, cells):
    rounds = run(model, batches, config, tmp_path, 2, cells)
    assert [r.number for r in rounds] == [1, 2]
    assert [r.verdict.green for r in rounds] == [False, True]
    assert [len(r.steps) for r in rounds] == [3, 3]


def test_rounds_are_used_up_when_it_stays_red(batches, model, config, tmp_path, cells):
    rounds = run(model, batches, config, tmp_path, None, cells)
    assert [r.verdict.green for r in rounds] == [False] * 3
    assert rounds[0].verdict.length == 64


def test_a_stage_trains_at_its_own_learning_rate(batches, model, config, stage, tmp_path, cells):
    slow = dataclasses.replace(stage, learning_rate=1e-4)
    rates = []
    for i, chosen in enumerate((stage, slow)):
        here = dataclasses.replace(config, stages={"first": chosen})
        rounds = run(model, batches, here, tmp_path / str(i), 1, cells)
        rates.append([step.learning_rate for step in rounds[0].steps])
    assert max(rates[0]) == pytest.approx(1e-2)
    assert rates[1] == pytest.approx([rate / 100 for rate in rates[0]])


def test_rounds_read_on_in_the_data(batches, model, config, tmp_path, cells, monkeypatch):
    asked = []
    read = batches.batch
    monkeypatch.setattr(batches, "batch", lambda step: asked.append(step) or read(step))
    run(model, batches, config, tmp_path, 3, cells)
    assert asked == list(range(9))


def test_a_stage_killed_in_a_round_ends_with_the_same_bits(
    batches, model, config, tmp_path, cells, monkeypatch
):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = run(model, batches, config, tmp_path / "whole", 2, cells)
    expected = weights(model)

    model.load_state_dict(start)
    read = batches.batch

    def killed(step):
        if step == 5:  # the last step of round 2; a checkpoint stands after its second
            raise KeyboardInterrupt
        return read(step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batches, "batch", killed)
        run(model, batches, config, tmp_path / "killed", 2, cells)
    model.load_state_dict(start)
    resumed = run(model, batches, config, tmp_path / "killed", 2, cells)
    assert torch.equal(weights(model), expected)
    assert [r.steps for r in resumed] == [r.steps for r in whole]


def test_loss_by_position_is_the_mean_over_documents(tokenizer, model):
    held = encode(tokenizer, documents(40))
    model.eval()
    long_enough = [i for i in range(len(held)) if len(held.document(i)) >= 48][:3]
    losses = []
    for i in long_enough:
        ids = torch.from_numpy(held.document(i)[:48].astype(np.int64))
        losses.append(F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none"))
    mean = torch.stack(losses).mean(0)
    got = loss_by_position(model, held, length=48, rows=3, bins=4)
    assert got[1:] == pytest.approx(mean[11:].view(3, 12).mean(1).tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="no document has 4096 tokens"):
        loss_by_position(model, held, length=4096, rows=3, bins=4)
