"""Samples are written with their provenance, read back, and read as a source of text."""

import pytest

from kexa.data import Document, corpus, synthesis
from kexa.data.sources import load_card
from kexa.data.synthesis import Provenance, Sample, SynthesisError, read_samples, write_samples


def samples():
    batch = synthesis.samples("arithmetic", 3, seed=4).samples
    document = Document("수도: 서울\n\u2028 끝", "synthesis", "ko", "facts", "synthesis/facts/0/1")
    return [*batch, Sample(document, Provenance("endpoint/tiny", 0, "world-factbook/ks"))]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "s.jsonl"
    write_samples(path, samples())
    assert list(read_samples(path)) == samples()
    write_samples(path, [])
    assert list(read_samples(path)) == []


def test_a_sample_says_who_made_it_and_of_what():
    [first, *_] = samples()
    assert first.provenance == Provenance("kexa/arithmetic", 4, "")
    assert first.document.id == "synthesis/arithmetic/4/0"


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"generator": 1, "seed": 2}'])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    path = tmp_path / "s.jsonl"
    write_samples(path, samples()[:1])
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(SynthesisError, match=r"s\.jsonl, line 2 is no sample with provenance"):
        list(read_samples(path))


def test_a_file_of_samples_is_a_source(tmp_path, write_card):
    path = tmp_path / "s.jsonl"
    write_samples(path, samples())
    card = {"kind": "hub", "package": path, "reader": "text", "origin": "machine"}
    folder = write_card("mine", categories="{ko: 1}", sha256='""', **card)
    texts = [d.text for d in corpus.read_documents(load_card("mine", folder), quota=10**6)]
    assert len(texts) == 4
    assert texts[0] == samples()[0].document.text
