"""Three-stage pretraining: its data, the run, and what is evaluated where a stage ends.

The stages (foundation, domain, reasoning) differ in their mixture only; they are one run under one
schedule, so :class:`Curriculum` is one function of the step. Synthetic documents are further
categories beside the corpus's own.

At the end of each stage the model is evaluated on the same held-out text, fresh synthetic documents
and probes (:mod:`kexa.train.evaluation`), and its checkpoint stays.

reported: three stages in this order. chosen: mixtures, lengths, the synthetic kinds, what is
evaluated.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kexa import runtime
from kexa.config import ModelConfig, PretrainConfig
from kexa.data import Corpus, Document, Mixture, TokenizedDocuments, balanced, choices, synthesis
from kexa.data.synthesis import facts
from kexa.dist import ALONE, Layout, batch_loss, place, shard
from kexa.model import KexaForCausalLM, Loss, set_recompute
from kexa.tokenizer import encode_corpus, open_corpus
from kexa.train.checkpoint import branch, identity, list_checkpoints
from kexa.train.evaluation import Evaluation, evaluate, held_out
from kexa.train.fp8 import set_numerics
from kexa.train.loop import Step, fit
from kexa.train.optim import build_optimizers
from kexa.train.schedule import branched, wsd


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
    config: ModelConfig, seed: int, layout: Layout, device: torch.device, drawn: bool = True
) -> KexaForCausalLM:
    """:func:`new_model` over the ranks of a layout, the same values to the bit.

    No rank ever holds more than one whole parameter; every rank draws them all. Not ``drawn``, they
    are zero and wait for a checkpoint, which spares a large model the time.
    """
    with torch.device("meta"):
        model = KexaForCausalLM(config)
    shard(model, layout)
    model.to_empty(device=device)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.detach().zero_()
    torch.manual_seed(seed)
    if not drawn:
        return model
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


def stage_ends(config: PretrainConfig) -> dict[str, int]:
    """After how many steps each stage ends."""
    return dict(
        zip(config.stage_steps, itertools.accumulate(config.stage_steps.values()), strict=True)
    )


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
        ends = stage_ends(config)
        self.steps = max(ends.values())
        self.starts = {stage: end - config.stage_steps[stage] for stage, end in ends.items()}
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


def stage_evaluation(
    tokenizer: Tokenizer, corpus: Corpus, config: PretrainConfig, seed: int
) -> Evaluation:
    """What is evaluated at the end of each stage: ``validation_rows`` rows of every category's
    held-out text and of fresh documents of every synthetic kind, and the probes.

    Raises:
        ValueError: an unknown probe.
        SynthesisError, SourceError: as :func:`synthetic`.
    """
    fresh = synthetic(corpus.heldout, dict.fromkeys(config.synthetic_documents, 64), seed + 1)
    countries = facts.choose(corpus.train["en"]) if "facts" in config.probes else ()
    return Evaluation(
        held_out(
            tokenizer,
            corpus.heldout | fresh,
            config.sequence_length,
            config.validation_rows,
            seed,
        ),
        {
            kind: [
                choices.in_tokens(tokenizer, item)
                for item in choices.draw(kind, count, seed, countries)
            ]
            for kind, count in config.probes.items()
        },
    )


@dataclass(frozen=True)
class Pretraining:
    """All that decides the bits of one run, and the files it reads and writes.

    ``numerics`` of the matrix products, see :mod:`kexa.train.fp8`; ``tokens`` and ``categories``
    are the directory of :func:`training_streams` and its streams in order; ``checkpoints`` is a
    directory of this run alone; without an ``evaluation`` nothing is evaluated.

    With a ``decay_stage`` it is a branch: it leaves the run without one, whose checkpoints these
    are, where that stage begins, decays over the stage and ends with it. Its own checkpoints are in
    ``decay-STAGE`` there.

    ``data`` names the text behind ``tokens``, as a hash of what decides it: a run does not go on
    over other text. Where the checkpoints cannot outlive the tokens it may be empty.
    """

    numerics: str
    model: ModelConfig
    config: PretrainConfig
    seed: int
    tokens: Path
    categories: tuple[str, ...]
    checkpoints: Path
    evaluation: Evaluation | None = None
    decay_stage: str = ""
    data: str = ""

    @property
    def directory(self) -> Path:
        """Where this run or branch leaves its checkpoints."""
        return self.checkpoints / (f"decay-{self.decay_stage}" if self.decay_stage else "")


def run_curriculum(
    run: Pretraining, device: torch.device, layout: Layout = ALONE
) -> tuple[KexaForCausalLM, list[torch.optim.Optimizer], list[Step]]:
    """The whole curriculum from a new model; what ``checkpoints`` holds of it is not repeated.

    The checkpoint at the end of each stage but the last stays beside the last two. The last record
    of each stage has the figures of :func:`kexa.train.evaluation.evaluate`.

    Raises:
        ValueError: a ``decay_stage`` that begins where the learning rate is not stable.
        CheckpointError: the run has not come as far as the stage; see :func:`kexa.train.fit` for
            more.
    """
    model, optimizers, steps = start_curriculum(run, device, layout)
    return model, optimizers, list(steps)


def start_curriculum(
    run: Pretraining, device: torch.device, layout: Layout = ALONE
) -> tuple[KexaForCausalLM, list[torch.optim.Optimizer], Iterator[Step]]:
    """:func:`run_curriculum` step by step, on one process or on the ranks of a layout.

    The checkpoints' identity holds neither the layout nor how the config spreads a step over memory
    and micro-batches (``accumulate``, ``recompute``, ``offload_optimizer``, ``processes``), nor how
    often the run is saved and measured (``checkpoint_every``, ``metrics_every``): it may go on
    under others, on fewer ranks with more micro-batches.
    """
    config = run.config
    streams = {category: open_corpus(run.tokens / category) for category in run.categories}
    curriculum = Curriculum(streams, config, run.seed)
    if layout.size == 1:
        model = new_model(run.model, run.seed).to(device)
    else:
        fresh = not run.decay_stage and not list_checkpoints(run.directory)
        model = new_sharded_model(run.model, run.seed, layout, device, drawn=fresh)
    set_numerics(model, run.numerics)
    set_recompute(model, config.recompute)
    optimizers = build_optimizers(model, config)
    schedule = functools.partial(
        wsd,
        steps=curriculum.steps,
        warmup_share=config.warmup_share,
        decay_share=config.decay_share,
    )
    kept = dataclasses.replace(
        config, accumulate=1, recompute=False, offload_optimizer=False, processes=1, reference="",
        checkpoint_every=1, metrics_every=0,
    )  # fmt: skip
    parts = {
        "model": run.model, "pretrain": kept, "numerics": run.numerics, "seed": run.seed,
        "data": run.data,
    }  # fmt: skip
    name, last = identity(**parts), curriculum.steps
    description = f"pretraining in {run.numerics}"
    if stage := run.decay_stage:
        schedule = branched_schedule(config, curriculum, stage)
        start, last = curriculum.starts[stage], stage_ends(config)[stage]
        plan, name = name, identity(**parts, decay_stage=stage)
        branch(run.checkpoints, start, plan, run.directory, name, model.state_dict())
        description += f", decay over {stage}"
    ends = set(stage_ends(config).values())
    look = functools.partial(evaluate, evaluation=run.evaluation) if run.evaluation else None
    steps = fit(
        model, optimizers, curriculum.batch,
        functools.partial(training_loss, config=config, layout=layout),
        last, schedule, accumulate=config.accumulate, balance_step=config.balance_step,
        offload_optimizer=config.offload_optimizer,
        checkpoint_dir=run.directory, checkpoint_every=config.checkpoint_every,
        metrics_every=config.metrics_every,
        milestones=ends - {curriculum.steps},
        evaluate=look, evaluate_after=ends,
        identity=name, description=description,
    )  # fmt: skip
    return model, optimizers, steps


def branched_schedule(
    config: PretrainConfig, curriculum: Curriculum, stage: str
) -> Callable[[int], float]:
    """The curriculum's schedule up to ``stage``, then a decay that lasts as long as the stage.

    Raises:
        ValueError: an unknown stage, or one that begins where the curriculum warms up or decays.
    """
    if stage not in curriculum.starts:
        raise ValueError(f"no stage {stage!r} to decay over: use {', '.join(curriculum.starts)}")
    start, steps = curriculum.starts[stage], curriculum.steps
    warmup = math.ceil(config.warmup_share * steps)
    decay = steps - math.ceil(config.decay_share * steps)
    if not warmup <= start <= decay:
        raise ValueError(
            f"stage {stage!r} begins at step {start}; a decay can branch off between {warmup} and "
            f"{decay}, where the learning rate is stable"
        )
    return functools.partial(
        branched, warmup=warmup, decay_from=start, decay=config.stage_steps[stage]
    )


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
