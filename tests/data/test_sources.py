"""Cards are complete or refused; downloads are verified, atomic and safe under two processes."""

import json
import subprocess
import sys

import datasets
import pytest
import yaml

from kexa.data import sources
from kexa.data.sources import SourceError, load_card


def test_a_source_without_a_card_is_refused_by_name():
    with pytest.raises(SourceError, match=r"data source 'nosuch' has no card data_cards/nosuch.md"):
        load_card("nosuch")


@pytest.mark.parametrize(
    "field", ["license", "language", "size_categories", "pretty_name", "reader", "origin"]
)
def test_a_card_that_lacks_a_field_is_refused(write_card, field):
    path = write_card("tiny") / "tiny.md"
    lines = [li for li in path.read_text().splitlines() if not li.strip().startswith(f"{field}:")]
    path.write_text("\n".join(lines))
    with pytest.raises(SourceError, match=rf"tiny\.md.*lacks '{field}'"):
        load_card("tiny", path.parent)


@pytest.mark.parametrize("section", sources.SECTIONS)
def test_a_card_that_lacks_a_section_is_refused(write_card, section):
    path = write_card("tiny") / "tiny.md"
    path.write_text(path.read_text().replace(f"## {section}", "## Something"))
    with pytest.raises(SourceError, match=f"'## {section}' is missing or empty"):
        load_card("tiny", path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "torrent"}, "kind 'torrent' is not one of"),
        ({"origin": "alien"}, "origin 'alien' is not one of"),
        ({"sha256": '""'}, "a wheel must be pinned"),
    ],
)
def test_bad_values_in_a_card(write_card, change, message):
    with pytest.raises(SourceError, match=message):
        load_card("tiny", write_card("tiny", **change))


def test_front_matter_that_is_no_yaml(write_card):
    path = write_card("tiny") / "tiny.md"
    path.write_text(path.read_text().replace("license: mit", "license: [mit"))
    with pytest.raises(SourceError, match=r"not valid YAML"):
        load_card("tiny", path.parent)


def test_a_wheel_is_fetched_once_and_then_needs_no_index(
    cache, make_wheel, write_card, monkeypatch
):
    sha256 = make_wheel("tiny", {"tiny/a.py": "print('a')\n"})
    card = load_card("tiny", write_card("tiny", sha256=sha256))
    assert sources.files(card)["tiny/a.py"] == b"print('a')\n"
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "tiny/a.py" in sources.files(card)


def test_an_empty_cache_without_an_index_names_source_and_command(cache, make_wheel, write_card):
    card = load_card("tiny", write_card("tiny"))
    with pytest.raises(
        SourceError, match=r"'tiny' is not in the cache.*pip download --no-deps"
    ) as error:
        sources.fetch(card)
    assert "tiny==1.0" in str(error.value)
    assert not [p for p in (cache / "wheel").iterdir() if p.is_dir()], (
        "a failed download left a folder"
    )


def test_another_file_than_pinned_is_refused_and_not_cached(cache, make_wheel, write_card):
    actual = make_wheel("tiny", {"tiny/a.py": "pass\n"})
    card = load_card("tiny", write_card("tiny", sha256="1" * 64))
    for _ in range(2):
        with pytest.raises(SourceError, match=r"do not use it") as error:
            sources.fetch(card)
        assert actual in str(error.value)
        assert "1" * 64 in str(error.value)


def test_a_corrupt_cache_file_is_named_with_both_hashes_and_the_remedy(
    cache, make_wheel, write_card
):
    sha256 = make_wheel("tiny", {"tiny/a.py": "pass\n"})
    card = load_card("tiny", write_card("tiny", sha256=sha256))
    [path] = sources.fetch(card)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        SourceError, match=f"cached file.*{sha256}.*delete .*tiny-1.0 and run again"
    ):
        sources.fetch(card)


def test_what_a_killed_download_left_is_not_taken_for_a_cache(cache, make_wheel, write_card):
    sha256 = make_wheel("tiny", {"tiny/a.py": "pass\n"})
    card = load_card("tiny", write_card("tiny", sha256=sha256))
    half = cache / "wheel" / ".tiny-1.0.killed"
    half.mkdir(parents=True)
    (half / "tiny-1.0-py3-none-any.whl").write_bytes(b"half")
    assert "tiny/a.py" in sources.files(card)


def test_two_processes_fetch_at_once(cache, make_wheel, write_card):
    sha256 = make_wheel("tiny", {"tiny/a.py": "pass\n"})
    folder = write_card("tiny", sha256=sha256)
    code = (
        "import sys; from pathlib import Path; from kexa.data import sources\n"
        "print(sources.fetch(sources.load_card('tiny', Path(sys.argv[1])))[0].name)"
    )
    argv = [sys.executable, "-c", code, str(folder)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in running] == ["tiny-1.0-py3-none-any.whl"] * 2
    assert [p.name for p in (cache / "wheel").iterdir() if p.is_dir()] == ["tiny-1.0"]


def test_a_deb_is_refused_where_there_is_no_apt(cache, write_card, monkeypatch):
    card = load_card("tiny", write_card("tiny", kind="deb", sha256='""'))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match=r"apt-get is not on this system.*smoke profile"):
        sources.fetch(card)


def test_hub_rows_are_streamed_from_a_local_file(tmp_path, write_card):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3)))
    card = load_card(
        "tiny", write_card("tiny", kind="hub", package=str(path), sha256='""', reader="text")
    )
    assert [row["text"] for row in sources.rows(card, "code")] == ["row 0", "row 1", "row 2"]


def test_a_hub_dataset_that_cannot_be_read_is_named(tmp_path, write_card):
    missing = tmp_path / "missing.jsonl"
    card = load_card("tiny", write_card("tiny", kind="hub", package=str(missing), sha256='""'))
    with pytest.raises(SourceError, match=r"'tiny': hub dataset .*missing.jsonl cannot be read"):
        next(sources.rows(card, "code"))


@pytest.fixture
def parquet_dataset(tmp_path):
    """A folder laid out as the hub lays out a dataset: numbered parquet parts of a split."""
    datasets.disable_progress_bars()
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    rows = [{"text": f"row {i}", "url": "x"} for i in range(5)]
    for i, part in enumerate((rows[:3], rows[3:])):
        path = folder / "data" / f"train-{i:05d}-of-00002.parquet"
        datasets.Dataset.from_list(part).to_parquet(path)
    return folder


@pytest.fixture
def dataset_of_languages(tmp_path):
    """A folder of JSON lines with a configuration for each language, named in its card."""
    folder = tmp_path / "languages"
    configs = []
    for language in ("ko", "ja"):
        (folder / language).mkdir(parents=True)
        lines = [json.dumps({"text": f"{language} {i}"}) + "\n" for i in range(2)]
        (folder / language / "train.jsonl").write_text("".join(lines))
        configs.append({"config_name": language, "data_files": f"{language}/*.jsonl"})
    card = yaml.safe_dump({"configs": configs})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


def hub_card(write_card, package: str, categories: str = "{code: 1}"):
    values = {"kind": "hub", "package": package, "sha256": '""', "reader": "text"}
    return load_card("tiny", write_card("tiny", **values, categories=categories))


def test_a_hub_layout_of_parquet_files_is_read_in_order(parquet_dataset, write_card):
    card = hub_card(write_card, str(parquet_dataset))
    assert [row["text"] for row in sources.rows(card, "code")] == [f"row {i}" for i in range(5)]


def test_each_category_has_its_own_configuration(dataset_of_languages, write_card):
    package = f"{dataset_of_languages}:ko {dataset_of_languages}:ja"
    card = hub_card(write_card, package, "{ko: 1, ja: 1}")
    assert [row["text"] for row in sources.rows(card, "ja")] == ["ja 0", "ja 1"]
    assert [row["text"] for row in sources.rows(card, "ko")] == ["ko 0", "ko 1"]


def test_a_configuration_that_the_dataset_lacks_is_named(dataset_of_languages, write_card):
    card = hub_card(write_card, f"{dataset_of_languages}:vi")
    with pytest.raises(SourceError, match=r"'tiny': hub dataset .*:vi cannot be read.*'vi' not"):
        next(sources.rows(card, "code"))


@pytest.mark.parametrize(
    "content", [b'{"text": "a\xff"}\n', b'{"text": "a"\n{', b'{"text": "\\ud800"}\n']
)
def test_broken_json_lines_are_refused_with_a_sentence(tmp_path, write_card, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"'tiny': hub dataset .*rows.jsonl cannot be read"):
        list(sources.rows(hub_card(write_card, str(path)), "code"))


def test_an_empty_file_has_no_rows(tmp_path, write_card):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert list(sources.rows(hub_card(write_card, str(path)), "code")) == []
