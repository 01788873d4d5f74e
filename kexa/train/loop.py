"""The training loop that every stage uses: a generator of one record per optimizer step.

    for step in fit(model, optimizers, batch_at, loss_fn, steps, schedule):
        run.log("train", step.step, **step.losses)

One step: micro-batches forward and backward, one global gradient norm, clipping, the guard, every
optimizer, the router's balance bias. Data are a pure function of the step (``batch_at``), so the
step number is the whole data position and a run resumed from a checkpoint equals the
uninterrupted one bit for bit. A resumed run first yields the records of the steps it does not
repeat, so whoever consumes the generator sees the same stream either way.

On several ranks (:mod:`kexa.dist`) every rank runs this loop over the same batches; the loss
function takes the rank's rows, and norm, expert counts and losses are those of all ranks.

The guard skips an update whose loss or gradient norm is not finite, or whose norm exceeds
``spike`` times the median of the last 64 norms; ten skips in a row stop the run. On SIGTERM the
step in progress is finished and saved, then the process ends by that signal.

chosen: clipping at 1.0, the guard's numbers, equal weight for every micro-batch. reported: the
balance bias moves by 1e-4 after each optimizer step.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kexa.dist import scale_to_norm, sum_over_ranks, total_norm
from kexa.train import checkpoint

GUARD_WINDOW = 64
GUARD_WARMUP = 16
MAX_SKIPS = 10


class TrainingDiverged(RuntimeError):
    """Too many updates in a row were skipped; the message holds the step, the loss and the norm."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    ``losses`` has the parts of the loss, ``total`` among them, as means over micro-batches;
    ``learning_rate`` is that of the first parameter group; ``grad_norm`` is before clipping;
    ``tokens`` counts those seen so far; ``expert_load`` is how many tokens each expert got in
    this step, one row per MoE layer (empty for a model without experts).
    """

    step: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens: int
    skipped: bool
    expert_load: list[list[int]]


def fit(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batch_at: Callable[[int], dict[str, Tensor]],
    loss_fn: Callable[[torch.nn.Module, dict[str, Tensor]], Any],
    steps: int,
    schedule: Callable[[int], float],
    *,
    accumulate: int = 1,
    clip: float = 1.0,
    spike: float = 10.0,
    balance_step: float = 1e-4,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 100,
    identity: str = "",
    description: str = "train",
) -> Iterator[Step]:
    """Train for ``steps`` optimizer steps; resume where ``checkpoint_dir`` holds a checkpoint.

    Args:
        batch_at: tensors ``[B, ...]`` for a step; ``input_ids`` is among them. Called once per
            step.
        loss_fn: a loss from ``(model, batch)``: a named tuple of scalar tensors with a field
            ``total``, as :class:`kexa.model.Loss`.
        schedule: factor on every group's peak learning rate, see :mod:`kexa.train.schedule`.
        accumulate: micro-batches per step; the batch is split along ``B`` into that many equal
            parts.
        clip, spike: largest gradient norm after clipping; ratio to the median norm at which an
            update is skipped.
        balance_step: how far the router's balance bias moves per step; 0 turns it off.
        checkpoint_dir, checkpoint_every, identity: where, how often, and whose; see
            :mod:`kexa.train.checkpoint`.
        description: label of the progress bar.

    Yields:
        One :class:`Step` per optimizer step, from step 0, replayed ones included.

    Raises:
        TrainingDiverged: ten skipped updates in a row.
        kexa.train.checkpoint.CheckpointError: the newest checkpoint is damaged or of another run.
        ValueError: a batch that ``accumulate`` does not divide.
    """
    trainer = _Trainer(
        model, list(optimizers), loss_fn, schedule, accumulate, clip, spike, balance_step
    )
    saved = checkpoint.list_checkpoints(checkpoint_dir) if checkpoint_dir else []
    if saved:
        trainer.load_state(checkpoint.load(saved[-1], identity))
    pending: list[dict[str, Any]] = []

    def save() -> None:
        checkpoint.append_history(checkpoint_dir, pending)
        pending.clear()
        checkpoint.save(checkpoint_dir, trainer.step, identity, trainer.state())

    replayed = checkpoint.read_history(checkpoint_dir, trainer.step) if checkpoint_dir else []
    with _Sigterm() as sigterm, tqdm(total=steps, desc=description, mininterval=1.0) as bar:
        for record in replayed:
            bar.update()
            yield Step(**record)
        while trainer.step < steps:
            record = trainer.advance(batch_at(trainer.step))
            if checkpoint_dir:
                pending.append(dataclasses.asdict(record))
                due = trainer.step % checkpoint_every == 0 or trainer.step == steps
                if due or sigterm.received:
                    save()
            if sigterm.received:
                return
            bar.update()
            bar.set_postfix(loss=f"{record.losses['total']:.3f}", refresh=False)
            yield record


@dataclass
class _Trainer:
    """The state of a run and one step of it."""

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss_fn: Callable[[torch.nn.Module, dict[str, Tensor]], Any]
    schedule: Callable[[int], float]
    accumulate: int
    clip: float
    spike: float
    balance_step: float
    step: int = 0
    tokens: int = 0
    skips: int = 0  # updates skipped in a row
    norms: list[float] = dataclasses.field(default_factory=list)  # the last GUARD_WINDOW

    def __post_init__(self):
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.parameters = [p for group in groups for p in group["params"]]
        for group in groups:
            group.setdefault("peak_lr", group["lr"])

    def advance(self, batch: dict[str, Tensor]) -> Step:
        factor = self.schedule(self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        self.model.train()
        losses = self._backward(batch)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(grads)
        grad_norm = float(norm)
        skipped = self._skip(losses["total"], grad_norm)
        if not skipped:
            scale_to_norm(grads, self.clip, norm)
            for optimizer in self.optimizers:
                optimizer.step()
        sum_over_ranks([layer.load_E for layer in self.model.moe_layers])
        load = self.model.expert_load().tolist()
        self.model.update_balance_bias(self.balance_step)
        self.tokens += batch["input_ids"].numel()
        rate = self.optimizers[0].param_groups[0]["lr"]
        record = Step(self.step, losses, rate, grad_norm, self.tokens, skipped, load)
        self.step += 1
        return record

    def _backward(self, batch: dict[str, Tensor]) -> dict[str, float]:
        size = len(batch["input_ids"])
        if size % self.accumulate:
            raise ValueError(
                f"a batch of {size} sequences does not split into {self.accumulate} equal parts"
            )
        device = self.parameters[0].device
        sums: dict[str, float] = {}
        for i in range(self.accumulate):
            part = slice(i * size // self.accumulate, (i + 1) * size // self.accumulate)
            loss = self.loss_fn(self.model, {k: v[part].to(device) for k, v in batch.items()})
            (loss.total / self.accumulate).backward()
            for name, value in loss._asdict().items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / self.accumulate
        return sums

    def _skip(self, loss: float, grad_norm: float) -> bool:
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        usual = statistics.median(self.norms) if len(self.norms) >= GUARD_WARMUP else math.inf
        skip = not finite or grad_norm > self.spike * usual
        if finite:
            self.norms = [*self.norms, grad_norm][-GUARD_WINDOW:]
        self.skips = self.skips + 1 if skip else 0
        if self.skips >= MAX_SKIPS:
            raise TrainingDiverged(
                f"{MAX_SKIPS} updates in a row were skipped, the last at step {self.step} "
                f"with loss {loss:.4g} and gradient norm {grad_norm:.4g} (usual: {usual:.4g}); "
                "lower the learning rate or inspect the data there"
            )
        return skip

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skips": self.skips,
            "norms": self.norms,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": checkpoint.rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.skips = state["step"], state["tokens"], state["skips"]
        self.norms = state["norms"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        checkpoint.set_rng_state(state["rng"])


class _Sigterm:
    """Holds SIGTERM back while inside and passes it on at the end; main thread only."""

    def __enter__(self):
        self.received = False
        self.installed = threading.current_thread() is threading.main_thread()
        if self.installed:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self.installed:
            signal.signal(signal.SIGTERM, self.previous)
        if self.received:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, *_):
        self.received = True
