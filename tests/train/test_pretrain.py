"""The curriculum as a function of the step, its run, and paired ablations."""

import dataclasses
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kexa import config
from kexa.data import Corpus, Document, TokenizedDocuments
from kexa.data.choices import Question
from kexa.model import KexaForCausalLM
from kexa.tokenizer import SPECIAL_TOKENS, bpe
from kexa.tokenizer.vocabulary import WORDS
from kexa.train import pretrain
from kexa.train.ablation import busiest, run_variant, variants
from kexa.train.checkpoint import CheckpointError, list_checkpoints
from kexa.train.evaluation import Evaluation, evaluate
from kexa.train.loop import Step
from kexa.train.metrics import scalars
from kexa.train.pretrain import (
    Curriculum,
    Pretraining,
    branched_schedule,
    new_model,
    run_curriculum,
    stage_ends,
    stage_evaluation,
    stage_weights,
    start_curriculum,
    synthetic,
)
from tests.train.conftest import CONFIG, checkpoint_times

CPU = torch.device("cpu")
SMOKE = config.load("smoke")


def stream(first, count=400):
    """Documents of 10 tokens: [BOS] = 1, then numbers from ``first`` on."""
    tokens = np.tile(np.arange(first, first + 10, dtype=np.int32), count // 10)
    tokens[::10] = 1
    return TokenizedDocuments(tokens, np.arange(0, count + 1, 10, dtype=np.int64))


STREAMS = {"en": stream(10), "code": stream(30), "recall": stream(50)}
PRETRAIN = dataclasses.replace(
    SMOKE.pretrain,
    sequence_length=20,
    batch_size=4,
    stage_steps={"foundation": 3, "domain": 2, "reasoning": 2},
    mixtures={"foundation": {"en": 1.0}, "domain": {"code": 1.0}, "reasoning": {"recall": 1.0}},
)


def test_stages_follow_one_another_and_read_their_own_mixture():
    curriculum = Curriculum(STREAMS, PRETRAIN, seed=0)
    assert curriculum.steps == 7
    names = [curriculum.stage_at(step) for step in range(7)]
    assert names == ["foundation"] * 3 + ["domain"] * 2 + ["reasoning"] * 2
    for step, low in enumerate([10] * 3 + [30] * 2 + [50] * 2):
        batch = curriculum.batch(step)
        words = batch["input_ids"][batch["input_ids"] != 1]
        assert batch["input_ids"].shape == batch["document_ids"].shape == (4, 20)
        assert low < words.min() and words.max() < low + 10


def test_batch_is_a_function_of_seed_and_step():
    first, again = (Curriculum(STREAMS, PRETRAIN, seed=3).batch(4) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_stage_weights_share_a_group_by_tokens_of_the_streams():
    config = dataclasses.replace(
        PRETRAIN, mixtures={"domain": {"code": 0.4, "multilingual": 0.6}}, language_temperature=2.0
    )
    streams = {"code": stream(30), "es": stream(10, 1600), "vi": stream(10, 400)}  # roots 2 : 1
    weights = stage_weights(config, "domain", streams)
    assert weights == pytest.approx({"code": 0.4, "es": 0.4, "vi": 0.2}, abs=1e-12)


def test_stages_without_a_mixture_are_an_error():
    odd = dataclasses.replace(PRETRAIN, stage_steps={"foundation": 3, "polish": 3})
    with pytest.raises(ValueError, match="stage_steps names foundation, polish but"):
        Curriculum(STREAMS, odd, seed=0)


def test_synthetic_documents_come_in_the_counts_asked_for():
    text = Document("Anna lives in Rome. She has 3 cats and 2 dogs there.", "t", "en", "en", "1")
    made = synthetic({"en": [text]}, {"recall": 3, "thinking": 2}, seed=0)
    assert {kind: len(documents) for kind, documents in made.items()} == {
        "recall": 3,
        "thinking": 2,
    }
    assert made["thinking"][0].text.startswith("Anna lives in Rome.")


def test_facts_are_of_the_countries_whose_articles_are_in_the_corpus():
    articles = [
        Document("", "world-factbook", "en", "en", f"world-factbook/{c}") for c in ("ks", "vm")
    ]
    made = synthetic({"en": articles}, {"facts": 12, "comparisons": 6, "problems": 6}, seed=0)
    assert {kind: len(documents) for kind, documents in made.items()} == {
        "facts": 12,
        "comparisons": 6,
        "problems": 6,
    }
    names = {d.text.split("\n")[0] for d in made["facts"] if d.language == "en"}
    assert names <= {"South Korea", "Vietnam"}
    assert "South Korea" in made["comparisons"][0].text and "Vietnam" in made["comparisons"][0].text


def test_stages_are_evaluated_on_held_out_text_fresh_documents_and_probes():
    tokenizer = bpe.build([*SPECIAL_TOKENS, *bpe.byte_alphabet()], [], WORDS, "NFC")
    text = [Document("Anna lives in Rome. She has 3 cats and 2 dogs there.", "t", "en", "en", "1")]
    corpus = Corpus({"en": text}, {"en": text, "code": text}, [], [])
    changes = {"synthetic_documents": {"recall": 3}, "validation_rows": 2}
    probes = {"recall": 5, "arithmetic": 3}
    asked = dataclasses.replace(PRETRAIN, **changes, probes=probes)
    evaluation = stage_evaluation(tokenizer, corpus, asked, seed=0)
    assert list(evaluation.sets) == ["en", "code", "recall"]
    assert all(rows.input_ids.shape == (2, 20) for rows in evaluation.sets.values())
    assert {kind: len(questions) for kind, questions in evaluation.probes.items()} == probes
    unknown = dataclasses.replace(asked, probes={"riddles": 1})
    with pytest.raises(ValueError, match="unknown kind of question 'riddles'; kinds: mmlu, kmmlu"):
        stage_evaluation(tokenizer, corpus, unknown, seed=0)


@pytest.fixture
def run(tmp_path, sets) -> Pretraining:
    """A run of seven steps whose token files hold STREAMS."""
    for name, documents in STREAMS.items():
        folder = tmp_path / "tokens" / name
        folder.mkdir(parents=True)
        documents.tokens.tofile(folder / "tokens.bin")
        np.save(folder / "offsets.npy", documents.offsets)
    questions = [Question([1, 2], [[3], [4]], [1, 1], i % 2) for i in range(4)]
    return Pretraining(
        "fp32", CONFIG, PRETRAIN, 0, tmp_path / "tokens", tuple(STREAMS), tmp_path / "checkpoints",
        Evaluation(sets, {"recall": questions}),
    )  # fmt: skip


def test_a_run_is_evaluated_where_a_stage_ends_and_read_back_with_it(run, monkeypatch):
    model, _, records = run_curriculum(run, CPU)
    assert stage_ends(PRETRAIN) == {"foundation": 3, "domain": 5, "reasoning": 7}
    assert [r.step + 1 for r in records if r.evaluation] == [3, 5, 7]
    assert records[-1].evaluation == evaluate(model.eval(), run.evaluation)
    assert records[-1].evaluation["probe recall"] == 0.5
    assert records[-1].evaluation.items() <= scalars(records[-1]).items()
    saved = {path.name for path in list_checkpoints(run.checkpoints)}
    assert saved >= {"step-00000003", "step-00000005", "step-00000007"}
    monkeypatch.setattr(pretrain, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    assert run_curriculum(run, CPU)[2] == records


def test_a_run_does_not_go_on_over_other_text(run):
    run_curriculum(dataclasses.replace(run, data="one corpus"), CPU)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run_curriculum(dataclasses.replace(run, data="another"), CPU)


def test_how_often_a_run_is_saved_and_measured_may_change(run):
    _, _, steps = start_curriculum(run, CPU)
    first = [next(steps) for _ in range(4)]
    steps.close()
    often = dataclasses.replace(run.config, checkpoint_every=1, metrics_every=2)
    model, _, records = run_curriculum(dataclasses.replace(run, config=often), CPU)
    assert records[:3] == first[:3]
    assert [r.step for r in records[3:] if r.figures] == [4, 6]
    shutil.rmtree(run.checkpoints)
    whole, _, _ = run_curriculum(run, CPU)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_decay_branches_off_a_stage_and_leaves_the_whole_run_alone(run):
    _, _, whole = run_curriculum(run, CPU)
    before = {path.name for path in run.checkpoints.iterdir()}
    _, _, branch = run_curriculum(dataclasses.replace(run, decay_stage="domain"), CPU)
    assert branch[:3] == whole[:3] and len(branch) == 5
    assert branch[3].losses == whole[3].losses  # the same weights and batch
    peak = whole[2].learning_rate
    rates = [peak * (1 - math.sqrt(k / 3)) for k in (1, 2)]
    assert [r.learning_rate for r in branch[3:]] == pytest.approx(rates)
    assert branch[4].losses != whole[4].losses
    assert [r.step + 1 for r in branch if r.evaluation] == [3, 5]
    assert {path.name for path in run.checkpoints.iterdir()} == before | {"decay-domain"}
    assert run_curriculum(run, CPU)[2] == whole


def test_a_branch_that_is_finished_or_was_killed_is_gone_on_with(run):
    run_curriculum(run, CPU)
    branched_off = dataclasses.replace(run, decay_stage="domain")
    model, _, branch = run_curriculum(branched_off, CPU)
    again, _, records = run_curriculum(branched_off, CPU)
    shutil.rmtree(run.checkpoints / "decay-domain/step-00000005")  # as if killed before it
    resumed, _, from_start = run_curriculum(branched_off, CPU)
    assert records == from_start == branch
    for p, q, r in zip(model.parameters(), again.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_a_branch_off_a_run_that_is_not_there_is_refused(run):
    with pytest.raises(CheckpointError, match="step-00000003 is not a whole checkpoint"):
        run_curriculum(dataclasses.replace(run, decay_stage="domain"), CPU)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("foundation", "begins at step 0; a decay can branch off between 1 and 4"),
        ("reasoning", "begins at step 5; a decay can branch off between 1 and 4"),
        ("domains", "no stage 'domains' to decay over: use foundation, domain, reasoning"),
    ],
)
def test_a_branch_leaves_where_the_rate_is_stable(stage, message):
    with pytest.raises(ValueError, match=message):
        branched_schedule(PRETRAIN, Curriculum(STREAMS, PRETRAIN, seed=0), stage)


@pytest.mark.parametrize("profile", ["smoke", "laptop", "h100", "full"])
def test_in_every_profile_a_decay_can_branch_off_the_second_stage(profile):
    """Notebook 04 lets one."""
    pretrain = config.load(profile).pretrain
    stage = list(pretrain.stage_steps)[1]
    start, steps = pretrain.stage_steps["foundation"], sum(pretrain.stage_steps.values())
    planned = SimpleNamespace(starts={"foundation": 0, stage: start}, steps=steps)
    schedule = branched_schedule(pretrain, planned, stage)
    assert schedule(start - 1) == 1 > schedule(start)


def test_only_the_embedding_starts_at_deviation_one():
    model = new_model(CONFIG, seed=0)
    deviation = {name: tensor.std().item() for name, tensor in model.state_dict().items()}
    assert deviation["model.embed_tokens.weight"] == pytest.approx(1, rel=0.1)
    assert deviation["lm_head.weight"] == pytest.approx(CONFIG.initializer_range, rel=0.1)


def test_busiest_by_hand():
    def step(load):
        return Step(0, {}, 0.0, 0.0, 0, False, load)

    # fair share 4: layers have 6/4 and 4/4, then 8/4 and 8/4
    records = [step([[6, 2], [4, 4]]), step([[0, 8], [8, 0]])]
    assert busiest(records) == pytest.approx((1.5 + 1.0 + 2.0 + 2.0) / 4)


@pytest.mark.parametrize("variant", variants(CONFIG), ids=lambda v: v.name)
def test_variants_share_every_initial_value_with_the_base(variant):
    def build(model_config):
        torch.manual_seed(0)
        return KexaForCausalLM(model_config).state_dict()

    base, changed = build(CONFIG), build(dataclasses.replace(CONFIG, **variant.model))
    assert set(changed) <= set(base)
    assert all(torch.equal(base[name], tensor) for name, tensor in changed.items())


def test_a_variant_changes_what_it_names_and_nothing_else():
    keys = [set(v.model) | set(v.training) for v in variants(CONFIG)]
    assert keys[0] == set() and all(keys[1:])
    for variant in variants(CONFIG)[1:]:
        assert not variant.model or not variant.training
        for key, value in variant.model.items():
            assert getattr(CONFIG, key) != value


def test_a_finished_run_is_read_back(tmp_path, sets):
    ablation = dataclasses.replace(
        SMOKE.ablation, steps=10, batch_size=2, sequence_length=20, numerics="fp32"
    )
    pretrain = dataclasses.replace(SMOKE.pretrain, mixtures={"foundation": {"en": 1.0}})
    base = variants(CONFIG)[0]
    arguments = (base, CONFIG, ablation, pretrain, STREAMS, sets, 0, torch.device("cpu"), tmp_path)
    first = run_variant(*arguments)
    written = checkpoint_times(tmp_path)
    assert written
    assert run_variant(*arguments) == first
    assert checkpoint_times(tmp_path) == written
