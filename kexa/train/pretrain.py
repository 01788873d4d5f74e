"""Three-stage pretraining data and what is measured on held-out text.

The stages (foundation, domain, reasoning) differ in their mixture only; they are one run under one
schedule, so :class:`Curriculum` is one function of the step. Synthetic documents are further
categories beside the corpus's own.

Held-out loss is compared with the unigram entropy of the same tokens,

    H = - sum over v of p_v log p_v        p_v = share of token v among the targets,

the loss of the best predictor that ignores context: a model has learned from context by as many
nats as it lies below H. Losses in nats per token depend on the tokenizer, bits per byte do not:

    bits per byte = nats per token / ln 2 / (bytes per token of the category)

reported: three stages in this order. chosen: mixtures, lengths, the synthetic kinds, H as baseline
(it is computed on the held-out tokens themselves, so no fitted unigram model can beat it).

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kexa import runtime
from kexa.config import ModelConfig, PretrainConfig
from kexa.data import Corpus, Document, Mixture, TokenizedDocuments, balanced, encode, synthesis
from kexa.data.synthesis import facts
from kexa.dist import ALONE, Layout, batch_loss, place, shard
from kexa.model import KexaForCausalLM, Loss, set_recompute
from kexa.tokenizer import encode_corpus, open_corpus
from kexa.train.checkpoint import identity
from kexa.train.fp8 import set_numerics
from kexa.train.loop import Step, fit
from kexa.train.optim import build_optimizers
from kexa.train.schedule import wsd


def new_model(config: ModelConfig, seed: int) -> KexaForCausalLM:
    """A model to pretrain, on the CPU: the model's own initial values but for the embedding.

    chosen: the embedding starts with deviation 1, not ``initializer_range``. AdamW moves rows of
    0.02 by their own size within a few steps of a small model's learning rate. Measured on one
    seed: validation loss 0.22 nats lower after 225K tokens of the smoke profile; the ablations'
    runs of 49K tokens end higher with it, so they keep the model's own values.
    """
    torch.manual_seed(seed)
    model = KexaForCausalLM(config)
    generator = runtime.generator(seed, "embedding")  # the same with and without an MTP block
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=generator)
    return model


def new_sharded_model(
    config: ModelConfig, seed: int, layout: Layout, device: torch.device
) -> KexaForCausalLM:
    """:func:`new_model` over the ranks of a layout, the same values to the bit.

    No rank ever holds more than one whole parameter; every rank draws them all.
    """
    with torch.device("meta"):
        model = KexaForCausalLM(config)
    shard(model, layout)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    torch.manual_seed(seed)
    torch.empty(config.vocab_size, config.hidden_size).normal_()  # as nn.Embedding does when built
    for name, p in model.named_parameters():
        whole = torch.ones(p.shape)
        if p.dim() > 1:
            whole.normal_(0.0, config.initializer_range)
        if name == "model.embed_tokens.weight":
            whole.normal_(generator=runtime.generator(seed, "embedding"))
        place(p, whole.to(device))
    return model


def stage_weights(
    config: PretrainConfig, stage: str, streams: Mapping[str, TokenizedDocuments]
) -> dict[str, float]:
    """Weight of each stream in a stage's mixture, languages balanced by temperature."""
    sizes = {name: len(stream.tokens) for name, stream in streams.items()}
    return balanced(config.mixtures[stage], sizes, config.language_temperature)


class Curriculum:
    """The mixtures of all stages as one function of the step."""

    def __init__(
        self, streams: Mapping[str, TokenizedDocuments], config: PretrainConfig, seed: int
    ):
        if set(config.stage_steps) != set(config.mixtures):
            raise ValueError(
                f"pretrain.stage_steps names {', '.join(config.stage_steps)} but pretrain.mixtures "
                f"has {', '.join(config.mixtures)}"
            )
        self.steps = sum(config.stage_steps.values())
        ends = itertools.accumulate(config.stage_steps.values())
        self.starts = {
            stage: end - config.stage_steps[stage]
            for stage, end in zip(config.stage_steps, ends, strict=True)
        }
        self._mixtures = {
            stage: Mixture(
                streams,
                stage_weights(config, stage, streams),
                config.sequence_length,
                config.batch_size,
                seed * len(self.starts) + i,
            )
            for i, stage in enumerate(self.starts)
        }

    def stage_at(self, step: int) -> str:
        """The name of the stage that a step belongs to."""
        return max((start, stage) for stage, start in self.starts.items() if start <= step)[1]

    def batch(self, step: int) -> dict[str, Tensor]:
        """``input_ids`` and ``document_ids``, int64 [B, T]."""
        stage = self.stage_at(step)
        input_ids, document_ids = self._mixtures[stage].batch(step - self.starts[stage])
        return {"input_ids": input_ids, "document_ids": document_ids}


def synthetic(
    corpus: Mapping[str, list[Document]], counts: Mapping[str, int], seed: int
) -> dict[str, list[Document]]:
    """``counts[kind]`` documents of each synthetic kind.

    "thinking" reads the corpus's English; "facts" and "comparisons" are of the countries whose
    articles are in it.

    Raises:
        SynthesisError: an unknown kind, or problems without reasoning-gym.
        SourceError: the source of facts cannot be fetched.
    """
    knobs = {}
    if "thinking" in counts:
        knobs["thinking"] = {"documents": corpus["en"]}
    for kind in counts.keys() & synthesis.FACTUAL:
        knobs[kind] = {"countries": facts.choose(corpus["en"])}
    return {
        kind: synthesis.documents(kind, count, seed, **knobs.get(kind, {}))
        for kind, count in counts.items()
    }


def training_streams(
    tokenizer: Tokenizer, corpus: Corpus, config: PretrainConfig, seed: int, directory: Path
) -> dict[str, TokenizedDocuments]:
    """Every training category, the corpus's and the synthetic ones, as token files.

    Args:
        tokenizer: one of :mod:`kexa.tokenizer`.
        directory: gets a folder per category; the streams are mapped from there, not held.
    """
    documents = corpus.train | synthetic(corpus.train, config.synthetic_documents, seed)
    return {
        category: encode_corpus(tokenizer, (d.text for d in texts), directory / category)
        for category, texts in documents.items()
    }


def run_curriculum(
    numerics: str,
    model_config: ModelConfig,
    config: PretrainConfig,
    seed: int,
    tokens: Path,
    categories: Sequence[str],
    checkpoints: Path,
    device: torch.device,
) -> tuple[KexaForCausalLM, list[torch.optim.Optimizer], list[Step]]:
    """The whole curriculum from a new model; what ``checkpoints`` holds of it is not repeated.

    The checkpoint at the end of each stage but the last stays beside the last two.

    Args:
        numerics: of the matrix products, see :mod:`kexa.train.fp8`.
        tokens, categories: the directory of :func:`training_streams` and its streams in order.
        checkpoints: of this run alone.
    """
    model, optimizers, steps = start_curriculum(
        numerics, model_config, config, seed, tokens, categories, checkpoints, device
    )
    return model, optimizers, list(steps)


def start_curriculum(
    numerics: str,
    model_config: ModelConfig,
    config: PretrainConfig,
    seed: int,
    tokens: Path,
    categories: Sequence[str],
    checkpoints: Path,
    device: torch.device,
    layout: Layout = ALONE,
) -> tuple[KexaForCausalLM, list[torch.optim.Optimizer], Iterator[Step]]:
    """:func:`run_curriculum` step by step, on one process or on the ranks of a layout.

    The checkpoints' identity holds neither the layout nor how the config spreads a step over memory
    and micro-batches (``accumulate``, ``recompute``, ``offload_optimizer``): a run may go on under
    others, on fewer ranks with more micro-batches.
    """
    streams = {category: open_corpus(tokens / category) for category in categories}
    curriculum = Curriculum(streams, config, seed)
    if layout.size == 1:
        model = new_model(model_config, seed).to(device)
    else:
        model = new_sharded_model(model_config, seed, layout, device)
    set_numerics(model, numerics)
    set_recompute(model, config.recompute)
    optimizers = build_optimizers(model, config)
    schedule = functools.partial(
        wsd,
        steps=curriculum.steps,
        warmup_share=config.warmup_share,
        decay_share=config.decay_share,
    )
    kept = dataclasses.replace(config, accumulate=1, recompute=False, offload_optimizer=False)
    steps = fit(
        model, optimizers, curriculum.batch,
        functools.partial(training_loss, config=config, layout=layout),
        curriculum.steps, schedule, accumulate=config.accumulate, balance_step=config.balance_step,
        offload_optimizer=config.offload_optimizer,
        checkpoint_dir=checkpoints, checkpoint_every=config.checkpoint_every,
        metrics_every=config.metrics_every,
        milestones=set(curriculum.starts.values()) - {0},
        identity=identity(model=model_config, pretrain=kept, numerics=numerics, seed=seed),
        description=f"pretraining in {numerics}",
    )  # fmt: skip
    return model, optimizers, steps


def training_loss(
    model: KexaForCausalLM,
    batch: Mapping[str, Tensor],
    config: PretrainConfig,
    layout: Layout = ALONE,
) -> Loss:
    """What pretraining minimises, with the config's weights."""
    return batch_loss(
        model,
        batch["input_ids"],
        batch["document_ids"],
        layout,
        mtp_weight=config.mtp_weight,
        balance_weight=config.balance_weight,
        z_loss=config.z_loss,
    )


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
    tokenizer: Tokenizer, documents: Mapping[str, list[Document]], length: int, rows: int, seed: int
) -> dict[str, HeldOut]:
    """``rows`` rows of ``length`` tokens of every category."""
    sets = {}
    for category, texts in documents.items():
        tokens = encode(tokenizer, texts)
        input_ids, document_ids = Mixture(
            {category: tokens}, {category: 1}, length, rows, seed
        ).batch(0)
        size = sum(len(d.text.encode()) for d in texts)
        sets[category] = HeldOut(input_ids, document_ids, size / (len(tokens.tokens) - len(texts)))
    return sets


def unigram_entropy(targets: Tensor) -> float:
    """Entropy in nats of the token frequencies."""
    share = torch.bincount(targets).double() / len(targets)
    return float(-torch.special.xlogy(share, share).sum())


@torch.no_grad()
def validate(model: KexaForCausalLM, sets: Mapping[str, HeldOut]) -> dict[str, float]:
    """Nats per target token in every category, in evaluation mode and the model's own numerics."""
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    losses = {}
    for category, rows in sets.items():
        batch = rows.input_ids.to(device), rows.document_ids.to(device)
        losses[category] = float(model.loss(*batch, mtp_weight=0.0).next_token)
    model.train(was_training)
    return losses


def pooled(losses: Mapping[str, float], sets: Mapping[str, HeldOut]) -> float:
    """The mean over all target tokens of per-category means."""
    counts = {category: len(sets[category].targets) for category in losses}
    return sum(losses[c] * n for c, n in counts.items()) / sum(counts.values())


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Tokenizer-independent form of a loss."""
    return nats_per_token / math.log(2) / bytes_per_token
