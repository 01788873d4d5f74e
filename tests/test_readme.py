"""What the README says works."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

from kexa import report
from kexa.config import ROOT, load

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_name_is_there():
    names = re.findall(r"^\| `(kexa\.[\w.]+)", README, re.MULTILINE)
    assert len(names) >= 7
    for name in names:
        module, _, attribute = name.rpartition(".")
        parent = importlib.import_module(module)
        assert hasattr(parent, attribute) or importlib.import_module(name), name


def test_every_folder_and_verb_is_there():
    for folder in re.findall(r"^    (\w+)/ ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    makefile = (ROOT / "Makefile").read_text()
    for verb in set(re.findall(r"(?:`|\$ )make (\w+)", README)):
        assert f"\n{verb}:" in makefile, verb
    for module in re.findall(r"^ +(?:kexa/ +)?((?:\w+, )*\w+)   ", README, re.MULTILINE):
        for name in module.split(", "):
            path = ROOT / "kexa" / name
            assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_the_ablation_it_shows_is_a_valid_config():
    (line,) = re.findall(r"under \[model\]:  (\w+) = \"(\w+)\"", README)
    assert getattr(load("smoke", {f"model.{line[0]}": line[1]}).model, line[0]) == line[1]


def test_the_table_has_every_notebook():
    table = report.readme_table(ROOT / "runs")
    for row in table.splitlines():
        if row.startswith("| ["):
            assert row.split("](")[0] in README, "run `kexa notebooks --readme`"
