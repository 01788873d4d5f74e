"""The K-EXAONE architecture: hybrid attention, mixture of experts, multi-token prediction."""

from kexa.config import ModelConfig
from kexa.model.cache import Cache
from kexa.model.drafting import DraftRule, DraftStats
from kexa.model.generate import (
    Completion,
    StopReason,
    Token,
    generate,
    measure_break_even,
    sample,
    sample_with_stats,
    stream,
)
from kexa.model.recompute import set_recompute
from kexa.model.transformer import KexaForCausalLM, Loss, counted_targets

__all__ = [
    "Cache",
    "Completion",
    "DraftRule",
    "DraftStats",
    "KexaForCausalLM",
    "Loss",
    "ModelConfig",
    "StopReason",
    "Token",
    "counted_targets",
    "generate",
    "measure_break_even",
    "sample",
    "sample_with_stats",
    "set_recompute",
    "stream",
]
