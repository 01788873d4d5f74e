"""Stages, their order and where their artefacts live."""

from __future__ import annotations

from pathlib import Path

from kexa.config import ROOT, Config, ConfigError
from kexa.record import Run


def runs_dir(config: Config, out_dir: str = "") -> Path:
    """Where the stages of a run live: ``out_dir``, or ``runs/<profile>`` in the checkout."""
    return Path(out_dir).resolve() if out_dir else ROOT / "runs" / config.profile


def open_run(stage: str, config: Config, seed: int, out_dir: str = "") -> Run:
    """Open the record of one stage."""
    return Run(stage, config, seed, runs_dir(config, out_dir) / stage)


def ensure(stage: str, run: Run) -> Path:
    """The directory of ``stage`` beside ``run``."""
    directory = run.dir.parent / stage
    if not (directory / "results.json").is_file():
        raise ConfigError(f"{stage} has not run yet in {run.dir.parent.name}: run it first")
    return directory
