"""One function for all kinds, with rules and templates or with a model."""

import pytest

from kexa import config, stages
from kexa.data import Document, synthesis
from kexa.data.synthesis import CARRIED, FACTUAL, KINDS, Endpoint, Provenance, SynthesisError
from kexa.data.synthesis.facts import SOURCE
from kexa.data.synthesis.prompted import CARRY

RIVER = Document("The river Po is 652 km long, says the text.", "s", "en", "en", "s/po")
KNOBS = {"thinking": {"documents": [RIVER]}}


@pytest.mark.parametrize("kind", KINDS)
def test_counts_ids_and_seeds(kind):
    batch = synthesis.samples(kind, 20, 5, **KNOBS.get(kind, {}))
    assert [s.document.id for s in batch.samples] == [f"synthesis/{kind}/5/{i}" for i in range(20)]
    assert {s.document.category for s in batch.samples} == {kind}
    assert {s.provenance.generator for s in batch.samples} == {f"kexa/{kind}"}
    made = synthesis.documents(kind, 14, 5, **KNOBS.get(kind, {}))
    assert made == [s.document for s in batch.samples[:14]]
    languages = 6 if kind in CARRIED else 1
    assert len({document.language for document in made}) == languages


@pytest.fixture
def model(server, cache):
    """An endpoint that answers what ``known`` says to a prompt; its requests; ``known``."""
    known = {}

    def answer(body, _):
        prompt = body["messages"][0]["content"]
        return 200, {}, known.get(prompt, "I cannot translate that into the language.")

    url, requests = server(answer)
    return Endpoint(url, "tiny"), requests, known


@pytest.fixture
def countries():
    """Read before the test's own cache hides the source."""
    return synthesis.facts.all_countries()


@pytest.mark.parametrize("kind", CARRIED)
def test_a_model_carries_the_english_text_into_five_languages(kind, countries, model):
    endpoint, requests, known = model
    knobs = {"countries": countries} if kind in FACTUAL else {}
    offline = synthesis.samples(kind, 12, 0, **knobs).samples
    names = synthesis.prompted.NAMES
    for i in (0, 6):
        english = offline[i].document.text
        for sample in offline[i + 1 : i + 6]:
            prompt = CARRY.format(language=names[sample.document.language], text=english)
            known[prompt] = sample.document.text
    batch = synthesis.samples(kind, 10, 0, endpoint, **knobs)
    assert len(batch.samples) == len(requests) == 10
    expected = [s for s in offline if s.document.language != "en"]
    assert [s.document.text for s in batch.samples] == [s.document.text for s in expected]
    assert [s.provenance for s in batch.samples] == [
        Provenance("endpoint/tiny", 0, s.provenance.source) for s in expected
    ]
    assert batch.samples[0].document.id == f"synthesis/{kind}/0/tiny/0"
    assert synthesis.samples(kind, 10, 0, endpoint, **knobs) == batch
    assert len(requests) == 10


def test_what_a_model_gets_wrong_is_dropped_and_counted(model):
    endpoint, _, _ = model
    batch = synthesis.samples("problems", 10, 9, endpoint, families=["gcd"])
    assert batch.samples == []
    assert sum(batch.dropped.values()) == 10
    assert batch.dropped["not in Korean"] == 2
    assert batch.dropped["not in Spanish"] == 2


def test_a_model_thinks_about_documents(server, cache):
    thought = 'The text gives a length: "The river Po is 652 km long". So the river is long.'
    url, requests = server(
        lambda body, n: (200, {}, thought if body["seed"] != 3 else "It is long.")
    )
    batch = synthesis.samples("thinking", 4, 2, Endpoint(url, "tiny"), documents=[RIVER])
    assert [s.document.text for s in batch.samples] == [f"{RIVER.text}\n\n{thought}"] * 3
    assert {s.provenance for s in batch.samples} == {Provenance("endpoint/tiny", 2, "s/po")}
    assert batch.dropped == {"no quotation": 1}
    assert sorted(body["seed"] for _, _, body in requests) == [2, 3, 4, 5]


def test_a_failing_server_ends_the_batch(server, cache):
    url, _ = server(lambda body, _: (401, {}, b"key"))
    with pytest.raises(SynthesisError, match="answered 401"):
        synthesis.samples("thinking", 4, 0, Endpoint(url, "tiny"), documents=[RIVER])


def test_kinds_that_only_a_rule_makes():
    with pytest.raises(SynthesisError, match="'recall' is written by a rule only"):
        synthesis.samples("recall", 1, 0, Endpoint("http://127.0.0.1:9/v1", "tiny"))


def test_the_source_of_facts_is_part_of_a_fingerprint():
    profile = config.load("smoke")
    assert stages.synthetic_sources(profile) == []
    for kind in FACTUAL:
        made = config.load("smoke", {"pretrain.synthetic_documents": {kind: 1}})
        assert stages.synthetic_sources(made) == [SOURCE]
