"""What a notebook calls: ``begin`` opens the run record, ``require`` gives the artefacts of another stage.

    run = notebook.begin("04_pretraining", profile, seed, out_dir)
    tokenizer_dir = notebook.require(run, "01_tokenizer") / "tokenizer"
    ...
    run.finish()

``require`` runs the stage it names when its artefacts are missing or were made by other code, another config
or another seed (see ``kexa.pipeline``), so every notebook runs alone, in any order, on a fresh clone.
"""

from __future__ import annotations

from pathlib import Path

from kexa import config as configs
from kexa import pipeline
from kexa.record import Run


def begin(stage: str, profile: str, seed: int = 0, out_dir: str = "") -> Run:
    """Load the profile, apply the runtime policy and open the record of ``stage``.

    Args:
        stage: the notebook's name, ``"04_pretraining"``.
        profile: a file in ``configs/`` or the path of a ``.toml``.
        seed: the seed of every random choice.
        out_dir: where runs are kept; empty means ``runs/<profile>`` in the checkout.
    """
    from kexa import runtime  # imports torch

    config = configs.load(profile)
    chosen = runtime.setup(config.runtime, seed)
    for reason in chosen.reasons:
        print(reason)
    return pipeline.open_run(stage, config, seed, out_dir)


def require(run: Run, stage: str) -> Path:
    """The directory of another stage's artefacts, produced first when missing or stale."""
    return pipeline.ensure(stage, run)
