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
``spike`` times the median of the last 64 norms; ten skips in a row stop the run.

SIGTERM, as a scheduler sends it before it takes a machine away, is held back until the step in
progress is finished and on disk, on all ranks; then it does what it does to the process otherwise:
end a notebook's kernel, or let a training command exit with 0 (:func:`exit_on_sigterm`). A handler
that returns meets :class:`Interrupted`: nobody takes half a run for a whole one. A run that ends
with an error all the same, as on a full disk, raises it and leaves the signal: an exit with 0 would
say that the steps are saved. Without a checkpoint directory there is nothing to save and nothing is
held back.

chosen: clipping at 1.0, the guard's numbers, equal weight for every micro-batch. reported: the
balance bias moves by 1e-4 after each optimizer step.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from kexa.dist import scale_to_norm, sum_over_ranks, total_norm
from kexa.kernels.costs import H100_FLOPS
from kexa.model.accounting import account, training_flops
from kexa.train import checkpoint
from kexa.train.metrics import Monitor
from kexa.train.optim import move_states

GUARD_WINDOW = 64
GUARD_WARMUP = 16
MAX_SKIPS = 10
HOST = torch.device("cpu")

Evaluate = Callable[[torch.nn.Module], dict[str, float]]


class TrainingDiverged(RuntimeError):
    """Too many updates in a row were skipped; the message holds the step, the loss and the norm."""


class Interrupted(RuntimeError):
    """SIGTERM ended the run early; the message says which step was saved last."""


def exit_on_sigterm() -> None:
    """For a command: exit with 0 on SIGTERM; inside :func:`fit`, once the step is saved."""

    def leave(*_) -> None:
        print("SIGTERM: run the same command again to go on", file=sys.stderr)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)


class Stopwatch:
    """Seconds spent inside it, over all times it was entered."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._entered = time.perf_counter()

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._entered


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    ``losses`` has the parts of the loss, ``total`` among them, as means over micro-batches;
    ``learning_rate`` is that of the first parameter group; ``grad_norm`` is before clipping;
    ``tokens`` counts those seen so far; ``expert_load`` is how many tokens each expert got in
    this step, one row per MoE layer (empty for a model without experts); ``figures`` is what
    :mod:`kexa.train.metrics` measured and ``evaluation`` what ``fit``'s function of that name found
    after the step, both empty for most steps.
    """

    step: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens: int
    skipped: bool
    expert_load: list[list[float]]
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)


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
    offload_optimizer: bool = False,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 100,
    metrics_every: int = 0,
    keep: int = 2,
    milestones: Collection[int] = (),
    evaluate: Evaluate | None = None,
    evaluate_after: Collection[int] = (),
    identity: str = "",
    stopwatch: Stopwatch | None = None,
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
        offload_optimizer: between its steps an optimizer's states are in host memory.
        checkpoint_dir, checkpoint_every, identity: where, how often, and whose; see
            :mod:`kexa.train.checkpoint`.
        metrics_every: steps between measurements of the model's inside, see
            :mod:`kexa.train.metrics`; 0 measures nothing.
        keep, milestones: how many of the last checkpoints stay, and after which numbers of steps
            one is saved and stays for good.
        evaluate, evaluate_after: figures of the model, and after which numbers of steps they are
            taken into the record. It is called in evaluation mode and without gradients, on every
            rank; training has the same bits with it. A resumed run replays its figures.
        stopwatch: runs during forward, backward and the optimizers' steps; the rest of the wall
            clock is what the loop costs.
        description: label of the progress bar.

    Yields:
        One :class:`Step` per optimizer step, from step 0, replayed ones included.

    Raises:
        TrainingDiverged: ten skipped updates in a row.
        Interrupted: SIGTERM came and its handler returned; the finished steps are saved.
        kexa.train.checkpoint.CheckpointError: the newest whole checkpoint is of another run, or
            there are checkpoints and none is whole. A damaged one with a whole one before it is
            set aside with a warning.
        kexa.record.CannotWrite: the disk is full; the last checkpoint is intact. Told at the next
            checkpoint or at the end, since it is written while training goes on.
        ValueError: a batch that ``accumulate`` does not divide.
    """
    trainer = _Trainer(
        model,
        list(optimizers),
        loss_fn,
        schedule,
        accumulate,
        clip,
        spike,
        balance_step,
        offload_optimizer,
        Monitor(model, metrics_every),
        stopwatch or Stopwatch(),
    )
    replayed = trainer.resume(checkpoint_dir, identity) if checkpoint_dir else []
    pending: list[dict[str, Any]] = []

    def save() -> None:
        checkpoint.append_history(checkpoint_dir, pending)
        pending.clear()
        checkpoints.save(trainer.step, trainer.state())

    look = {"desc": description, "initial": trainer.step, "mininterval": 1.0}
    if checkpoint.rank() > 0:
        look["disable"] = True
    sigterm = _Sigterm(checkpoint_dir is not None)
    with (
        trainer.monitor,
        sigterm,
        checkpoint.Background(checkpoint_dir, identity, keep, milestones) as checkpoints,
        tqdm(total=steps, **look) as bar,
    ):
        for record in replayed:
            yield Step(**record)
        pace = _Pace(trainer)
        while trainer.step < steps:
            record = trainer.advance(batch_at(trainer.step))
            if evaluate and trainer.step in evaluate_after:
                record = dataclasses.replace(record, evaluation=trainer.evaluated(evaluate))
            interrupted = _on_any_rank(sigterm.received, trainer.device)
            if checkpoint_dir:
                pending.append(dataclasses.asdict(record))
                due = trainer.step % checkpoint_every == 0 or trainer.step == steps
                if due or trainer.step in milestones or interrupted:
                    save()
                if interrupted or trainer.step == steps:
                    checkpoints.wait()
            bar.set_postfix(pace.shown(record), refresh=False)
            bar.update()
            yield record
            if interrupted:
                sigterm.interrupt(trainer.step, steps)
        if _on_any_rank(sigterm.received, trainer.device):
            sigterm.interrupt(trainer.step, steps)


def overhead(steps: Iterator[Step], stopwatch: Stopwatch) -> Iterator[float]:
    """Drive a run and yield, per step, the share of its wall clock that is not computing.

    Args:
        steps, stopwatch: of one call of :func:`fit`. All that it does outside forward, backward
            and the optimizers counts: batches, the gradient norm and clipping, the guard, records
            and checkpoints. What the caller does between two steps does not.
    """
    while True:
        begun, computed = time.perf_counter(), stopwatch.seconds
        if next(steps, None) is None:
            return
        yield 1 - (stopwatch.seconds - computed) / (time.perf_counter() - begun)


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
    offload_optimizer: bool
    monitor: Monitor
    stopwatch: Stopwatch
    step: int = 0
    tokens: int = 0
    skips: int = 0  # updates skipped in a row
    norms: list[float] = dataclasses.field(default_factory=list)  # the last GUARD_WINDOW

    def __post_init__(self):
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.device = self.parameters[0].device
        for group in groups:
            group.setdefault("peak_lr", group["lr"])

    def advance(self, batch: dict[str, Tensor]) -> Step:
        factor = self.schedule(self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        self.model.train()
        self.monitor.begin(self.step)
        losses = self._backward(batch)
        self.monitor.gradients()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(grads)
        grad_norm = float(norm)
        skipped = self._skip(losses["total"], grad_norm)
        if not skipped:
            scale_to_norm(grads, self.clip, norm)
            with self.stopwatch:
                for optimizer in self.optimizers:
                    self._step(optimizer)
        sum_over_ranks([layer.load_E for layer in self.model.moe_layers])
        load = self.model.expert_load().tolist()
        self.model.update_balance_bias(self.balance_step)
        self.tokens += batch["input_ids"].numel()
        rate = self.optimizers[0].param_groups[0]["lr"]
        figures = self.monitor.end()
        record = Step(self.step, losses, rate, grad_norm, self.tokens, skipped, load, figures)
        self.step += 1
        return record

    @torch.no_grad()
    def evaluated(self, evaluate: Evaluate) -> dict[str, float]:
        """``evaluate(model)``, with mode, random numbers and shards put back as they were."""
        states = checkpoint.rng_states()
        self.model.eval()
        figures = evaluate(self.model)
        self.model.train()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what is gathered for a forward pass stays so without a backward
        checkpoint.set_rng_states(states)
        return figures

    def _backward(self, batch: dict[str, Tensor]) -> dict[str, float]:
        size = len(batch["input_ids"])
        if size % self.accumulate:
            raise ValueError(
                f"a batch of {size} sequences does not split into {self.accumulate} equal parts"
            )
        sums: dict[str, float] = {}
        for i in range(self.accumulate):
            part = slice(i * size // self.accumulate, (i + 1) * size // self.accumulate)
            rows = {k: v[part].to(self.device) for k, v in batch.items()}
            with self.stopwatch:
                loss = self.loss_fn(self.model, rows)
                (loss.total / self.accumulate).backward()
                for name, value in loss._asdict().items():  # waits for the device
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / self.accumulate
        return sums

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.offload_optimizer:
            optimizer.step()
            return
        move_states(optimizer, self.device)
        optimizer.step()
        move_states(optimizer, HOST)

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

    def resume(self, directory: Path, identity: str) -> list[dict[str, Any]]:
        """Go on from the newest checkpoint, if there is one; the records of the steps before it."""
        saved = checkpoint.resume(directory, identity, self.model.state_dict())
        if saved is not None:
            self.load_state(saved)
        return checkpoint.read_history(directory, self.step)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skips": self.skips,
            "norms": self.norms,
            "model": self.model.state_dict(),
            "optimizers": [_named(o.state_dict(), self._names(o)) for o in self.optimizers],
            "rng": checkpoint.rng_states(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.skips = state["step"], state["tokens"], state["skips"]
        self.norms = state["norms"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_numbered(saved, self._names(optimizer)))
            if self.offload_optimizer:
                move_states(optimizer, HOST)
        checkpoint.set_rng_states(state["rng"])

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The model's names of an optimizer's parameters, in the order that numbers them."""
        names = {p: name for name, p in self.model.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state dict with parameters by name, as a checkpoint holds it."""
    groups = [g | {"params": [names[i] for i in g["params"]]} for g in state["param_groups"]]
    return {"state": {names[i]: s for i, s in state["state"].items()}, "param_groups": groups}


def _numbered(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of :func:`_named`."""
    number = {name: i for i, name in enumerate(names)}
    groups = [g | {"params": [number[n] for n in g["params"]]} for g in state["param_groups"]]
    return {"state": {number[n]: s for n, s in state["state"].items()}, "param_groups": groups}


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank, so that all stop after the same step."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


class _Pace:
    """What the progress bar says beside the time left: loss, tokens/s, MFU, updates skipped.

    MFU is training FLOPs as the report counts them over the dense bf16 peak of all ranks' chips; it
    is shown where that peak is known, on an H100 or H200.
    """

    def __init__(self, trainer: _Trainer):
        self.begun, self.tokens, self.skipped = time.perf_counter(), trainer.tokens, 0
        self.flops = training_flops(account(trainer.model.config).active, tokens=1)
        cuda = trainer.device.type == "cuda"
        chip = torch.cuda.get_device_name(trainer.device) if cuda else ""
        known = "H100" in chip or "H200" in chip
        self.peak = checkpoint.ranks() * H100_FLOPS if known else None

    def shown(self, record: Step) -> dict[str, str]:
        self.skipped += record.skipped
        rate = (record.tokens - self.tokens) / (time.perf_counter() - self.begun)
        parts = {"loss": f"{record.losses['total']:.3f}", "tokens/s": f"{rate:,.0f}"}
        if self.peak:
            parts["MFU"] = f"{self.flops * rate / self.peak:.1%}"
        if self.skipped:
            parts["skipped"] = str(self.skipped)
        return parts


class _Sigterm:
    """Holds SIGTERM back while inside, passes it on if no error ends the run; main thread only."""

    def __init__(self, held: bool):
        self.received = False
        self.installed = held and threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self.installed:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        if self.installed:
            signal.signal(signal.SIGTERM, self.previous)
        if self.received and kind in (None, GeneratorExit, Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupt(self, step: int, steps: int) -> None:
        self.received = True  # perhaps on another rank only
        raise Interrupted(f"SIGTERM: saved after step {step} of {steps}; run again to go on")

    def _note(self, *_):
        self.received = True
