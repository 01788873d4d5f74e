"""What a run leaves behind: ``metrics.jsonl``, figures and, written last, ``results.json``.

``results.json``: ``values`` and ``checks`` repeat exactly for equal seeds on one machine;
``environment`` (profile, seed, commit, versions, device) says where they came from; ``timings``
(minutes, peak memory) is the only part allowed to differ between two runs.

With ``runtime.tensorboard`` every line of ``metrics.jsonl`` also becomes events in ``tensorboard/``
beside it, one scalar per number, named ``series/name``. Events bear the wall clock; nothing else
that is logged does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from kexa.config import ROOT, Config

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


class CheckFailed(AssertionError):
    """A claim of a notebook that did not hold; the message is the claim and what was measured."""


class CannotWrite(OSError):
    """The disk is full or the directory refuses; the message says which file and what to do."""


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    payload = data.encode("utf-8") if isinstance(data, str) else data
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a system error while writing ``path`` into a sentence with the remedy."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"cannot write {path.name} ({error.strerror}): free space, or choose another output "
            "directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file as a dict; empty when there is no such file or a crash cut it short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def discard_log(directory: Path) -> None:
    """Delete what :meth:`Run.log` wrote there: another run is about to begin."""
    (directory / METRICS).unlink(missing_ok=True)
    if (directory / EVENTS).is_dir():
        shutil.rmtree(directory / EVENTS)


class Run:
    """The record of one stage. Notebooks get one from ``kexa.notebook.begin``."""

    def __init__(self, stage: str, config: Config, seed: int, directory: Path):
        self.stage, self.config, self.seed, self.dir = stage, config, seed, Path(directory)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, dict[str, Any]] = {}
        self._checks: list[dict[str, Any]] = []
        self._figures: list[dict[str, str]] = []
        self._started = time.perf_counter()
        self._metrics = self.dir / METRICS
        self._logged = _restore(self._metrics)
        self._events = _Events(self.dir / EVENTS) if config.runtime.tensorboard else None

    def log(self, series: str, step: int, **scalars: float) -> None:
        """Append one line to ``metrics.jsonl``, once per series and step.

        A stage resumed after a kill passes through some steps again; what it logs then is what the
        file already holds.
        """
        if (series, step) in self._logged:
            return
        self._logged.add((series, step))
        line = {"series": series, "step": step, **{k: _plain(v) for k, v in scalars.items()}}
        with writing(self._metrics), open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._events:
            self._events.write(series, step, scalars)

    def value(
        self, name: str, value: Any, unit: str = "", note: str = "", headline: bool = False
    ) -> None:
        """Record one result; ``headline`` puts it on the report. Values must repeat: no timings."""
        self._values[name] = {
            "value": _plain(value),
            "unit": unit,
            "note": note,
            "headline": headline,
        }

    def figure(self, figure: Any, name: str, caption: str) -> None:
        """Save a matplotlib figure as ``<name>.png`` in the stage directory, for the report."""
        path = self.dir / f"{name}.png"
        with writing(path):
            temporary = path.with_name(f".{path.name}.tmp")
            figure.savefig(temporary, format="png", metadata={"Software": None})
            os.replace(temporary, path)
        self._figures.append({"file": path.name, "caption": caption})

    def check(self, claim: str, holds: bool, measured: str) -> None:
        """Print and record a claim. One that does not hold fails the stage at :meth:`finish`."""
        print(f"{'holds' if holds else 'FAILS'}: {claim} ({measured})")
        self._checks.append({"claim": claim, "holds": bool(holds), "measured": measured})

    def finish(self) -> None:
        """Write ``results.json``.

        Raises:
            CheckFailed: a recorded check does not hold; ``results.json`` is written all the same.
        """
        results = {
            "stage": self.stage,
            "values": self._values,
            "checks": self._checks,
            "figures": self._figures,
            "environment": environment(self.config, self.seed),
            "timings": {
                "minutes": round((time.perf_counter() - self._started) / 60, 3),
                "peak_memory_gib": round(peak_memory_gib(), 3),
            },
        }
        write_atomic(
            self.dir / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        )
        failed = [c for c in self._checks if not c["holds"]]
        if failed:
            raise CheckFailed("; ".join(f"{c['claim']} ({c['measured']})" for c in failed))


class _Events:
    """TensorBoard's event files; what is written is on disk when ``write`` returns."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(directory))

    def write(self, series: str, step: int, scalars: dict[str, Any]) -> None:
        for name, value in scalars.items():
            for tag, number in _numbers(f"{series}/{name}", value):
                self._writer.add_scalar(tag, number, step)
        self._writer.flush()


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a logged value, those of a list or a dict each under its own tag."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, int | float):
        yield tag, float(value)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _numbers(f"{tag}/{i}", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(f"{tag}/{key}", part)


def environment(config: Config, seed: int) -> dict[str, Any]:
    """Profile, seed, commit, versions and device of this process."""
    import torch

    return {
        "profile": config.profile,
        "seed": seed,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "triton", "tokenizers", "transformers")
        },
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def device_name() -> str:
    """The GPU that torch sees, or the kind of CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, with ``+changes`` when tracked files differ from it.

    The growing results of ``studies/`` are no change: they are written, not run.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".", ":!studies")
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _restore(path: Path) -> set[tuple[str, int]]:
    """Which (series, step) a metrics file holds; a last line that a kill cut short is removed."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    write_atomic(path, whole)
    return {(line["series"], line["step"]) for line in map(json.loads, whole.splitlines())}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
