"""What the ``kexa data`` commands print, on tiny sources."""

import pytest

from kexa.__main__ import main
from kexa.config import ROOT, DataConfig
from kexa.data import inventory, sources
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


def test_a_hub_source_without_a_network_is_refused(cards, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = DataConfig(("rows",), CARD_STEPS, (), 100, 0.2)
    with pytest.raises(SourceError, match="'rows': hub dataset a/b cannot be read"):
        list(inventory.stats_lines(config))
