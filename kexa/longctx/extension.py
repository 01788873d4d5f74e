"""Context extension: stages of longer sequences, each trained until needles are found.

reported: two stages, 8K to 32K to 256K. Both mix three components, re-weighted between the stages
(the share of long documents rises in the second): *rehearsal* of short pretraining-like data,
which protects what the model can do at short range; *synthetic reasoning*; and *long documents*,
end to end in one sequence, not truncated. After each stage short-context evaluation and NIAH; the
training is repeated until NIAH is near-perfect over the target range. RoPE is not rescaled: only
window layers have it, and they see no further than before. Global layers have no position
encoding, and it is they that must learn to reach.

One stage here, in rounds of ``steps`` optimizer steps with their own warm-up, stable phase and
decay:

    for round in 1 .. rounds:
        train ``steps`` steps on the stage's mixture at its sequence length
        probe needles at every length up to it; stop if the gate is green

A round continues the weights of the one before and starts its optimizer afresh, so every probe
sees an annealed model. Gate tasks differ from round to round: repeating until green must not pick
a lucky draw of one fixed set.

not reported, chosen: rows of each component, steps, learning rates, the gate's threshold. The
second stage learns slower than the first, which has retrieval to learn; at the same rate it undid
what was learned (smoke: red after three rounds in 2 of 2 seeds; at a fifth, green after one in 4
of 4).

chosen: synthetic reasoning is retrieval, documents of held-in text with facts in it that end by
asking for them; a row holds several of them, at lengths from ``shortest`` up to the whole row,
since a small model learns to look back at short range first. Only the answers are targets there.
The loss is the mean over components, weighted by rows, of each component's mean over its own
targets: a few hundred answers are not drowned by many thousand tokens of prose.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from kexa.config import ExtensionConfig, ExtensionStage
from kexa.data import Mixture, TokenizedDocuments, synthesis
from kexa.longctx.niah import Facts, Grid, Verdict, gate, insert
from kexa.model import KexaForCausalLM
from kexa.train import Step, build_optimizers, fit, wsd

COMPONENTS = ("rehearsal", "reasoning", "long")
CHUNK = 4096  # positions whose logits exist at once


class StageLoss(NamedTuple):
    """Scalars in nats per target: the minimised ``total`` and the loss of every component."""

    total: Tensor
    rehearsal: Tensor
    reasoning: Tensor
    long: Tensor


class StageBatches:
    """The batches of one stage as a pure function of the step.

    Args:
        streams: tokenised training documents by category, synthetic ones included.
        weights: the mixture of rehearsal, a weight per category.
        whole: categories that long documents come from.

    Raises:
        ValueError: a component without rows, or no document of a length that fits the row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        streams: Mapping[str, TokenizedDocuments],
        weights: Mapping[str, float],
        whole: tuple[str, ...],
        config: ExtensionConfig,
        stage: ExtensionStage,
        seed: int,
    ):
        if set(stage.rows) != set(COMPONENTS) or min(stage.rows.values()) < 1:
            raise ValueError(
                f"extension rows are {stage.rows}; give each of {', '.join(COMPONENTS)} at least 1"
            )
        self._length, self._stage, self._seed = stage.sequence_length, stage, seed
        self._rehearsal = Mixture(streams, weights, self._length, stage.rows["rehearsal"], seed)
        self._long = [
            streams[category].document(i)
            for category in whole
            for i in np.flatnonzero(fits(streams[category], self._length))
        ]
        if not self._long:
            raise ValueError(
                f"no document has {self._length // 2} to {self._length} tokens; read more text or "
                "change extension.stages"
            )
        self._facts, self._text = Facts(tokenizer), streams[config.haystack].tokens
        self._config = config

    def batch(self, step: int) -> dict[str, Tensor]:
        """``input_ids``, ``document_ids`` (int64) and ``targets`` (bool), each [B, T], and
        ``component`` int64 [B], an index into :data:`COMPONENTS`."""
        rng = np.random.default_rng([self._seed, step])
        ids, documents = self._rehearsal.batch(step)
        rows = [(ids, documents, torch.ones_like(ids, dtype=torch.bool))]
        rows += [self._reasoning_row(rng) for _ in range(self._stage.rows["reasoning"])]
        rows += [self._long_row(rng) for _ in range(self._stage.rows["long"])]
        ids, documents, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
        counts = torch.tensor([self._stage.rows[name] for name in COMPONENTS])
        component = torch.arange(len(COMPONENTS)).repeat_interleave(counts)
        return {
            "input_ids": ids,
            "document_ids": documents,
            "targets": targets,
            "component": component,
        }

    def _reasoning_row(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A row cut into 1, 2, 4, ... equal retrieval documents, none under ``shortest``."""
        halvings = int(np.log2(self._length // self._config.shortest))
        parts = 2 ** int(rng.integers(halvings + 1))
        length, digits = self._length // parts, self._config.digits
        made = [
            retrieval_document(self._facts, self._text, length, self._stage.needles, digits, rng)
            for _ in range(parts)
        ]
        ids = torch.tensor([[i for document, _ in made for i in document]])
        targets = torch.tensor([[t for _, asked in made for t in asked]])
        documents = torch.arange(parts).repeat_interleave(length)
        return _padded(ids, documents[None], targets, self._length)

    def _long_row(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One document, whole; what is left of the row is padding."""
        ids = torch.from_numpy(self._long[rng.integers(len(self._long))].astype(np.int64))[None]
        return _padded(ids, torch.zeros_like(ids), torch.ones_like(ids).bool(), self._length)


def fits(documents: TokenizedDocuments, length: int) -> np.ndarray:
    """Which documents fill more than half of ``length`` tokens and are not longer: bool [docs]."""
    sizes = np.diff(documents.offsets)
    return (sizes > length // 2) & (sizes <= length)


def retrieval_document(
    facts: Facts,
    text: np.ndarray,
    length: int,
    needles: int,
    digits: int,
    rng: np.random.Generator,
) -> tuple[list[int], list[bool]]:
    """``length`` tokens of text with 1 to ``needles`` facts anywhere in it, each asked for once at
    the end; and which tokens are answers.

    Raises:
        ValueError: not even one fact and its question fit.
    """
    count = int(rng.integers(1, needles + 1))
    keys = rng.choice(synthesis.KEYS, size=count, replace=False)
    stated = [facts(key, "".join(map(str, rng.integers(0, 10, size=digits)))) for key in keys]
    while 1 + 2 * sum(len(fact.line) for fact in stated) > length:
        stated.pop()
    if not stated:
        raise ValueError(f"extension.shortest={length} tokens cannot hold a fact and its question")
    free = length - 1 - 2 * sum(len(fact.line) for fact in stated)
    start = rng.integers(len(text) - free + 1)
    places = rng.integers(0, free + 1, size=len(stated)).tolist()
    hay = text[start : start + free].tolist()
    ids = [facts.bos, *insert(hay, [fact.line for fact in stated], places)]
    asked = [False] * len(ids)
    for i in rng.permutation(len(stated)):
        ids += stated[i].line
        asked += [False] * len(stated[i].cue) + [True] * len(stated[i].value)
        asked += [False] * len(stated[i].end)
    return ids, asked


def _padded(ids: Tensor, documents: Tensor, targets: Tensor, length: int):
    room = (0, length - ids.shape[1])
    return F.pad(ids, room), F.pad(documents, room, value=-1), F.pad(targets, room)


def stage_loss(
    model: KexaForCausalLM, batch: Mapping[str, Tensor], config: ExtensionConfig
) -> StageLoss:
    """Each component's mean loss over its own targets; ``total`` weighs them by their rows."""
    total, parts = 0.0, {}
    for i, name in enumerate(COMPONENTS):
        rows = batch["component"] == i
        loss = model.loss(
            batch["input_ids"][rows],
            batch["document_ids"][rows],
            batch["targets"][rows],
            mtp_weight=config.mtp_weight,
            balance_weight=config.balance_weight,
        )
        total = total + loss.total * (rows.sum() / len(rows))
        parts[name] = loss.next_token
    return StageLoss(total, **parts)


@dataclass(frozen=True)
class Round:
    """One round of a stage: its optimizer steps, what the probe found, and the gate's decision."""

    stage: str
    number: int  # from 1
    steps: list[Step]
    grid: Grid
    verdict: Verdict


def train_stage(
    model: KexaForCausalLM,
    batches: StageBatches,
    config: ExtensionConfig,
    name: str,
    probe: Callable[[int], Grid],
    directory: Path,
    identity: str,
) -> Iterator[Round]:
    """Train one stage in rounds until the gate is green or the rounds are used up.

    Args:
        name: a key of ``config.stages``.
        probe: the NIAH grid of the model as it is, with tasks drawn for this round number.
        directory, identity: for checkpoints, see :func:`kexa.train.fit`; a killed stage resumes.

    Yields:
        Each :class:`Round` as it ends; whether the last is green is for the caller to check.
    """
    stage = config.stages[name]
    schedule = functools.partial(
        wsd, steps=stage.steps, warmup_share=config.warmup_share, decay_share=config.decay_share
    )
    for number in range(1, stage.rounds + 1):
        done = (number - 1) * stage.steps
        steps = fit(
            model,
            build_optimizers(model, stage),
            lambda step, done=done: batches.batch(done + step),
            functools.partial(stage_loss, config=config),
            stage.steps,
            schedule,
            balance_step=config.balance_step,
            checkpoint_dir=Path(directory) / f"{name}-{number}",
            checkpoint_every=config.checkpoint_every,
            identity=identity,
            description=f"{name} stage, {stage.sequence_length} tokens, round {number}",
        )
        records = list(steps)
        grid = probe(number)
        verdict = gate(grid, config.threshold, stage.sequence_length)
        yield Round(name, number, records, grid, verdict)
        if verdict.green:
            return


@torch.no_grad()
def loss_by_position(
    model: KexaForCausalLM, documents: TokenizedDocuments, length: int, rows: int, bins: int
) -> np.ndarray:
    """Mean nats per token at ``bins`` equal ranges of position, over the first ``length`` tokens
    of up to ``rows`` documents that have them.

    Raises:
        ValueError: no document is that long.
    """
    enough = np.flatnonzero(np.diff(documents.offsets) >= length)[:rows]
    if not len(enough):
        raise ValueError(f"no document has {length} tokens; read more text or shorten the stage")
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    losses = torch.zeros(length)
    for i in enough:
        ids_T = torch.from_numpy(documents.document(i)[:length].astype(np.int64)).to(device)
        hidden_TD = model.hidden_states(ids_T[None])[0, :-1]
        parts = zip(hidden_TD.split(CHUNK), ids_T[1:].split(CHUNK), strict=True)
        losses[1:] += torch.cat(
            [F.cross_entropy(model.lm_head(x).float(), y, reduction="none") for x, y in parts]
        ).cpu()
    model.train(was_training)
    losses[0] = losses[1]  # the first token has no prediction
    return (losses / len(enough)).view(bins, -1).mean(1).numpy()
