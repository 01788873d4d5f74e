"""A run small enough for ranks that share a core, the same on every mesh."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from kexa import dist
from kexa.config import load
from kexa.data.choices import Question
from kexa.model import set_recompute
from kexa.train import build_optimizers, fit, pretrain, set_numerics, wsd
from kexa.train.evaluation import Evaluation, HeldOut, evaluate
from kexa.train.pretrain import (
    Pretraining,
    new_sharded_model,
    start_curriculum,
    training_loss,
)
from tests.train.conftest import CONFIG, OPTIMIZATION, tiny_model

STEPS = 10
_ROWS = torch.Generator().manual_seed(99)
EVALUATION = Evaluation(
    {
        name: HeldOut(
            torch.randint(2, 64, (3, 12), generator=_ROWS), torch.zeros(3, 12).long(), 2.0
        )
        for name in ("en", "code")
    },
    {
        "recall": [
            Question(row[:6], [row[6:8], row[8:9], row[9:]], [2, 1, 3], i % 3)
            for i, row in enumerate(torch.randint(2, 64, (40, 12), generator=_ROWS).tolist())
        ]
    },
)
LOSS = dataclasses.replace(load("smoke").pretrain, mtp_weight=0.05, balance_weight=1e-2)


def batch_at(step: int) -> dict[str, torch.Tensor]:
    """8 rows of documents of 1 to about 10 tokens: every row has another number of targets."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.rand(8, 12, generator=generator) < torch.linspace(0, 0.6, 8)[:, None]
    return {
        "input_ids": torch.randint(2, 64, (8, 12), generator=generator),
        "document_ids": starts.long().cumsum(1),
    }


def run(
    fsdp: int = 1,
    ep: int = 1,
    take: int = STEPS,
    recompute: bool = False,
    numerics: str = "fp32",
    bias: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    directory: Path | None = None,
    **options,
) -> tuple[list, dict[str, torch.Tensor]]:
    """The records of up to ``take`` steps on a mesh, then the model's state in whole tensors."""
    torch.set_num_threads(1)
    layout = dist.join(fsdp, ep, torch.device("cpu"))
    model = dist.shard(tiny_model(), layout)
    for layer in model.moe_layers:
        layer.e_score_correction_bias.copy_(torch.tensor(bias))
    set_numerics(model, numerics)
    set_recompute(model, recompute)
    optimizers = build_optimizers(model, OPTIMIZATION)
    schedule = functools.partial(wsd, steps=STEPS, warmup_share=0.2, decay_share=0.2)
    loss = functools.partial(training_loss, config=LOSS, layout=layout)
    steps = fit(
        model, optimizers, batch_at, loss, STEPS, schedule,
        checkpoint_dir=directory, checkpoint_every=3, **options,
    )  # fmt: skip
    records = list(itertools.islice(steps, take))
    steps.close()
    state = whole_state(model)
    dist.leave()
    return records, state


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state as tensors of this process."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).clone()
        for name, t in model.state_dict().items()
    }


def curriculum(
    run: Pretraining, fsdp: int, ep: int, take: int
) -> tuple[list, dict[str, torch.Tensor], int]:
    """As :func:`run`, of a pretraining run; and how many parameters were given initial values."""
    torch.set_num_threads(1)
    layout = dist.join(fsdp, ep, torch.device("cpu"))
    with mock.patch.object(pretrain, "place", wraps=pretrain.place) as place:
        model, _, steps = start_curriculum(run, torch.device("cpu"), layout)
    records = list(itertools.islice(steps, take))
    steps.close()
    state = whole_state(model)
    dist.leave()
    return records, state, place.call_count


def part(fsdp: int, ep: int, take: int, directory: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """:func:`run` with checkpoints after every 3 steps."""
    return run(fsdp, ep, take, directory=directory)


def evaluated(fsdp: int, ep: int) -> tuple[list, dict[str, torch.Tensor]]:
    """:func:`run` with a measurement in every step and evaluations after the 4th and the last."""
    return run(
        fsdp, ep, metrics_every=1,
        evaluate=functools.partial(evaluate, evaluation=EVALUATION), evaluate_after={4, STEPS},
    )  # fmt: skip


def starved(fsdp: int, ep: int, numerics: str) -> tuple[list, dict[str, torch.Tensor]]:
    """:func:`run` for two steps in which only the first two of four experts are chosen."""
    records, state = run(fsdp, ep, 2, numerics=numerics, bias=(1.0, 1.0, -1.0, -1.0))
    assert all(load[2:] == [0, 0] for load in records[0].expert_load)
    return records, state


def initial(fsdp: int, ep: int) -> dict[str, torch.Tensor]:
    """The state of a model that was never whole on one rank."""
    layout = dist.join(fsdp, ep, torch.device("cpu"))
    state = whole_state(new_sharded_model(CONFIG, 3, layout, torch.device("cpu")))
    dist.leave()
    return state
