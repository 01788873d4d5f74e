"""Long context: needle probes with their gate, and the staged extension that the gate ends."""

from kexa.longctx import niah
from kexa.longctx.extension import StageBatches, train_stage

__all__ = ["StageBatches", "niah", "train_stage"]
