"""What rules write is reproducible and true."""

import hashlib
import re

import pytest

from kexa.data import Document, synthesis


def test_recall_states_each_fact_once_and_every_query_repeats_one():
    for document in synthesis.documents("recall", 50, seed=1, facts=5, queries=9, digits=3):
        lines = document.text.split("\n")
        facts, queries = lines[:5], lines[5:]
        assert len(queries) == 9
        assert len({line.split(" = ")[0] for line in facts}) == 5
        assert set(queries) <= set(facts)
        for line in facts:
            assert line.startswith(synthesis.cue(line.split(" = ")[0]) + " ")
            assert re.fullmatch(r"[a-z]+ = \d{3}", line)


def test_filler_stands_between_facts():
    [document] = synthesis.documents("recall", 1, seed=0, facts=3, queries=1, filler=["Filler."])
    assert document.text.split("\n")[1:6:2] == ["Filler."] * 3


def test_arithmetic_is_right():
    for document in synthesis.documents("arithmetic", 50, seed=2, digits=3):
        for line in document.text.split("\n"):
            values = [eval(part) for part in line.split(", because")[0].split(" = ")]
            assert len(set(values)) == 1, line


def test_thinking_only_says_what_the_text_says():
    text = (
        "Home\n\nThe river Thames flows through London. It is 346 kilometres long. "
        "Ships use it every day."
    )
    source = [Document(text, "s", "en", "en", "0")]
    for document in synthesis.documents("thinking", 20, seed=3, documents=source):
        assert document.text.startswith(text + "\n\n")
        said = document.text.split("\nIt says: ")[1]
        assert said in text
        assert "Names in it: Thames, London." in document.text
        assert "Numbers in it: 346." in document.text
        assert "Sentences to read: 3.\nThe first: The river Thames" in document.text
        asked = re.search(r'starts with "(.*)"\? Number (\d)', document.text)
        sentences = ["The river", "It is 346", "Ships use"]
        assert said.startswith(asked[1])
        assert said.startswith(sentences[int(asked[2]) - 1])


def test_thinking_asks_for_the_first_sentence_of_a_beginning():
    text = "It is a long river in the south. It is a long river with many ships."
    source = [Document(text, "s", "en", "en", "0")]
    for document in synthesis.documents("thinking", 9, seed=0, documents=source):
        assert (
            'starts with "It is a long"? Number 1.\nIt says: It is a long river in the south.'
            in (document.text)
        )


@pytest.mark.parametrize("kind", ["recall", "arithmetic"])
def test_equal_seeds_give_equal_documents(kind):
    assert synthesis.documents(kind, 5, seed=7) == synthesis.documents(kind, 5, seed=7)
    assert synthesis.documents(kind, 5, seed=7) != synthesis.documents(kind, 5, seed=8)


def test_bad_knobs():
    with pytest.raises(ValueError, match="unknown kind of synthetic document 'poem'"):
        synthesis.documents("poem", 1, 0)
    with pytest.raises(ValueError, match="facts=9, pool=4"):
        synthesis.documents("recall", 1, 0, facts=9, pool=4)
    with pytest.raises(ValueError, match="thinking needs documents"):
        synthesis.documents("thinking", 1, 0, documents=[])


RIVERS = [Document(f"The river number {i} is long.", "s", "en", "en", f"s/{i}") for i in "12"]


@pytest.mark.parametrize(
    ("kind", "knobs", "digest"),
    [
        ("recall", {}, "7ea48234076523c6"),
        ("arithmetic", {}, "00c20dbfad219b1a"),
        ("thinking", {"documents": RIVERS}, "dc26d58b9f6c9df2"),
    ],
)
def test_the_documents_of_a_seed_stay_what_they_are(kind, knobs, digest):
    """Results of the notebooks rest on them."""
    made = synthesis.documents(kind, 50, 0, **knobs)
    text = "\0".join(f"{d.id} {d.language} {d.text}" for d in made)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_thinking_names_the_document_it_read():
    for sample in synthesis.samples("thinking", 9, seed=0, documents=RIVERS).samples:
        [read] = [d for d in RIVERS if sample.document.text.startswith(d.text)]
        assert sample.provenance == synthesis.Provenance("kexa/thinking", 0, read.id)
