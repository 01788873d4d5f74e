"""Every notebook, executed at smoke through the command that users call, then once more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import nbformat
import pytest

from kexa import pairs, stages
from kexa.config import ROOT

pytestmark = pytest.mark.notebooks


def kexa(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kexa", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished smoke run in a fresh directory."""
    directory = tmp_path_factory.mktemp("runs") / "smoke"
    done = kexa("run", "--profile", "smoke", "--out", str(directory))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return directory


def test_every_notebook_leaves_its_record(out):
    for name in stages.table():
        results = json.loads((out / name / "results.json").read_text(encoding="utf-8"))
        assert results["stage"] == name
        assert results["environment"]["profile"] == "smoke"
        assert any(value["headline"] for value in results["values"].values()), name
        assert results["figures"], name
        assert results["checks"], name
        assert all(check["holds"] for check in results["checks"]), name
        for figure in results["figures"]:
            assert (out / name / figure["file"]).stat().st_size > 5_000
            assert len(figure["caption"]) > 20


def test_no_notebook_prints_a_warning_an_error_or_a_path(out):
    for name in stages.table():
        notebook = nbformat.read(out / name / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                text = output.get("text", "")
                assert output.output_type != "error"
                assert "Warning" not in text, f"{name}: {text}"
                if output.get("name") == "stdout":
                    traces = [w for w, trace in pairs.TRACES.items() if trace.search(text)]
                    assert not traces, f"{name} prints {traces}: {text}"


def test_memory_stays_in_bounds(out):
    done = [json.loads((out / name / "done.json").read_text()) for name in stages.table()]
    assert max(d["peak_memory_gib"] for d in done) < 8


def test_the_report_holds_every_figure_and_needs_nothing_else(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    results = [json.loads((out / name / "results.json").read_text()) for name in stages.table()]
    assert page.count("data:image/png;base64,") == sum(len(r["figures"]) for r in results)
    assert f"{len(results)} of {len(results)} up to date" in page
    assert not re.search(r"<script|(src|href)=.?https?:", page)


def test_a_second_run_has_nothing_to_do(out):
    begun = time.monotonic()
    again = kexa("run", "--profile", "smoke", "--out", str(out))
    assert again.returncode == 0
    assert again.stdout.count("unchanged") == len(stages.table())
    assert time.monotonic() - begun < 30
