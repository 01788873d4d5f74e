"""One small model trained from start to end: what ablations and comparisons do many times.

Warm-up, stable, decay over the whole run, one checkpoint at its end: a finished run that is found
there is not repeated, one that was cut off starts again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from kexa.model import KexaForCausalLM
from kexa.train.loop import Step, fit
from kexa.train.optim import build_optimizers
from kexa.train.schedule import wsd


def short_run(
    model: KexaForCausalLM,
    batch_at: Callable[[int], dict[str, Tensor]],
    steps: int,
    training: Any,
    mtp_weight: float,
    checkpoint_dir: Path | None,
    identity: str,
    description: str,
    z_loss: float = 0.0,
) -> list[Step]:
    """Train ``model`` in place; returns the record of every step.

    Args:
        batch_at: ``input_ids`` and ``document_ids``, int64 [B, T], of a step.
        training: has ``learning_rate``, ``weight_decay``, ``warmup_share``, ``decay_share``,
            ``balance_weight`` and ``balance_step``.
        identity: of the run, from :func:`kexa.train.checkpoint.identity`.
    """

    def loss_fn(model: KexaForCausalLM, batch: dict[str, Tensor]):
        return model.loss(
            batch["input_ids"],
            batch["document_ids"],
            mtp_weight=mtp_weight,
            balance_weight=training.balance_weight,
            z_loss=z_loss,
        )

    schedule = functools.partial(
        wsd,
        steps=steps,
        warmup_share=training.warmup_share,
        decay_share=training.decay_share,
    )
    return list(
        fit(
            model,
            build_optimizers(model, training),
            batch_at,
            loss_fn,
            steps,
            schedule,
            balance_step=training.balance_step,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=steps,
            identity=identity,
            description=description,
        )
    )
