"""What a model under training is evaluated on: held-out text in bits per byte, and probes.

Held-out loss is compared with the unigram entropy of the same tokens,

    H = - sum over v of p_v log p_v        p_v = share of token v among the targets,

the loss of the best predictor that ignores context: a model has learned from context by as many
nats as it lies below H. Over text of several categories that includes which category this is: what
lies below the mean of the categories' own entropies does not come from that.

Losses in nats per token depend on the tokenizer, bits per byte do not:

    bits per byte = nats per token / ln 2 / (bytes per token of the category)

A probe is a set of multiple-choice questions (:mod:`kexa.data.choices`); its figure is the share of
them whose right option is the likeliest per byte. One over the number of options is chance.

chosen: H as baseline (it is computed on the held-out tokens themselves, so no fitted unigram model
can beat it), the probes.

Legend: B rows, T tokens, N targets.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from kexa.data import Document, Mixture, encode
from kexa.data.choices import Question
from kexa.model import KexaForCausalLM
from kexa.model.likelihood import choose
from kexa.record import write_atomic


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of one category."""

    input_ids: Tensor  # int64 [B, T]
    document_ids: Tensor  # int64 [B, T]
    bytes_per_token: float

    @property
    def targets(self) -> Tensor:
        """The tokens that count: each that follows another of its document. int64 [N]."""
        same = self.document_ids[:, 1:] == self.document_ids[:, :-1]
        return self.input_ids[:, 1:][same]


def held_out(
    tokenizer: Tokenizer,
    documents: Mapping[str, list[Document]],
    length: int,
    rows: int | None,
    seed: int,
) -> dict[str, HeldOut]:
    """``rows`` rows of ``length`` tokens of every category; None: as many as its text fills."""
    sets = {}
    for category, texts in documents.items():
        tokens = encode(tokenizer, texts)
        count = rows or max(1, len(tokens.tokens) // length)
        input_ids, document_ids = Mixture(
            {category: tokens}, {category: 1}, length, count, seed
        ).batch(0)
        size = sum(len(d.text.encode()) for d in texts)
        sets[category] = HeldOut(input_ids, document_ids, size / (len(tokens.tokens) - len(texts)))
    return sets


def unigram_entropy(targets: Tensor) -> float:
    """Entropy in nats of the token frequencies."""
    share = torch.bincount(targets).double() / len(targets)
    return float(-torch.special.xlogy(share, share).sum())


@torch.no_grad()
def validate(
    model: KexaForCausalLM, sets: Mapping[str, HeldOut], batch_tokens: int = 8192
) -> dict[str, float]:
    """Nats per target token in every category, in evaluation mode and the model's own numerics.

    Args:
        batch_tokens: about how many tokens are read in one pass.
    """
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    losses = {}
    for category, rows in sets.items():
        size = max(1, batch_tokens // rows.input_ids.shape[1])
        counts = (len(rows.targets), 1)  # a pass gives its share of the mean over all rows
        losses[category] = 0.0
        for batch in zip(rows.input_ids.split(size), rows.document_ids.split(size), strict=True):
            on_device = (part.to(device) for part in batch)
            share = model.loss(*on_device, mtp_weight=0.0, counts=counts)
            losses[category] += float(share.next_token)
    model.train(was_training)
    return losses


@torch.no_grad()
def target_losses(model: KexaForCausalLM, rows: HeldOut, batch_tokens: int = 2048) -> Tensor:
    """Nats of every target, float32 [N] on the CPU, in the order of ``rows.targets``.

    Args:
        batch_tokens: about how many tokens are read in one pass; all their logits exist at once.
    """
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    size = max(1, batch_tokens // rows.input_ids.shape[1])
    losses = []
    for batch in zip(rows.input_ids.split(size), rows.document_ids.split(size), strict=True):
        ids, documents = (part.to(device) for part in batch)
        counted = documents[:, 1:] == documents[:, :-1]
        hidden_ND = model.hidden_states(ids, documents)[:, :-1][counted]
        logits_NV = model.lm_head(hidden_ND).float()
        losses.append(F.cross_entropy(logits_NV, ids[:, 1:][counted], reduction="none").cpu())
    model.train(was_training)
    return torch.cat(losses)


def pooled(losses: Mapping[str, float], sets: Mapping[str, HeldOut]) -> float:
    """The mean over all target tokens of per-category means."""
    counts = {category: len(sets[category].targets) for category in losses}
    return sum(losses[c] * n for c, n in counts.items()) / sum(counts.values())


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Tokenizer-independent form of a loss."""
    return nats_per_token / math.log(2) / bytes_per_token


def accuracy(model: KexaForCausalLM, questions: Sequence[Question]) -> float:
    """The share of questions whose right option the model finds likeliest per byte."""
    picks = choose(model, questions)
    return sum(pick == q.answer for pick, q in zip(picks, questions, strict=True)) / len(questions)


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of guessing, in expectation."""
    return sum(1 / len(q.options) for q in questions) / len(questions)


@dataclass(frozen=True)
class Evaluation:
    """Held-out rows by category and questions by probe."""

    sets: Mapping[str, HeldOut]
    probes: Mapping[str, Sequence[Question]]


def evaluate(model: KexaForCausalLM, evaluation: Evaluation) -> dict[str, float]:
    """The figures ``bits per byte, CATEGORY`` and ``probe KIND``, which is the probe's accuracy.

    On the ranks of a sharded model all call it with the same evaluation; all get the same figures.
    """
    losses = validate(model, evaluation.sets)
    bits = {
        f"bits per byte, {category}": bits_per_byte(losses[category], rows.bytes_per_token)
        for category, rows in evaluation.sets.items()
    }
    return bits | {
        f"probe {kind}": accuracy(model, questions) for kind, questions in evaluation.probes.items()
    }


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation to a file, atomically.

    Raises:
        kexa.record.CannotWrite: the disk is full or refuses.
    """
    buffer = io.BytesIO()
    torch.save(asdict(evaluation), buffer)
    write_atomic(path, buffer.getvalue())


def load_evaluation(path: Path) -> Evaluation:
    """Read what :func:`save_evaluation` wrote."""
    parts = torch.load(path, weights_only=True)
    return Evaluation(
        {category: HeldOut(**rows) for category, rows in parts["sets"].items()},
        {kind: [Question(**q) for q in questions] for kind, questions in parts["probes"].items()},
    )
