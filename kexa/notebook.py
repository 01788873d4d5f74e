"""What a notebook calls: ``begin`` opens its record, ``require`` gives another stage's artefacts.

    run = notebook.begin("04_pretraining", profile, seed, out_dir)
    tokenizer_dir = notebook.require(run, "01_tokenizer") / "tokenizer"
    ...
    run.finish()

Under ``kexa run`` the needed stages are there already. In a notebook started by hand, with
papermill or in JupyterLab, ``require`` runs what is missing or stale first, so every notebook runs
alone, in any order, on a fresh clone. Such a notebook starts its own stage afresh, and counts as
finished for later stages only if it executed the cells of its source, all and in order: ``finish``
compares the kernel's history with NN_name.py. The same history betrays a misspelt ``papermill -p``.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kexa import lock, stages
from kexa.config import ROOT, ConfigError
from kexa.pipeline import (
    PARAMETERS,
    TOKEN,
    Pipeline,
    StageFailed,
    clear,
    open_pipeline,
    write_done,
)
from kexa.record import Run, peak_memory_gib
from kexa.stages import Stage, VisibleConfig

if TYPE_CHECKING:
    import torch

_held = contextlib.ExitStack()  # the lock of the stage that this process has begun by hand


class NotebookRun(Run):
    """The record of the stage of a running notebook; ``device`` is where its model belongs."""

    def __init__(self, stage: Stage, pipeline: Pipeline, device: torch.device):
        config = VisibleConfig(pipeline.config, stage)
        super().__init__(stage.name, config, pipeline.seed, pipeline.directory(stage))
        self.pipeline, self.device, self._source = pipeline, device, stage
        self._begun = time.perf_counter()
        if not os.environ.get(TOKEN):  # of the sources as they are now; the runner has its own
            self._fingerprint = pipeline.fingerprint(stage)

    def finish(self) -> None:
        """As :meth:`kexa.record.Run.finish`; by hand, also what the runner would do after it."""
        super().finish()
        if not os.environ.get(TOKEN):
            if _executed_source(self._source):
                seconds = time.perf_counter() - self._begun
                write_done(self.dir, self._fingerprint, seconds, int(peak_memory_gib() * 2**30))
            _held.close()


def begin(stage: str, profile: str, seed: int = 0, out_dir: str = "") -> NotebookRun:
    """Load the profile, apply the runtime policy and open the record of ``stage``.

    Args:
        stage: the notebook's name, ``"04_pretraining"``.
        profile: a file in ``configs/`` or the path of a ``.toml``.
        seed: the seed of every random choice.
        out_dir: where runs are kept; empty means ``runs/<profile>`` in the checkout.

    Raises:
        ConfigError: a bad profile, or a parameter that this notebook does not have.
        Busy: another process is writing this stage.
    """
    from kexa import runtime  # imports torch

    this = stages.find(stage)
    _refuse_unknown_parameters(this)
    parameters = json.loads(os.environ.get(PARAMETERS, "{}"))
    pipeline = open_pipeline(profile, out_dir, seed, parameters)
    chosen = runtime.setup(pipeline.config.runtime, seed)
    print("\n".join(chosen.reasons))
    if token := os.environ.get(TOKEN):
        lock.register(pipeline.out, this.name, token)
    else:
        _held.close()
        _held.enter_context(lock.hold(pipeline.out, this.name))
        clear(pipeline.directory(this))
    return NotebookRun(this, pipeline, chosen.device)


def require(run: NotebookRun, stage: str) -> Path:
    """The directory of another stage's artefacts, produced first when missing or stale.

    Raises:
        ConfigError: the stage is not among this one's needs in notebooks/stages.toml.
        StageFailed: producing it failed.
    """
    this, wanted = stages.find(run.stage), stages.find(stage)
    if wanted.name not in this.needs:
        raise ConfigError(
            f"{this.name} asks for {wanted.name}: add it to that stage's needs in "
            "notebooks/stages.toml"
        )
    if not os.environ.get(TOKEN) and run.pipeline.stale(wanted):
        _produce(run.pipeline, wanted)
    return run.pipeline.directory(wanted)


def _produce(pipeline: Pipeline, wanted: Stage) -> None:
    """Run the wanted stage and what it needs through ``kexa run``, behind a progress bar."""
    from tqdm import tqdm

    command = [sys.executable, "-m", "kexa", "run", "--profile", pipeline.profile]
    command += ["--only", wanted.name, "--out", str(pipeline.out), "-p", "seed", str(pipeline.seed)]
    said: list[str] = []
    with (
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
        tqdm(total=len(stages.with_needs([wanted])), desc=f"{wanted.name} first") as bar,
    ):
        for text in child.stdout:
            said.append(text)
            bar.update(text.startswith("["))
    if child.returncode:
        raise StageFailed(f"{wanted.name} is needed here and failed:\n{''.join(said)}")


def _history() -> list[str]:
    """The cells this kernel has executed so far, the running one included."""
    from IPython import get_ipython

    shell = get_ipython()
    return [] if shell is None else [c.strip() for c in shell.history_manager.input_hist_raw[1:]]


def _injected(cell: str) -> bool:
    return cell.startswith("# Parameters\n")  # papermill's mark


def _executed_source(stage: Stage) -> bool:
    from kexa.pairs import to_notebook

    cells = to_notebook(stage.source.read_text(encoding="utf-8")).cells
    source = [c.source.strip() for c in cells if c.cell_type == "code"]
    executed = [cell for cell in _history() if not _injected(cell)]
    return bool(executed) and executed == source[: len(executed)]


def _refuse_unknown_parameters(stage: Stage) -> None:
    known = stages.parameter_names(stage.source.read_text(encoding="utf-8"))
    for cell in filter(_injected, _history()):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                stages.refuse_unknown(node.id, known, stage.name)
