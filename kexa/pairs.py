"""Notebook pairs: ``NN_name.py`` is the source, ``NN_name.ipynb`` is generated from it, one way.

    build            write every .ipynb from its .py; stored outputs stay while no code cell has changed
    check            pairs agree, and committed outputs hold nothing that belongs to one machine or one minute
    commit_outputs   copy the executed notebooks of a run into the pairs, cleaned

Why not ``jupytext --sync``: it decides by timestamps, which git does not keep, and draws random cell ids. Here a
cell's id is a hash of its position and source, and metadata is fixed, so equal sources give equal bytes.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat

from kexa.config import ROOT
from kexa.record import write_atomic

NOTEBOOKS = ROOT / "notebooks"
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


def sources(folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebook sources, in order."""
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def to_notebook(source: str) -> nbformat.NotebookNode:
    """A percent-format source as a notebook without outputs; equal sources give equal notebooks."""
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
    """Write every ``.ipynb`` from its ``.py``, with its header in the standard form. Returns what changed."""
    changed = []
    for path in sources(folder):
        text = path.read_text(encoding="utf-8")
        normal = HEADER + _without_header(text).lstrip("\n").rstrip() + "\n"
        notebook = to_notebook(normal)
        pair = path.with_suffix(".ipynb")
        if pair.is_file():
            _keep_outputs(nbformat.read(pair, as_version=4), notebook)
        for target, new in ((path, normal), (pair, nbformat.writes(notebook) + "\n")):
            if not target.is_file() or target.read_text(encoding="utf-8") != new:
                write_atomic(target, new)
                changed.append(target)
    return changed


def _without_header(text: str) -> str:
    return re.sub(r"\A\s*# ---\n(?:#.*\n)*?# ---\n", "", text)


def _keep_outputs(old: Any, new: Any) -> None:
    """Carry outputs over only when every code cell is what it was: outputs of other code would lie."""
    old_code = [c for c in old.cells if c.cell_type == "code"]
    new_code = [c for c in new.cells if c.cell_type == "code"]
    if [c.source for c in old_code] == [c.source for c in new_code]:
        for before, after in zip(old_code, new_code, strict=True):
            after.outputs, after.execution_count = before.outputs, before.execution_count
