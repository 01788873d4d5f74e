"""The K-EXAONE architecture: hybrid attention, mixture of experts, multi-token prediction."""

from kexa.config import ModelConfig
from kexa.model.cache import Cache
from kexa.model.generate import Completion, DraftStats, generate, generate_with_stats, sample
from kexa.model.transformer import KexaForCausalLM, Loss

__all__ = [
    "Cache",
    "Completion",
    "DraftStats",
    "KexaForCausalLM",
    "Loss",
    "ModelConfig",
    "generate",
    "generate_with_stats",
    "sample",
]
