"""Training: Muon and AdamW, the WSD schedule, FP8 numerics, the loop and its checkpoints."""

from kexa.train.fp8 import set_numerics
from kexa.train.loop import (
    Interrupted,
    Step,
    Stopwatch,
    TrainingDiverged,
    exit_on_sigterm,
    fit,
)
from kexa.train.newton_schulz import orthogonalize, orthogonalize_flops
from kexa.train.optim import Muon, build_adamw, build_optimizers, grouping
from kexa.train.schedule import branched, wsd

__all__ = [
    "Interrupted",
    "Muon",
    "Step",
    "Stopwatch",
    "TrainingDiverged",
    "branched",
    "build_adamw",
    "build_optimizers",
    "exit_on_sigterm",
    "fit",
    "grouping",
    "orthogonalize",
    "orthogonalize_flops",
    "set_numerics",
    "wsd",
]
