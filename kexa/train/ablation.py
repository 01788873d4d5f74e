"""Ablations: one change at a time from a base model, on the same data from the same initial values.

A variant is the base with other model keys or other loss weights and nothing else. Runs are paired:
for one seed every variant draws the same initial values for the parameters it shares with the base
and sees the same batches, so the difference of two losses on the same held-out rows is the effect
of the change plus what chaos adds to any two runs; several seeds show how much that is.

Losses are next-token losses: a variant without MTP is not rewarded for having one term less.

chosen: all of it. The report gives its architecture without the ablations behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kexa.config import AblationConfig, ModelConfig, PretrainConfig
from kexa.data import Mixture, TokenizedDocuments
from kexa.model import KexaForCausalLM
from kexa.train.checkpoint import identity
from kexa.train.evaluation import HeldOut, pooled, validate
from kexa.train.fp8 import set_numerics
from kexa.train.loop import Step
from kexa.train.pretrain import stage_weights
from kexa.train.short_run import short_run


@dataclass(frozen=True)
class Variant:
    """One change: the model keys and training keys that differ from the base."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, float] = field(default_factory=dict)


def variants(base: ModelConfig) -> list[Variant]:
    """The base, then one change each."""
    return [
        Variant("base"),
        Variant(f"window {base.sliding_window // 4}", {"sliding_window": base.sliding_window // 4}),
        Variant("RoPE everywhere", {"rope_layers": "all"}),
        Variant("no QK-norm", {"use_qk_norm": False}),
        Variant("no MTP", {"num_nextn_predict_layers": 0}),
        Variant("no balancing", training={"balance_weight": 0.0, "balance_step": 0.0}),
    ]


@dataclass(frozen=True)
class Outcome:
    """One finished run: held-out nats per token and the mean, over the last tenth of the steps, of
    the busiest expert's load in units of its fair share."""

    loss: float
    busiest: float


def run_variant(
    variant: Variant,
    base: ModelConfig,
    config: AblationConfig,
    pretrain: PretrainConfig,
    streams: Mapping[str, TokenizedDocuments],
    sets: Mapping[str, HeldOut],
    seed: int,
    device: torch.device,
    checkpoint_dir: Path,
) -> Outcome:
    """Train one variant with one seed and measure it.

    Args:
        base: the base model. config, pretrain: how long and on how much; how (schedule, weights).
        streams, sets: training tokens and held-out rows by category.
        seed: of initial values and of the order of the data.
        checkpoint_dir: a finished run found there is not repeated.
    """
    training = dataclasses.replace(
        pretrain, learning_rate=config.learning_rate, **dict(variant.training)
    )
    torch.manual_seed(seed)
    model = KexaForCausalLM(dataclasses.replace(base, **dict(variant.model))).to(device)
    set_numerics(model, config.numerics)
    weights = stage_weights(pretrain, "foundation", streams)
    mixture = Mixture(streams, weights, config.sequence_length, config.batch_size, seed)

    def batch_at(step: int) -> dict[str, torch.Tensor]:
        input_ids, document_ids = mixture.batch(step)
        return {"input_ids": input_ids, "document_ids": document_ids}

    records = short_run(
        model,
        batch_at,
        config.steps,
        training,
        training.mtp_weight,
        checkpoint_dir,
        identity(model=model.config, training=training, ablation=config, seed=seed),
        f"{variant.name}, seed {seed}",
        z_loss=training.z_loss,
    )
    return Outcome(pooled(validate(model, sets), sets), busiest(records[-len(records) // 10 :]))


def busiest(records: list[Step]) -> float:
    """Load of the busiest expert over its fair share, mean over steps and layers."""
    load = torch.tensor([r.expert_load for r in records], dtype=torch.float64)
    return float((load.amax(-1) / load.mean(-1)).mean())
