"""The runner: notebooks in order, each once, as long as nothing it depends on has changed.

    runs/<profile>/NN_name/     artefacts of one stage: results.json, metrics.jsonl, figures, ...
        NN_name.ipynb           the executed notebook, written cell by cell
        started.json            fingerprint of what is being made here
        done.json               the same, plus minutes, peak memory and file sizes; written last
    runs/<profile>/report.html  one page over everything

A stage is skipped when done.json carries today's fingerprint (``kexa.stages``) and its files are
still there. A stage that was killed is started again in its directory, so that its own checkpoints
are resumed; any other stale directory is emptied first, so that nothing of an older run is picked
up. A kernel that dies is noticed within a second by nbclient's poll; memory is sampled beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kexa import config as configs
from kexa import lock, stages
from kexa.config import ROOT, Config
from kexa.record import read_json, write_atomic
from kexa.stages import Stage

TOKEN = "KEXA_STAGE_TOKEN"  # in a kernel's environment: the lock it may write under
PARAMETERS = "KEXA_PARAMETERS"  # likewise: what `kexa run -p` set, for `require`
SPEAKING = (  # errors whose message is all a user needs: no traceback
    "BesideFailed",
    "Busy",
    "CannotMeet",
    "CannotWrite",
    "CheckFailed",
    "CheckpointError",
    "ConfigError",
    "Interrupted",
    "SourceError",
    "StageFailed",
    "SynthesisError",
    "TrainingDiverged",
    "Unfinished",
    "UnreadableReplies",
    "FileNotFoundError",
    "NotADirectoryError",
    "OSError",
    "PermissionError",
)


class StageFailed(Exception):
    """A notebook that did not finish; the message says where and why."""


@dataclass(frozen=True)
class Pipeline:
    """A config and a seed in an output directory."""

    config: Config
    profile: str  # as given: the notebooks load it again
    out: Path
    seed: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def directory(self, stage: Stage) -> Path:
        return self.out / stage.name

    def fingerprint(self, stage: Stage) -> dict[str, str]:
        return stages.fingerprint(stage, self.config, self.seed, self.parameters)

    def stale(self, stage: Stage) -> str:
        """Why the stage has to run; empty when its artefacts are those of today's sources."""
        done = read_json(self.directory(stage) / "done.json")
        if not done:
            return "no finished run"
        now = self.fingerprint(stage)
        if done.get("fingerprint") != now:
            return stages.why(done.get("fingerprint", {}), now)
        for name, size in done["files"].items():
            path = self.directory(stage) / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is missing or cut short"
        return ""

    def run(self, targets: Sequence[Stage], force: bool = False) -> None:
        """Run what is stale among the targets and what they need; with ``force`` every target.

        Raises:
            StageFailed: a notebook failed; the stages before it keep their artefacts.
        """
        plan = stages.with_needs(targets)
        for i, stage in enumerate(plan, 1):
            forced = force and stage in targets
            reason = "forced" if forced else self.stale(stage)
            head = f"[{i:2d}/{len(plan)}] {stage.name:<24} "
            print(head, end="", flush=True)
            if reason:
                try:
                    self.execute(stage, head, fresh=forced)
                except BaseException:
                    print(f"failed     ({reason})", flush=True)
                    raise
            print(f"{'done' if reason else 'unchanged':<10} {self.summary(stage)}", flush=True)

    def execute(self, stage: Stage, head: str = "", fresh: bool = False) -> None:
        """Run one notebook in a kernel of its own and record it.

        Args:
            head: start of the progress line, which a terminal shows again with minutes and memory.
            fresh: start over even where a killed run could be resumed.
        """
        directory = self.directory(stage)
        fingerprint = self.fingerprint(stage)
        with lock.hold(self.out, stage.name) as token:
            started = read_json(directory / "started.json")
            killed = started.get("fingerprint") == fingerprint
            if fresh or not killed or (directory / "done.json").exists():
                clear(directory)
            for half in directory.rglob(".*.tmp"):  # what a kill left of an atomic write
                half.unlink()
            write_atomic(directory / "started.json", _json({"fingerprint": fingerprint}))
            begun = time.perf_counter()
            with _Monitor(head) as memory, _environment(token, self.parameters):
                self._papermill(stage, directory, memory)
            seconds = time.perf_counter() - begun
            if not (directory / "results.json").is_file():
                raise StageFailed(f"{stage.name} ended without run.finish(): add it as last cell")
            write_done(directory, fingerprint, seconds, memory.peak)

    def summary(self, stage: Stage) -> str:
        """Minutes, peak memory and the first headlines of a finished stage, on one line."""
        done = read_json(self.directory(stage) / "done.json")
        results = read_json(self.directory(stage) / "results.json")
        headlines = [
            f"{name} {shown(entry)}"
            for name, entry in results.get("values", {}).items()
            if entry["headline"]
        ]
        cost = f"{done['minutes']:5.1f} min  {done['peak_memory_gib']:4.1f} GiB"
        return "  ".join([cost, "; ".join(headlines[:2])]).rstrip()

    def _papermill(self, stage: Stage, directory: Path, memory: _Monitor) -> None:
        import papermill
        from traitlets.config import Config as JupyterConfig

        from kexa import pairs

        source = stage.source.read_text(encoding="utf-8")
        known = stages.parameter_names(source)
        parameters = {"profile": self.profile, "seed": self.seed, "out_dir": str(self.out)}
        parameters |= {k: v for k, v in self.parameters.items() if k in known}
        output = directory / f"{stage.name}.ipynb"
        encrypted = JupyterConfig({"KernelManager": {"transport_encryption": "auto"}})
        try:
            papermill.execute_notebook(
                pairs.to_notebook(source), str(output), parameters, kernel_name="python3",
                cwd=str(ROOT), progress_bar=False, start_timeout=180, autosave_cell_every=30,
                config=encrypted,
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            raise StageFailed(_cell_failure(stage, error)) from None
        except (RuntimeError, TimeoutError) as error:  # nbclient: the kernel died or never started
            raise StageFailed(_kernel_death(stage, output, memory, error)) from None


def open_pipeline(
    profile: str, out_dir: str = "", seed: int = 0, parameters: Mapping[str, Any] | None = None
) -> Pipeline:
    """A pipeline for a profile name or the path of a ``.toml``.

    Raises:
        ConfigError: a bad profile, or a parameter that no notebook has.
    """
    config = configs.load(profile)
    sources = (s.source for s in stages.table().values() if s.source.is_file())
    known = {n for s in sources for n in stages.parameter_names(s.read_text(encoding="utf-8"))}
    for name in parameters or {}:
        stages.refuse_unknown(name, known, "this set of notebooks")
    path = str(Path(profile).resolve()) if profile.endswith(".toml") else profile
    out = Path(out_dir).resolve() if out_dir else ROOT / "runs" / config.profile
    return Pipeline(config, path, out, seed, dict(parameters or {}))


def clear(directory: Path) -> None:
    """Empty a stage directory; done.json goes first, so half a deletion is not a finished stage."""
    (directory / "done.json").unlink(missing_ok=True)
    if directory.exists():
        shutil.rmtree(directory)


def write_done(
    directory: Path, fingerprint: Mapping[str, str], seconds: float, peak_bytes: int
) -> None:
    """Mark a stage as finished."""
    own = {"started.json", "done.json", f"{directory.name}.ipynb"}  # a reader may save the last
    files = {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in own and not path.name.startswith(".")
    }
    done = {
        "fingerprint": fingerprint,
        "minutes": round(seconds / 60, 2),
        "peak_memory_gib": round(peak_bytes / 2**30, 2),
        "files": files,
    }
    write_atomic(directory / "done.json", _json(done))


def shown(entry: Mapping[str, Any]) -> str:
    """A recorded value as text: ``4.214 nats/token``."""
    value = entry["value"]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} {entry['unit']}".rstrip()


class _Monitor:
    """Samples the resident memory of this process's children: the kernel and what it starts.

    ``last`` and ``peak`` are in bytes. On a terminal the progress line shows them as they grow.
    """

    def __init__(self, head: str):
        self.last = self.peak = 0
        self._head, self._terminal = head, bool(head) and sys.stdout.isatty()
        self._begun = time.perf_counter()

    def __enter__(self) -> _Monitor:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._terminal:
            print(f"\r{self._head}", end="", flush=True)

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.5):
            total = 0
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += child.memory_info().rss
            if total:
                self.last, self.peak = total, max(self.peak, total)
            if self._terminal:
                minutes, memory = (time.perf_counter() - self._begun) / 60, self.peak / 2**30
                line = f"{self._head}{'running':<10} {minutes:5.1f} min  {memory:4.1f} GiB"
                print(f"\r{line}", end="", flush=True)


@contextlib.contextmanager
def _environment(token: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """What the kernel inherits.

    Its threads spin briefly before they sleep while they wait for each other, unless the user has
    said otherwise (libgomp, with which torch comes on Linux). Measured on two cores, seconds of a
    training step alone and beside a busy process: 0.43 and 0.64 without spinning, 0.33 and 0.90
    with 5,000 rounds, 0.31 and 1.35 with 20,000.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ[TOKEN], os.environ[PARAMETERS] = token, json.dumps(dict(parameters))
    try:
        yield
    finally:
        del os.environ[TOKEN], os.environ[PARAMETERS]


def _cell_failure(stage: Stage, error: Any) -> str:
    sentence = f"{stage.name} stopped in cell [{error.exec_count}]: {error.evalue or error.ename}"
    if error.ename in SPEAKING:
        return sentence
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    return f"{sentence}\n\n{_indented(error.source)}\n\n{trace}"


def _kernel_death(stage: Stage, output: Path, memory: _Monitor, error: Exception) -> str:
    machine = psutil.virtual_memory()
    use = (
        f"its processes held {memory.last / 2**30:.2f} GiB just before (peak "
        f"{memory.peak / 2**30:.2f}); {machine.available / 2**30:.1f} of "
        f"{machine.total / 2**30:.1f} GiB are free now"
    )
    cells = read_json(output).get("cells", [])
    begun = [c for c in cells if c["metadata"].get("papermill", {}).get("start_time")]
    if not begun:
        return f"{stage.name}: no kernel started ({error}); {use}"
    said = [
        line
        for out in begun[-1].get("outputs", [])
        for line in "".join(out.get("text", [])).splitlines()[-5:]
    ]
    return (
        f"{stage.name}: the kernel died ({error}); {use}.\nThe system ends a process that takes "
        "too much memory without a traceback: then use a smaller profile or a larger machine.\n"
        f"It was in this cell:\n\n{_indented(''.join(begun[-1]['source']))}"
        + (f"\n\nIts last output:\n\n{_indented(chr(10).join(said))}" if said else "")
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
