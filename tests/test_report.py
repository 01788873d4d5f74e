"""The report page and the README's table say what is on disk, no more."""

from __future__ import annotations

import json

import pytest

from kexa import report, stages
from kexa.pipeline import open_pipeline, write_done

PNG = b"\x89PNG small"


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """Stage one is done with a failing check, stage two was killed, stage three never ran."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    rows = ""
    for name in ("01_one", "02_two", "03_three"):
        (folder / f"{name}.py").write_text(f"# %% [markdown]\n# # Title of {name} <&>\n# %%\n1\n")
        rows += f"[{name}]\nneeds = []\nsections = []\n"
    (folder / "stages.toml").write_text(rows)
    monkeypatch.setattr(stages, "NOTEBOOKS", folder)
    stages.table.cache_clear()
    line = open_pipeline("smoke", str(tmp_path / "smoke"))
    one, two, _ = stages.table().values()
    for stage in (one, two):
        line.directory(stage).mkdir(parents=True)
        (line.directory(stage) / "started.json").write_text("{}")
    (line.directory(one) / "curve.png").write_bytes(PNG)
    results = {
        "values": {
            "loss": {"value": 4.25, "unit": "nats/token", "note": "[4.1, 4.4]", "headline": True},
            "spare": {"value": 7, "unit": "", "note": "a <note>", "headline": False},
        },
        "checks": [{"claim": "pigs fly", "holds": False, "measured": "0 m"}],
        "figures": [{"file": "curve.png", "caption": "Loss & more"}],
        "environment": {
            "device": "CPU", "commit": "abc", "python": "3.11", "versions": {"torch": "2"},
        },
    }  # fmt: skip
    (line.directory(one) / "results.json").write_text(json.dumps(results))
    write_done(line.directory(one), line.fingerprint(one), 90, 2**30)
    yield line
    stages.table.cache_clear()


def test_the_page_counts_what_is_there(pipeline):
    page = report.write_report(pipeline).read_text(encoding="utf-8")
    assert "1 of 3 up to date" in page
    assert "0 of 1 hold" in page
    assert page.count("not run") == 2  # table and section of stage three
    assert page.count(">unfinished<") == 2
    assert "4.25" in page
    assert "[4.1, 4.4]" in page
    assert page.count("data:image/png;base64,") == 1
    assert "Loss &amp; more" in page
    assert "a &lt;note&gt;" in page
    assert "Title of 01_one &lt;&amp;&gt;" in page
    assert "http" not in page


def test_a_changed_source_makes_the_page_say_so(pipeline):
    source = stages.find("01_one").source
    source.write_text(source.read_text() + "2\n")
    assert "0 of 3 up to date" in report.render(pipeline)
    assert "out of date" in report.render(pipeline)


def test_the_readme_gets_minutes_and_where_they_come_from(pipeline, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- notebooks: -->\nold\n<!-- end -->\nafter\n")
    assert report.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert "| [Title of 01_one <&>](notebooks/01_one.ipynb) | 1.5 min, 1.0 GiB | - |" in text
    assert "smoke: CPU, commit abc." in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert not report.update_readme(readme, tmp_path)
    two = pipeline.directory(stages.find("02_two"))
    (two / "results.json").write_text('{"environment": {"device": "CPU", "commit": "def"}}')
    assert report.update_readme(readme, tmp_path)
    assert "smoke: CPU, commit abc; smoke: CPU, commit def." in readme.read_text()
