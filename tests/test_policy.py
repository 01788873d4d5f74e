"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from kexa import pipeline, stages
from kexa.config import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("kexa", "benchmarks", "tests", "notebooks")
PYTHON = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
NAMES = {
    "tiktoken_ext": "tiktoken",
    "yaml": "pyyaml",
}  # distributions that are called otherwise than what is imported
UNIMPORTED = {  # direct dependencies that no module imports by name
    "ipykernel": "the kernel of the notebooks",
    "ipywidgets": "progress bars of libraries warn in a notebook without it",
    "jupyterlab": "where they are read",
    "pytest-xdist": "tests on two processes",
    "ruff": "a command",
}

# Imports go up this list, never down; packages on one line do not import each other in a circle.
LAYERS = (
    ("config", "lock", "record", "runtime", "stages", "statistics"),
    ("data", "kernels", "tokenizer"),
    ("model",),
    ("train", "dist", "interop", "parallel"),
    ("longctx", "post"),
    ("agents", "eval"),
    (
        "__main__",
        "doctor",
        "notebook",
        "pairs",
        "pipeline",
        "plot",
        "pretrain_figures",
        "report",
        "study",
        "study_figures",
    ),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "kexa").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> set[tuple[str, str]]:
    """Which part of kexa imports which, function-level imports included."""
    found = set()
    for module in modules():
        for other in stages.module_imports(module):
            pair = tuple([*m.split("."), "kexa"][1] for m in (module, other))
            if pair[0] != pair[1] and "kexa" not in pair:
                found.add(pair)
    return found


def test_imports_go_one_way():
    unknown = {part for pair in arrows() for part in pair} - LAYER.keys()
    assert not unknown, f"put {unknown} on a layer"
    back = [f"{a} imports {b}" for a, b in sorted(arrows()) if LAYER[a] < LAYER[b]]
    assert not back


def test_no_two_parts_import_each_other():
    graph = arrows()
    reach = set(graph)
    while more := {(a, d) for a, b in reach for c, d in graph if b == c} - reach:
        reach |= more
    assert not [a for a, b in reach if a == b]


def test_interop_sees_the_model_and_the_tokenizer_only():
    base = set(LAYERS[0])
    assert {b for a, b in arrows() if a == "interop"} - base <= {"model", "tokenizer"}


def test_the_skip_path_imports_no_torch():
    import subprocess

    code = (
        "import sys; from kexa import __main__, config, lock, pipeline, report, stages; "
        "config.load('smoke'); print('torch' in sys.modules, 'papermill' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_modules_stay_short():
    long = {m: n for m, p in modules().items() if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_no_folder_is_left_out_of_tests_or_lint(pytestconfig):
    """By default both tools leave out every folder called dist, as one for built packages."""
    folders = {part for path in PYTHON for part in path.relative_to(ROOT).parent.parts}
    left_out = pytestconfig.getini("norecursedirs")
    assert [f for f in folders if any(fnmatch.fnmatch(f, pattern) for pattern in left_out)] == []
    command = [sys.executable, "-m", "ruff", "check", "--show-files"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {str(path) for path in PYTHON} <= set(shown.splitlines())


def test_every_module_says_what_it_is():
    silent = [
        m for m, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def requirements() -> dict[str, str]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return {re.match(r"[\w-]+", line).group().lower(): line for line in lines}


def test_every_dependency_is_pinned_exactly():
    loose = [
        line for line in requirements().values() if not re.match(r"[\w-]+==[\w.]+(; |$)", line)
    ]
    assert not loose


def test_dependencies_are_what_is_imported():
    imported = set()
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    own = {"kexa", "tests", "benchmarks"} | {p.stem for p in (ROOT / "tests").rglob("*.py")}
    foreign = imported - set(sys.stdlib_module_names) - own
    used = {NAMES.get(name, name).replace("_", "-").lower() for name in foreign}
    declared = set(requirements())
    assert used - declared == set(), "imported but not in pyproject.toml"
    assert declared - used - UNIMPORTED.keys() == set(), "in pyproject.toml but not imported"


def test_conda_environment_is_the_package_with_its_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    python, pip, via_pip = environment["dependencies"]
    minimum = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert (python, pip) == (f"python={minimum}", "pip")
    assert via_pip == {"pip": [f"-e .[{extras}]"]}
    assert environment["channels"] == ["conda-forge"]


def test_make_installs_the_same_extras():
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    assert f'--editable ".[{extras}]"' in (ROOT / "Makefile").read_text()


def test_no_skip_but_the_listed_one():
    hidden = re.compile(
        r"mark\.(skip|skipif|xfail|flaky)\b|pytest\.(skip|xfail|importorskip)\(|reruns"
    )
    found = [
        f"{path.name}: {match.group()}"
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in ("test_policy.py", "conftest.py")
        for match in hidden.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_errors_that_speak_to_users_print_without_a_traceback():
    ours = {
        node.name
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(re.search(r"Error$|^Exception$", ast.unparse(base)) for base in node.bases)
    }
    assert ours - {"Refused"} <= set(pipeline.SPEAKING)  # a tool's answer, caught by the episode


@pytest.mark.parametrize(
    "what",
    [
        r"(?<![\w.])/(work|root|home|tmp)/",
        r"https?://(?!arxiv\.org|github\.com)[^\s)\"]*(pypi|index)",
    ],
)
def test_no_path_of_a_machine_and_no_registry(what):
    texts = [*PYTHON, *(ROOT / "configs").glob("*"), *ROOT.glob("*.*"), ROOT / "Makefile"]
    found = [
        f"{path.name}: {match.group()}"
        for path in texts
        if path.is_file() and path.name not in ("test_policy.py", ".git")  # a file in a worktree
        for match in re.finditer(what, path.read_text(encoding="utf-8"))
    ]
    assert not found
