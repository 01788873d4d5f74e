"""What the ``kexa data`` commands print, on tiny sources."""

import pytest

from kexa.__main__ import main
from kexa.config import ROOT, DataConfig
from kexa.data import Document, corpus, inventory, sources, synthesis
from kexa.data.cleaning import CARD_STEPS
from kexa.data.sources import SourceError, load_card
from tests.data.test_corpus import program


@pytest.fixture
def cards(cache, make_wheel, write_card, monkeypatch):
    """A wheel of twenty programs and one short file, and a card of each other kind."""
    files = {f"tiny/{i}.py": program(i) for i in range(20)} | {"tiny/short.py": "x = 1\n"}
    write_card("tiny", sha256=make_wheel("tiny", files), categories="{code: 4321}")
    write_card("python", kind="stdlib", package='""', sha256='""')
    folder = write_card("rows", kind="hub", package="a/b", sha256='""', reader="text")
    monkeypatch.setattr(sources, "load_card", lambda name: load_card(name, folder))
    return [sources.load_card(name) for name in ("tiny", "python", "rows")]


def test_where_a_source_is(cards):
    assert [inventory.where(card) for card in cards] == ["absent", "python", "stream"]
    lines = list(inventory.fetch_lines(cards))
    assert [inventory.where(card) for card in cards] == ["cached", "python", "stream"]
    assert lines[0].startswith("tiny: ")
    assert lines[0].endswith(" bytes in 1 files, verified")
    assert ["nothing to fetch" in line for line in lines] == [False, True, True]


def test_list_names_every_card_of_the_repository(capsys):
    assert main(["data", "list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["source", "kind", "origin", "licence", "here", "categories"]
    names = sorted(p.stem for p in (ROOT / "data_cards").glob("*.md"))
    assert [line.split()[0] for line in lines] == names
    assert {line.split()[4] for line in lines} <= {"cached", "absent", "python", "stream"}


def test_stats_measures_cleans_and_builds(cards):
    size = sum(len(program(i).strip().encode()) for i in range(20))
    text = "\n".join(inventory.stats_lines(DataConfig(("tiny",), CARD_STEPS, (), 10**6, 0.2)))
    assert f"{size:,}        4,321\n" in text
    rows = [line.split() for line in text.splitlines()]
    assert [
        "has_length",
        "tiny",
        "code",
        "1",
        "0",
        "5",
        "tiny/tiny/short.py:",
        "'x",
        "=",
        "1'",
    ] in rows
    assert rows[-1] == ["tiny", "human", "code", "21", "20", f"{size:,}", "has_length", "1"]


@pytest.mark.parametrize("verb", ["fetch", "stats"])
def test_a_source_that_cannot_be_fetched_ends_with_a_sentence(cache, monkeypatch, capsys, verb):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert main(["data", verb]) == 2
    assert "'wiki-leads' is not in the cache" in capsys.readouterr().err


def test_synthesize_writes_samples_and_says_what_they_are(tmp_path, capsys):
    path = tmp_path / "made.jsonl"
    options = ["--count", "12", "--seed", "3", "--out", str(path)]
    assert main(["data", "synthesize", "--kind", "problems", *options]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert head == f"{path}: 12 samples of problems (en 2, ko 2, es 2, de 2, ja 2, vi 2)"
    written = list(synthesis.read_samples(path))
    assert written == synthesis.samples("problems", 12, 3).samples


def test_synthesize_thinks_about_the_corpus(cards, cache, tmp_path, monkeypatch):
    texts = [Document(f"The river {i} is long.", "s", "en", "en", f"s/{i}") for i in "ab"]
    train = {language: [] for language in synthesis.LANGUAGES} | {"en": texts}
    monkeypatch.setattr(corpus, "load_corpus", lambda config: corpus.Corpus(train, {}, [], []))
    path = tmp_path / "made.jsonl"
    config = DataConfig(("tiny",), CARD_STEPS, (), 10**6, 0.2)
    lines = list(inventory.synthesize_lines("thinking", 5, 0, path, None, config))
    assert lines == [f"{path}: 5 samples of thinking (en 5)"]
    assert {s.provenance.source for s in synthesis.read_samples(path)} == {"s/a", "s/b"}


def test_synthesize_asks_an_endpoint_and_counts_what_it_drops(server, cache, tmp_path, capsys):
    url, requests = server(lambda body, _: (200, {}, "I cannot do that for you."))
    path = tmp_path / "made.jsonl"
    options = ["--kind", "problems", "--count", "5", "--out", str(path)]
    assert main(["data", "synthesize", *options, "--endpoint", url, "--model", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{path}: 0 samples of problems (none)",
        "left out 1: not in German",
    ]
    assert len(requests) == 5 and path.read_text() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "poem"], "unknown kind of synthetic document 'poem'"),
        (["--kind", "facts", "--count", "0"], "--count 0"),
        (["--kind", "facts", "--endpoint", "http://127.0.0.1:9/v1"], "give both"),
        (["--kind", "facts", "--endpoint", "localhost", "--model", "m"], "starts with http"),
    ],
)
def test_synthesize_with_bad_options_ends_with_a_sentence(tmp_path, capsys, options, message):
    assert main(["data", "synthesize", "--out", str(tmp_path / "x"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_hub_source_without_a_network_is_refused(cards, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = DataConfig(("rows",), CARD_STEPS, (), 100, 0.2)
    with pytest.raises(SourceError, match="'rows': hub dataset a/b cannot be read"):
        list(inventory.stats_lines(config))
