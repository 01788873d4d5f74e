"""Pairs: one way, byte for byte, and clean."""

from __future__ import annotations

import nbformat
import pytest

from kexa import pairs
from kexa.config import ConfigError

SOURCE = """\
# %% [markdown]
# # 1. Title
# %% tags=["parameters"]
seed: int = 0
# %%
print(seed)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "01_first.py").write_text(SOURCE)
    pairs.build(tmp_path)
    return tmp_path


def run(folder, runs, outputs, source=SOURCE):
    """What papermill leaves: an injected cell, outputs, metadata."""
    notebook = pairs.to_notebook(source)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    code[1].outputs, code[1].execution_count = outputs, 7
    code[1].metadata["papermill"] = {"duration": 1.5}
    injected = nbformat.v4.new_code_cell("# Parameters\nseed = 1")
    injected.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(2, injected)
    path = runs / "01_first" / "01_first.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def test_building_is_reproducible_and_idempotent(folder, tmp_path_factory):
    first = (folder / "01_first.ipynb").read_bytes()
    assert pairs.build(folder) == []
    other = tmp_path_factory.mktemp("other")
    (other / "01_first.py").write_bytes((folder / "01_first.py").read_bytes())
    pairs.build(other)
    assert (other / "01_first.ipynb").read_bytes() == first
    assert pairs.check(folder) == []
    assert (folder / "01_first.py").read_text().startswith("# ---\n# jupyter:\n")


def test_the_parameters_tag_and_the_kernel_survive(folder):
    notebook = nbformat.read(folder / "01_first.ipynb", as_version=4)
    assert notebook.cells[1].metadata["tags"] == ["parameters"]
    assert notebook.metadata.kernelspec.name == "python3"
    nbformat.validate(notebook)


def test_an_edited_source_is_noticed(folder):
    path = folder / "01_first.py"
    path.write_text(path.read_text().replace("print(seed)", "print(seed + 1)"))
    assert pairs.check(folder) == [
        "01_first.ipynb differs from 01_first.py; run `kexa notebooks --build`"
    ]
    pairs.build(folder)
    assert pairs.check(folder) == []
    path.unlink()
    assert pairs.check(folder) == ["01_first.ipynb has no .py source: remove it"]


def test_outputs_come_in_clean_and_stay_while_the_code_does(folder, tmp_path):
    runs = tmp_path / "runs" / "laptop"
    result = nbformat.v4.new_output(
        "execute_result", data={"text/plain": "3"}, execution_count=7, metadata={"took": "1 s"}
    )
    bar = nbformat.v4.new_output("display_data", data={pairs.WIDGET: {}, "text/plain": "10%|#"})
    run(folder, runs, [stream("10%|#", "stderr"), bar, stream("loss 2.5\n"), result])
    assert pairs.commit_outputs(runs, folder) == [folder / "01_first.ipynb"]
    assert pairs.check(folder) == []
    cell = nbformat.read(folder / "01_first.ipynb", as_version=4).cells[2]
    assert [o.output_type for o in cell.outputs] == ["stream", "execute_result"]
    assert cell.outputs[1].metadata == {}
    assert cell.execution_count == cell.outputs[1].execution_count == 2
    assert cell.metadata == {}
    assert pairs.commit_outputs(runs, folder) == []

    path = folder / "01_first.py"
    path.write_text(path.read_text().replace("# # 1. Title", "# # 1. Better title"))
    pairs.build(folder)
    assert nbformat.read(folder / "01_first.ipynb", as_version=4).cells[2].outputs
    path.write_text(path.read_text().replace("print(seed)", "print(-seed)"))
    pairs.build(folder)
    assert not nbformat.read(folder / "01_first.ipynb", as_version=4).cells[2].outputs


def test_outputs_of_other_code_are_refused(folder, tmp_path):
    runs = tmp_path / "runs" / "laptop"
    with pytest.raises(ConfigError, match="laptop has no executed 01_first"):
        pairs.commit_outputs(runs, folder)
    run(folder, runs, [], SOURCE.replace("print(seed)", "print(2)"))
    with pytest.raises(ConfigError, match="01_first has changed since its run in laptop"):
        pairs.commit_outputs(runs, folder)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("saved to /data/ann/kexa/runs/x\n", "a path of one machine: '/data/ann/kexa/runs/x'"),
        ("took 3.2 s/it\n", None),
        ("took 12 seconds\n", "a wall-clock figure: '12 seconds'"),
        ("1200 tok/s\n", "a wall-clock figure"),
        ("<Axes at 0x7f6abff36410>\n", "an object address"),
        ("loss 2.5 nats/token, share 3/4, and/or, 12 steps\n", None),
    ],
)
def test_traces_of_one_machine_or_minute_are_faults(folder, text, fault):
    path = folder / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].outputs = [stream(text)]
    nbformat.write(notebook, path)
    faults = pairs.check(folder)
    assert len(faults) == (fault is not None)
    assert all(f"01_first.ipynb cell 2 holds {fault}" in found for found in faults)


def test_a_committed_error_is_a_fault(folder):
    path = folder / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].outputs = [
        nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])
    ]
    nbformat.write(notebook, path)
    assert pairs.check(folder) == ["01_first.ipynb cell 2 holds an error"]
