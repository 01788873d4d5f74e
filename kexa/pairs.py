"""Notebook pairs: ``NN_name.py`` is the source, ``NN_name.ipynb`` is generated from it, one way.

    build            write every .ipynb from its .py; outputs stay while no code cell has changed
    check            pairs agree, and no committed output belongs to one machine or one minute
    commit_outputs   take the outputs of a run's executed notebooks into the pairs, cleaned

Why not ``jupytext --sync``: it decides by timestamps, which git does not keep, and draws random
cell ids. Here a cell's id is a hash of its position and source, and metadata is fixed, so equal
sources give equal bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat

from kexa.config import ROOT, ConfigError
from kexa.record import write_atomic

NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"  # how libraries show progress in a notebook
HEADER = """\
# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""
METADATA = {
    "jupytext": {
        "formats": "ipynb,py:percent",
        "text_representation": {"extension": ".py", "format_name": "percent"},
    },
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
# What must not be in a committed output, and what to call it.
TRACES = {
    "a path of one machine": re.compile(r"(?:^|[\s'\"(=])(?:/[\w.-]+){2,}|[A-Z]:\\\\|~/"),
    "a wall-clock figure": re.compile(
        r"\b\d+(\.\d+)? ?(ms|it/s|sec(onds?)?|min(utes?)?)\b|\b\d\d:\d\d\b|\btok(ens?)?/s\b"
    ),
    "an object address": re.compile(r"\bat 0x[0-9a-f]{6,}"),
    "a progress bar": re.compile(r"\d+%\|"),
}


def sources(folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebook sources, in order."""
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def to_notebook(source: str) -> nbformat.NotebookNode:
    """A percent-format source as a notebook without outputs; equal sources, equal notebooks."""
    notebook = jupytext.reads(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        digest = hashlib.sha256(f"{i}\n{cell.cell_type}\n{cell.source}".encode())
        cell.id = digest.hexdigest()[:12]
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return notebook


def build(folder: Path = NOTEBOOKS) -> list[Path]:
    """Write every ``.ipynb`` from its ``.py``, its header normalised; returns what changed."""
    changed = []
    for path in sources(folder):
        normal, notebook = _normal(path)
        pair = path.with_suffix(".ipynb")
        if pair.is_file():
            _keep_outputs(nbformat.read(pair, as_version=4), notebook)
        changed += _write(path, normal) + _write(pair, nbformat.writes(notebook) + "\n")
    return changed


def check(folder: Path = NOTEBOOKS) -> list[str]:
    """What is wrong with the pairs, one sentence each; empty when all is well."""
    faults = []
    for path in sources(folder):
        normal, notebook = _normal(path)
        pair = path.with_suffix(".ipynb")
        if not pair.is_file() or path.read_text(encoding="utf-8") != normal:
            faults.append(f"{path.stem}: not built; run `kexa notebooks --build`")
            continue
        stored = nbformat.read(pair, as_version=4)
        for index, text in _texts(stored):
            for name, trace in TRACES.items():
                if found := trace.search(text):
                    faults.append(
                        f"{pair.name} cell {index} holds {name}: {found.group().strip()!r}"
                    )
        for index, cell in enumerate(stored.cells):
            if any(out.output_type == "error" for out in cell.get("outputs", [])):
                faults.append(f"{pair.name} cell {index} holds an error")
        for cell in stored.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        if nbformat.writes(stored) != nbformat.writes(notebook):
            faults.append(f"{pair.name} differs from {path.name}; run `kexa notebooks --build`")
    for pair in sorted(folder.glob("*.ipynb")):
        if not pair.with_suffix(".py").is_file():
            faults.append(f"{pair.name} has no .py source: remove it")
    return faults


def commit_outputs(runs: Path, folder: Path = NOTEBOOKS) -> list[Path]:
    """Take the outputs of the executed notebooks in a run directory into the pairs.

    Progress, warnings (stderr, widgets) and all timing are dropped; what remains repeats for equal
    seeds.

    Raises:
        ConfigError: an executed notebook is missing, or ran other code than its source has today.
    """
    changed = []
    for path in sources(folder):
        executed = runs / path.stem / path.with_suffix(".ipynb").name
        if not executed.is_file():
            raise ConfigError(f"{runs.name} has no executed {path.stem}: run it there first")
        _, notebook = _normal(path)
        code = [c for c in notebook.cells if c.cell_type == "code"]
        ran = [
            c
            for c in nbformat.read(executed, as_version=4).cells
            if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])
        ]
        if [c.source for c in ran] != [c.source for c in code]:
            raise ConfigError(f"{path.stem} has changed since its run in {runs.name}: run it again")
        for count, (cell, result) in enumerate(zip(code, ran, strict=True), 1):
            cell.execution_count = count
            cell.outputs = [_clean(o, count) for o in result.outputs if not _transient(o)]
        changed += _write(path.with_suffix(".ipynb"), nbformat.writes(notebook) + "\n")
    return changed


def _normal(path: Path) -> tuple[str, Any]:
    text = path.read_text(encoding="utf-8")
    body = re.sub(r"\A\s*# ---\n(?:#.*\n)*?# ---\n", "", text)
    normal = HEADER + body.lstrip("\n").rstrip() + "\n"
    return normal, to_notebook(normal)


def _write(path: Path, text: str) -> list[Path]:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return []
    write_atomic(path, text)
    return [path]


def _keep_outputs(old: Any, new: Any) -> None:
    """Carry outputs over only when every code cell is what it was: others would show a lie."""
    old_code = [c for c in old.cells if c.cell_type == "code"]
    new_code = [c for c in new.cells if c.cell_type == "code"]
    if [c.source for c in old_code] == [c.source for c in new_code]:
        for before, after in zip(old_code, new_code, strict=True):
            after.outputs, after.execution_count = before.outputs, before.execution_count


def _transient(output: Any) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def _clean(output: Any, count: int) -> Any:
    if "execution_count" in output:
        output.execution_count = count
    if "metadata" in output:
        output.metadata = nbformat.from_dict({})
    return output


def _texts(notebook: Any) -> Iterator[tuple[int, str]]:
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield index, output.get("text", "")
            data = output.get("data", {})
            yield from ((index, data[kind]) for kind in ("text/plain", "text/html") if kind in data)
