"""The fingerprint sees what results depend on, and nothing else."""

from __future__ import annotations

import dataclasses
import re

import pytest

from kexa import stages
from kexa.config import Config, ConfigError, load

NOTEBOOK = """\
# %% [markdown]
# # 1. Prose
# %% tags=["parameters"]
profile: str = "smoke"
seed: int = 0
# %%
from kexa import notebook
size = 3
"""
TABLE = """\
[01_first]
needs = []
sections = ["tokenizer"]
[02_second]
needs = ["01_first"]
sections = ["model"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two notebooks and their table, in place of the real ones."""
    monkeypatch.setattr(stages, "NOTEBOOKS", tmp_path)
    (tmp_path / "stages.toml").write_text(TABLE)
    for name in ("01_first", "02_second"):
        (tmp_path / f"{name}.py").write_text(NOTEBOOK)
    stages.table.cache_clear()
    yield tmp_path
    stages.table.cache_clear()


@pytest.fixture(scope="module")
def config() -> Config:
    return load("smoke")


def changed(config, change) -> dict[str, bool]:
    """Per stage: whether its fingerprint differs after ``change()``, which may return a config."""
    before = {s.name: stages.fingerprint(s, config, 0) for s in stages.table().values()}
    config = change() or config
    return {
        s.name: stages.fingerprint(s, config, 0) != before[s.name] for s in stages.table().values()
    }


def edit(path, old, new):
    def change():
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def test_code_of_a_notebook_counts_for_it_and_for_what_follows(folder, config):
    first, second = folder / "01_first.py", folder / "02_second.py"
    assert changed(config, edit(first, "= 3", "= 4")) == {"01_first": True, "02_second": True}
    assert changed(config, edit(second, "= 3", "= 4")) == {"01_first": False, "02_second": True}


@pytest.mark.parametrize(
    ("old", "new"),
    [("# # 1. Prose", "# # 1. Better prose"), ("size = 3", "size  =  3  # a comment")],
    ids=["prose", "layout and comments"],
)
def test_prose_and_layout_do_not_count(folder, config, old, new):
    assert not any(changed(config, edit(folder / "01_first.py", old, new)).values())


def test_only_declared_config_sections_count(folder, config):
    def with_section(name, **values):
        section = dataclasses.replace(getattr(config, name), **values)
        return lambda: dataclasses.replace(config, **{name: section})

    both = {"01_first": True, "02_second": True}
    assert changed(config, with_section("model", rope_theta=2e6)) == both | {"01_first": False}
    assert changed(config, with_section("tokenizer", kept_share=0.5)) == both
    assert changed(config, with_section("runtime", threads=7)) == both
    assert not any(changed(config, with_section("data", heldout_share=0.9)).values())


def test_committed_results_count_where_they_are_plotted(folder, config, monkeypatch):
    (folder / "stages.toml").write_text(TABLE + 'files = ["measured.json"]\n')
    stages.table.cache_clear()
    (folder / "measured.json").write_text("1")
    monkeypatch.setattr(stages, "module_hash", lambda module: module)
    monkeypatch.setattr(stages, "ROOT", folder)
    measured = edit(folder / "measured.json", "1", "2")
    assert changed(config, measured) == {"01_first": False, "02_second": True}


def test_cards_count_where_their_sources_are_read(folder, config, monkeypatch):
    """Dialogues are read by what fine-tunes, public tokenizers by what compares, the other sources
    by what reads the data section."""
    (folder / "stages.toml").write_text(
        TABLE.replace('["tokenizer"]', '["data"]').replace('["model"]', '["sft", "comparison"]')
    )
    stages.table.cache_clear()
    cards = folder / "data_cards"
    cards.mkdir()
    public = config.comparison.public[0]
    for name in (config.data.sources[0], config.sft.dialogue_source, public):
        (cards / f"{name}.md").write_text("size: 1")
    monkeypatch.setattr(stages, "module_hash", lambda module: module)
    monkeypatch.setattr(stages, "ROOT", folder)
    dialogues = edit(cards / f"{config.sft.dialogue_source}.md", "1", "2")
    assert changed(config, dialogues) == {"01_first": False, "02_second": True}
    vocabulary = edit(cards / f"{public}.md", "1", "2")
    assert changed(config, vocabulary) == {"01_first": False, "02_second": True}
    source = edit(cards / f"{config.data.sources[0]}.md", "1", "2")
    assert changed(config, source) == {"01_first": True, "02_second": True}


def test_seed_and_known_parameters_count(folder, config):
    second = stages.find("02")
    base = stages.fingerprint(second, config, 0)
    assert stages.fingerprint(second, config, 1) != base
    assert stages.fingerprint(second, config, 0, {"absent": 1}) == base
    (folder / "02_second.py").write_text(NOTEBOOK.replace("seed: int = 0", "lengths: int = 0"))
    assert stages.fingerprint(second, config, 0, {"lengths": 1})["parameters"] == '{"lengths": 1}'


def test_modules_are_found_through_packages_and_inside_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    files = {
        "__init__": "",
        "plot": "import kexa.hidden",
        "hidden": "",
        "a/__init__": "from .b import f",
        "a/b": "def f():\n    from kexa import c\n    from ..d import g\n",
        "c": "import torch.nn",
        "d": "from kexa.a import b, f",
        "unused": "",
    }
    for name, text in files.items():
        path = tmp_path / "kexa" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    stages.module_imports.cache_clear()
    found = stages.closure({"kexa.a", "kexa.plot"})
    stages.module_imports.cache_clear()
    assert found == {"kexa", "kexa.a", "kexa.a.b", "kexa.c", "kexa.d"}


def test_a_package_answers_for_its_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    for package in ("kexa", "kexa/items"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    data = tmp_path / "kexa" / "items" / "korean" / "list.jsonl"
    data.parent.mkdir()

    def hashes():
        stages.module_hash.cache_clear()
        return stages.module_hash("kexa"), stages.module_hash("kexa.items")

    data.write_text("1")
    before = hashes()
    data.write_text("2")
    after = hashes()
    stages.module_hash.cache_clear()
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_stage_sees_the_sections_it_declares(folder, config):
    visible = stages.VisibleConfig(config, stages.find("01_first"))
    assert visible.tokenizer is config.tokenizer
    assert visible.profile == "smoke"
    with pytest.raises(ConfigError, match="01_first reads config section 'model'.*stages.toml"):
        _ = visible.model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("[02_second]", "[02_other]"), "02_second.py has no row"),
        (TABLE.replace('"01_first"', '"03_third"'), "needs '03_third', not a stage before it"),
        (TABLE.replace('"model"', '"modle"'), "no section 'modle'"),
    ],
)
def test_a_bad_table_says_what_is_wrong(folder, text, message):
    (folder / "stages.toml").write_text(text)
    stages.table.cache_clear()
    with pytest.raises(ConfigError, match=message):
        stages.table()


def test_find_takes_numbers_and_names(folder):
    assert {stages.find(n).name for n in ("2", "02", "02_second")} == {"02_second"}
    with pytest.raises(ConfigError, match="no notebook '03'.*01_first, 02_second"):
        stages.find("03")


def test_why_names_the_changed_parts():
    assert stages.why({"seed": "0", "config rl": "a"}, {"seed": "0", "config rl": "b"}) == (
        "config rl changed"
    )
    many = {f"module {c}": "1" for c in "abcde"}
    assert stages.why({}, many) == "module a, module b, module c and 2 more changed"


def test_every_notebook_has_its_row_and_every_row_its_notebook():
    stages.table.cache_clear()
    found = sorted(path.stem for path in stages.NOTEBOOKS.glob("[0-9][0-9]_*.py"))
    assert list(stages.table()) == found


def test_the_table_names_what_the_notebooks_read_and_no_more():
    stages.table.cache_clear()
    for stage in stages.table().values():
        code = stages.code_cells(stage.source.read_text(encoding="utf-8"))
        read = set(re.findall(r"run\.config\.(\w+)", code)) - {"runtime"}  # visible to all
        assert set(stage.sections) == read, stage.name
        assert set(stage.needs) <= set(re.findall(r"\"(\d\d_\w+)\"", code)), stage.name
