# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Pretraining: eight-bit products learn what sixteen-bit products learn
#
# K-EXAONE is trained natively in FP8 with the Muon optimizer, a warm-up-stable-decay schedule and
# a curriculum of three stages: foundational knowledge, domain expertise, reasoning. The report
# states that the FP8 loss curve is comparable to BF16, but not which FP8 recipe that was. **Does
# blockwise FP8, the likeliest one, follow BF16 step by step, and does the whole recipe learn from
# context at this size?**
#
# Everything below is one run from a random model, repeated with BF16 products from the same seed
# on the same batches.

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import dataclasses
import math

import torch

from kexa import notebook, plot, pretrain_figures, study, study_figures, tokenizer
from kexa.config import RIVALS
from kexa.data import load_corpus
from kexa.data.cleaning import effect_table
from kexa.data.corpus import intake_table, removed_shares
from kexa.eval.baselines import first_documents, joined, measure, train_ngram
from kexa.interop import save_hf
from kexa.kernels import quantize_blocks, quantize_rows
from kexa.parallel import across, beside
from kexa.statistics import wilson
from kexa.train import grouping, orthogonalize, set_numerics
from kexa.train.evaluation import (
    bits_per_byte,
    chance,
    held_out,
    pooled,
    target_losses,
    unigram_entropy,
    validate,
)
from kexa.train.fp8 import quantize
from kexa.train.metrics import scalars
from kexa.train.pretrain import (
    Curriculum,
    Pretraining,
    new_model,
    run_curriculum,
    stage_ends,
    stage_evaluation,
    stage_weights,
    training_loss,
    training_streams,
)

run = notebook.begin("04_pretraining", profile, seed, out_dir)
config = run.config.pretrain

# %% [markdown]
# ## FP8 in one product
#
# E4M3 has four significant bits and reaches from $2^{-9}$ to 448. A tensor is cut into tiles, and
# each tile is scaled so that its largest magnitude lands on 448:
#
# $$s = \max(\mathrm{amax}, 2^{-100}) / 448, \qquad \hat x = s \cdot \mathrm{E4M3}(x / s)$$
#
# Activations and gradients have tiles of 1 x 128 along the axis that the product sums over,
# weights blocks of 128 x 128 (chosen: DeepSeek-V3's recipe, since the report names none). Numbers
# more than about $2^{15}$ below the largest of their tile lose bits; an outlier that leaves the
# others so far behind costs the precision of its own tile and of no other:

# %%
x = torch.randn(2, 256, generator=torch.Generator().manual_seed(seed))
x[0, 0] = 1e5  # an outlier in the first tile of the first row
relative = (quantize(x, 1, 128) - x).abs() / x.abs()
for name, tile in {"with the outlier": relative[0, 1:128], "beside it": relative[0, 128:]}.items():
    print(f"median relative error in the tile {name}: {tile.median():.4f}")

# %% [markdown]
# All three products of a linear layer run this way: output, gradient of the input, gradient of
# the weight. Sums are taken in FP32, results rounded to BF16, master weights stay FP32.
# Embedding, norms, router and attention keep their precision; the head and the MTP projection use
# BF16 products. The policy replaces the products of a finished model from outside, so the model's
# code knows nothing of it.

# %%
model = new_model(run.config.model, seed)
for kind, names in set_numerics(model, "fp8").items():
    print(f"{len(names):3d} {kind:<8} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")

# %% [markdown]
# ## Muon for matrices, AdamW for the rest
#
# Muon takes the momentum $M$ of a weight matrix and replaces it by the nearest matrix whose
# singular values are all equal, so that every direction is learned at the same rate; five
# Newton-Schulz steps (NS) approximate this with products alone. Each expert, and each of q, k and
# v, is a matrix of its own.
#
# $$W \leftarrow W (1 - \eta\lambda) - 0.2\,\eta \sqrt{\max(m, n)}\; \mathrm{NS}(G + \mu M)$$

# %%
print(grouping(model))

# %% [markdown]
# ## Data: from sources to a corpus
#
# Every source has a card with its licence, its hash and its known faults. Its documents meet the
# cleaning steps of the config one after the other: filters by script, language, length, loops,
# boilerplate, markup and symbols; text that says a machine wrote it; personal information, which
# becomes a special token; then exact and near-duplicates, and whatever repeats a question of an
# evaluation set. The first step that removes a document counts it.

# %%
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
corpus = load_corpus(run.config.data)
print("\n".join(effect_table(corpus.effects)))

# %% [markdown]
# A category takes documents in the order of their hashes, people's text first, until its quota is
# full; the rest is "over quota" and not looked at. Groups of near-duplicates are held out whole, so
# no held-out document has a near copy in training.

# %%
print("\n".join(intake_table(corpus)))

# %%
removed = removed_shares(corpus)
steps = [
    step for step in run.config.data.steps if any(step in by_step for by_step in removed.values())
]
source = max(removed, key=lambda s: sum(removed[s].values()))
strictest = max(removed[source], key=removed[source].get)
ax = plot.heatmap(
    [[100 * by_step.get(step, 0) for step in steps] for by_step in removed.values()],
    f"{source} loses {sum(removed[source].values()):.1%} of its documents, "
    f"{removed[source][strictest]:.1%} to {strictest}",
    "cleaning step",
    "source",
    steps,
    list(removed),
    "% of the documents looked at",
)
run.figure(ax.figure, "cleaning", caption="What each cleaning step removed, by source.")
gone = sum(effect.removed for effect in corpus.effects)
looked_at = gone + sum(intake.kept for intake in corpus.intake)
run.value("documents removed by cleaning", gone / looked_at, unit="share", note=f"{gone:,}")

# %% [markdown]
# ## Three stages, one run
#
# The stages differ in their mixture only. The last one adds synthetic documents that exercise
# reasoning: recall of facts stated earlier, worked arithmetic, and documents followed by a worked
# reading of them ("thinking-augmented" pretraining; here rules write the reading, in a large run
# a model does). The larger profiles add problems, facts and comparisons, each carried into all six
# languages; `kexa data synthesize` writes any of them with generator, seed and source. English and
# Korean have weights of their own; the other languages share one by size $n_l$, evened out by a
# temperature: $w_l \propto n_l^{1/\tau}$.

# %%
streams = training_streams(vocabulary, corpus, config, seed, run.dir / "tokens")
curriculum = Curriculum(streams, config, seed)
batch_tokens = config.batch_size * config.sequence_length
tokens_of = {stage: n * batch_tokens for stage, n in config.stage_steps.items()}
weights = {stage: stage_weights(config, stage, streams) for stage in tokens_of}
held = {name: len(stream.tokens) for name, stream in streams.items()}
figure = pretrain_figures.mixture(weights, tokens_of, held, list(config.synthetic_documents))
run.figure(figure, "mixture", caption="Mixture of each stage; tokens held and tokens read.")
read = pretrain_figures.tokens_read(weights, tokens_of)
passes = {name: n / held[name] for name, n in read.items()}
most = max(passes, key=passes.get)
run.value("passes over the most read category", passes[most], unit="epochs", note=most)

# %% [markdown]
# Held out are whole documents of the natural categories, and freshly drawn synthetic ones. Short
# probes go with them: questions with four options, of which the model takes the likeliest. The
# baseline is the unigram entropy of the held-out tokens themselves: no predictor that ignores
# context can be better, whatever it was fitted on, and since few tokens show less variety than
# the language has, it is stricter than that of the language. Over all categories together part of
# what context tells is which language this is, so the entropies of the single categories are the
# harder baseline.

# %%
evaluation = stage_evaluation(vocabulary, corpus, config, seed)
natural = {category: evaluation.sets[category] for category in corpus.heldout}
skills = {kind: evaluation.sets[kind] for kind in config.synthetic_documents}
entropy = unigram_entropy(torch.cat([rows.targets for rows in natural.values()]))
within = pooled({c: unigram_entropy(rows.targets) for c, rows in natural.items()}, natural)
run.value("unigram entropy", entropy, unit="nats/token")
run.value("unigram entropy within categories", within, unit="nats/token")
print(f"unigram entropy: {entropy:.3f} nats/token, {within:.3f} where the category is known")

# %% [markdown]
# ## The run, and a second one that differs in numerics alone
#
# `run_curriculum` is a new model, its optimizers and `fit`, which gives one record per optimizer
# step. Killed, a run resumes from its last checkpoint with the same bits and gives the records of
# the steps it need not repeat. The reference has the same initial weights, batches and schedule;
# on CPU cores the two run side by side, each on half of the threads. A profile without a reference
# can spread its run over several processes instead: the ranks of `torchrun -m kexa.train`.

# %%
checkpoints = run.dir / "checkpoints"
pretraining = Pretraining(
    config.numerics, run.config.model, config, seed, run.dir / "tokens", tuple(streams),
    checkpoints / config.numerics, evaluation,
)  # fmt: skip
in_reference = dataclasses.replace(
    pretraining, numerics=config.reference, checkpoints=checkpoints / "reference", evaluation=None
)
beside_it = [(in_reference, run.device)] if config.reference else []
across(config.processes, run_curriculum, (pretraining,), run.config.runtime, seed)
with beside(run_curriculum, beside_it, run.config.runtime, seed):
    model, optimizers, records = run_curriculum(pretraining, run.device)
histories = {config.numerics: records}
if config.reference:
    reference, _, histories[config.reference] = run_curriculum(in_reference, run.device)
for numerics, recorded in histories.items():
    for record in recorded:
        run.log(f"train {numerics}", record.step, **scalars(record))
skipped = sum(r.skipped for r in records)
print(f"{len(records)} steps, {records[-1].tokens:,} tokens, {skipped} skipped by the guard")

# %% [markdown]
# ## What it learned
#
# A loss in nats per token depends on the tokenizer; bits per byte do not, so a network can be
# compared with what needs none. The n-gram model counts the same tokens (interpolated modified
# Kneser-Ney), of all categories or of one, and predicts the same targets from what the row shows of
# a document; in each category the better of the two is the one to beat. gzip and xz read the
# held-out documents one after the other; once more xz reads a category's training text before them
# and pays for the held-out text only. The compressors have an advantage: they see documents whole
# and learn from one for the next, where the others see a row.

# %%
losses = validate(model, natural)
validation = pooled(losses, natural)

# %%
compared = run.config.baselines
texts = {c: first_documents(found, compared.train_bytes) for c, found in corpus.train.items()}
judged = {c: first_documents(found, compared.heldout_bytes) for c, found in corpus.heldout.items()}
counted = {c: streams[c].first(len(found)) for c, found in texts.items()}
rows = held_out(vocabulary, judged, config.sequence_length, None, seed)
ngram = train_ngram(joined(counted.values()), compared.order, run.config.model.vocab_size)
bits = measure(texts, counted, judged, rows, ngram)
bits["model"] = {
    c: bits_per_byte(loss, rows[c].bytes_per_token) for c, loss in validate(model, rows).items()
}
print(" " * 22 + "".join(f"{c:>7}" for c in judged))
for name, by_category in bits.items():
    print(f"{name:22}" + "".join(f"{by_category[c]:7.3f}" for c in judged) + "  bits/byte")
    for category, value in by_category.items():
        run.value(f"bits per byte of {name}, {category}", value, unit="bits/byte")
seen = sum(len(stream.tokens) for stream in counted.values())
print(f"n-grams counted {seen:,} tokens; the model read {records[-1].tokens:,}")

# %%
bits["n-gram"] = {
    c: min(bits["n-gram of all text"][c], bits["n-gram of its own text"][c]) for c in judged
}
won = {rival: [c for c in judged if bits["model"][c] < bits[rival][c]] for rival in RIVALS}
ax = plot.grouped_bars(
    list(judged),
    {name: list(bits[name].values()) for name in (*won, "model")},
    f"Of {len(judged)} categories the model beats\n"
    + ", ".join(f"{rival} in {len(categories)}" for rival, categories in won.items()),
    "bits per byte of held-out text",
)
caption = (
    f"Held-out text: the model after pretraining, compressors, and a {compared.order}-gram model."
)
run.figure(ax.figure, "by_category", caption=caption)
for rival, categories in won.items():
    run.value(f"categories in which the model beats {rival}", len(categories), headline=True)
for rival in compared.beaten:
    run.check(
        f"the model beats {rival} in every category",
        len(won[rival]) == len(judged),
        f"in {len(won[rival])} of {len(judged)}: {', '.join(won[rival]) or 'none'}",
    )

# %% [markdown]
# Where does each of them win? A long context that an n-gram model has met word for word it answers
# from memory; one that it has never met it can only shorten. Targets are sorted here by how many
# tokens just before them the n-gram model of all text knows, and the losses of both are compared
# target by target (the intervals take targets for independent).

# %%
each = [(r.input_ids, r.document_ids) for r in rows.values()]
known = torch.cat([torch.tensor(ngram.known(*row)) for row in each])
by_ngram = torch.cat([torch.tensor(ngram.losses(*row)) for row in each])
by_model = torch.cat([target_losses(model, r) for r in rows.values()])
figure = pretrain_figures.contexts(by_ngram, by_model, known)
caption = f"Losses of single targets by the tokens of context that the {compared.order}-gram knows."
run.figure(figure, "contexts", caption=caption)
for k in known.unique().tolist():
    better = (by_model < by_ngram)[known == k].double()
    name, note = f"targets predicted better by the model, {k} known tokens", f"of {len(better):,}"
    run.value(name, better.mean().item(), unit="share", note=note)

# %%
margin = entropy - validation
run.value("validation loss", validation, unit="nats/token", headline=True)
run.value("nats below unigram entropy", margin, unit="nats/token", headline=True)
run.value("nats below unigram entropy within categories", within - validation, unit="nats/token")
print(f"of {margin:.3f} nats, {entropy - within:.3f} are worth what the category alone tells")
run.check(
    "validation loss is at least 1.5 nats under the unigram entropy of the same split",
    margin >= 1.5,
    f"{validation:.3f} against {entropy:.3f}: {margin:.3f} nats",
)

# %% [markdown]
# The synthetic categories appear in the last stage only. They are what the next stages build on,
# so their loss is shown apart, against the entropy of their own tokens.

# %%
for category, loss in validate(model, skills).items():
    floor = unigram_entropy(skills[category].targets)
    run.value(f"held-out loss, {category}", loss, unit="nats/token")
    print(f"{category:<11} {loss:.3f} nats/token (unigram entropy {floor:.3f})")

# %% [markdown]
# ## At each stage boundary
#
# The same rows and questions, asked after the last step of each stage; training has the same bits
# with these pauses and without. From one stage to the next a category's share of the mixture
# changes, and towards the end the learning rate decays as well. The unigram entropy here is that of
# the category's own held-out tokens.

# %%
boundaries = {stage: records[end - 1].evaluation for stage, end in stage_ends(config).items()}
print(f"{'':28}" + "".join(f"{stage:>12}" for stage in boundaries))
for name in boundaries[list(boundaries)[-1]]:
    unit = "bits/byte" if name.startswith("bits per byte") else "share right"
    for stage, figures in boundaries.items():
        run.value(f"{name}, after {stage}", figures[name], unit=unit)
    print(f"{name:28}" + "".join(f"{figures[name]:12.3f}" for figures in boundaries.values()))

# %%
figure = pretrain_figures.boundaries(
    {
        stage: {c: figures[f"bits per byte, {c}"] for c in evaluation.sets}
        for stage, figures in boundaries.items()
    },
    {
        c: bits_per_byte(unigram_entropy(r.targets), r.bytes_per_token)
        for c, r in evaluation.sets.items()
    },
)
run.figure(figure, "boundaries", caption="Bits per byte by category at each stage boundary.")

# %% [markdown]
# The options of a question about recall, a sum or a capital are drawn alike and one of them, at
# random, is asked: answers that ignore the question are right one time in four.

# %%
if evaluation.probes:
    asked = {kind: len(questions) for kind, questions in evaluation.probes.items()}
    right = {
        stage: [wilson(round(figures[f"probe {kind}"] * n), n) for kind, n in asked.items()]
        for stage, figures in boundaries.items()
    }
    guess = {kind: chance(questions) for kind, questions in evaluation.probes.items()}
    last = right[list(boundaries)[-1]]
    above = [k for k, s in zip(asked, last, strict=True) if s.low > guess[k]]
    ax = plot.grouped_bars(
        [f"{kind} ({n} questions)" for kind, n in asked.items()],
        {f"after {stage}": [s.estimate for s in row] for stage, row in right.items()},
        f"Clearly above chance after the last stage: {', '.join(above) or 'no probe'}",
        "share of questions right, 95% interval",
        intervals={f"after {stage}": [s[1:] for s in row] for stage, row in right.items()},
        baseline={"chance": max(guess.values())},
    )
    run.figure(ax.figure, "probes", caption="Multiple-choice probes at each stage boundary.")

# %% [markdown]
# ## FP8 against BF16
#
# With a reference, both curves (means of the last ten steps) see the same batch at the same step,
# so their difference is numerics and nothing else. A jump where a stage starts is its mixture, not
# its learning.


# %%
def smooth(values, window=10):
    tensor = torch.tensor(values)
    return tensor.unfold(0, min(window, len(values)), 1).mean(1).tolist()


curves = {
    name.upper(): smooth([r.losses["next_token"] for r in recorded])
    for name, recorded in histories.items()
}
if config.reference:
    reference_validation = pooled(validate(reference, natural), natural)
    gap = abs(validation / reference_validation - 1)
    found = f"{' and '.join(curves)} end {gap:.2%} apart in validation loss"
else:
    found = f"Training in {config.numerics.upper()} ends at {validation:.2f} nats of held-out text"
ax = plot.lines(
    {
        name: (range(len(records) - len(curve), len(records)), curve)
        for name, curve in curves.items()
    },
    found,
    "optimizer step",
    "training loss, nats per token",
    hlines={"unigram entropy of the natural held-out text": entropy},
)
for stage, start in curriculum.starts.items():
    ax.axvline(start, color="0.7", linewidth=0.8)
    ax.annotate(stage, (start, ax.get_ylim()[1]), xytext=(3, -10), textcoords="offset points")
run.figure(ax.figure, "loss", caption=f"Training loss over the stages, {' and '.join(curves)}.")

# %%
if config.reference:
    run.value("validation loss of the reference", reference_validation, unit="nats/token")
    run.value("relative gap to the reference", gap, headline=True)
    run.check(
        f"{' and '.join(curves)} end within 1% of each other in validation loss",
        gap <= 0.01,
        f"{validation:.4f} and {reference_validation:.4f}: {gap:.2%}",
    )

# %% [markdown]
# One pair of runs cannot tell a small cost from chance. A study makes many: `kexa study fp8` trains
# a micro-model in BF16, in FP8 and in two coarser FP8 recipes (a scale per row, a scale per
# tensor), paired by seed, each run a committed line in `studies/`. The yardstick is what another
# seed does to BF16 itself.


# %%
def show(name, draw):
    """A study's outcome on every device that has made enough of its runs."""
    chosen, outcomes = study.committed(name)
    if not outcomes:
        print(f"{chosen.question} Not answered yet: run `kexa study {name}`")
    for device, outcome in outcomes.items():
        print(f"{device}: " + "\n".join(study.report(chosen, outcome)))
        seeds = f"{study.seeds_told(chosen, outcome)} on {device}"
        file = "-".join(["study", name, *device.lower().split()])
        run.figure(draw(chosen, outcome), file, caption=f"Study {name}: {seeds}; 95% intervals.")
        for variant, gap in outcome.gaps.items():
            note = f"95% interval {gap.low:+.3%} to {gap.high:+.3%}, {seeds}"
            run.value(f"study {name}, {device}: gap of {variant}", gap.estimate, note=note)


show("fp8", study_figures.costs)

# %% [markdown]
# How large are the errors behind these differences? The format's bound for normal numbers is
# $2^{-4}$ of the value; those below $2^{-6}$ after scaling have fewer bits and lose more, and the
# smallest become zero. Shown are the operands of one product in the middle of the network, on the
# last training batch: which codes they become, and the error. Gradients of a mean loss are tiny,
# but every tile is scaled until its largest magnitude is 448: only the spread inside a tile counts.

# %%
layer = model.model.layers[len(model.model.layers) // 2].self_attn.o_proj
operands = {"weight": layer.weight.detach()}
handles = [
    layer.register_forward_hook(
        lambda _, inputs, y: operands.update(activation=inputs[0].detach())
    ),
    layer.register_full_backward_hook(lambda _, dx, dy: operands.update(gradient=dy[0].detach())),
]
batch = {k: v.to(run.device) for k, v in curriculum.batch(curriculum.steps - 1).items()}
model.train()
training_loss(model, batch, config).total.backward()
model.zero_grad()
for handle in handles:
    handle.remove()

# %%
codes, errors = {}, {}
for name, operand in operands.items():
    if name == "weight":
        scaled, rounded = quantize_blocks(operand[None]), quantize(operand, 128, 128)
    else:
        operand = operand.flatten(0, -2)
        amax = operand.abs().unflatten(1, (-1, 128)).amax(-1).median().item()
        run.value(f"largest magnitude of a tile, {name}", amax, unit="median over the tiles")
        print(f"largest magnitude of a tile of the {name}: {amax:.2g} (median)")
        scaled, rounded = quantize_rows(operand), quantize(operand, 1, 128)
    nonzero = operand != 0
    codes[name] = scaled.codes.float().view_as(operand)[nonzero]
    errors[name] = ((rounded - operand).abs() / operand.abs())[nonzero]
figure = pretrain_figures.fp8(codes, errors)
run.figure(figure, "fp8_error", caption="E4M3 with blockwise scales: codes and relative errors.")
for name, values in codes.items():
    zeros = (values == 0).double().mean().item()
    run.value(f"underflow to zero, {name}", zeros, unit="share of nonzero values")

# %% [markdown]
# ## A decay branches off
#
# Warm-up, stable, decay: while the rate is stable no step depends on how long the run will be, so
# a finished model can be had at any time. A branch takes the checkpoint where the second stage
# begins, reads the same batches as the whole run, and decays over that stage alone. The whole run
# at the same step has the same tokens behind it and a higher learning rate.

# %%
second = list(config.stage_steps)[1]
branching = dataclasses.replace(pretraining, decay_stage=second)
across(config.processes, run_curriculum, (branching,), run.config.runtime, seed)
_, _, branch = run_curriculum(branching, run.device)
start, end = curriculum.starts[second], len(branch)


def mean_bits(record):
    """Bits per byte of held-out text after a step, mean over the natural categories."""
    return sum(record.evaluation[f"bits per byte, {c}"] for c in natural) / len(natural)


left, there, decayed = map(mean_bits, (branch[start - 1], records[end - 1], branch[-1]))

# %%
figure = pretrain_figures.branch(
    {
        "whole run": (range(len(records)), [r.learning_rate for r in records]),
        "branch": (range(start, end), [r.learning_rate for r in branch[start:]]),
    },
    {start: left, end: there, len(records): mean_bits(records[-1])},
    {start: left, end: decayed},
    list(curriculum.starts.values()),
    batch_tokens,
)
run.figure(figure, "branch", caption="The WSD schedule and a branch; grey lines: stage starts.")
run.value("bits per byte where the branch leaves", left, unit="bits/byte")
run.value("bits per byte where the branch ends", decayed, unit="bits/byte")
run.value("bits per byte of the whole run there", there, unit="bits/byte")
run.check(
    "the branch ends below the checkpoint that it left",
    decayed < left,
    f"{decayed:.3f} against {left:.3f} bits per byte",
)

# %% [markdown]
# ## Experts over time
#
# Left alone, a router comes to favour a few experts. After every step the selection bias of an
# expert with less than the mean load rises and that of the others falls, and a small
# sequence-level loss pulls in the same direction. A load of 1 is a fair share. Experts of
# different layers have nothing in common but their number, so layers are shown apart: the first,
# the middle and the last sparse one.

# %%
load = torch.tensor(
    [r.expert_load for r in records], dtype=torch.float32
)  # [steps, layers, experts]
load = load / load.mean(-1, keepdim=True)
figure = pretrain_figures.expert_load(load)
run.figure(figure, "expert_load", caption="Expert load over training in three layers.")

# %% [markdown]
# Over all layers: imbalance is the maximum violation, the largest load over the mean load, less 1.

# %%
figure = pretrain_figures.violation(load)
run.figure(figure, "violation", caption="Imbalance of every layer over training.")
at_end = pretrain_figures.imbalance(load)[0][:, -1].mean()
run.value("maximum violation at the end", at_end, unit="max load / mean load - 1")

# %% [markdown]
# Equal loads alone do not say that experts are chosen: a router without a preference has them
# too, and an entropy of $\log E$ nats. It is measured every `metrics_every` steps.

# %%
measured = [r for r in records if r.figures]
if measured:
    layers, experts = load.shape[1:]
    entropies = torch.tensor(
        [[r.figures[f"router_entropy/{depth}"] for r in measured] for depth in range(layers)]
    )
    figure = pretrain_figures.router_entropy([r.step for r in measured], entropies, experts)
    run.figure(figure, "router_entropy", caption="Router entropy of every layer.")
    share = entropies[:, -1].mean().item() / math.log(experts)
    run.value("router entropy at the end", share, unit="of log E")

# %% [markdown]
# ## What Muon does to an update
#
# Singular values of the momentum of one matrix at the last step, and of what Newton-Schulz makes
# of it. (An update orthogonalises $G + \mu M$, the momentum and the step's own gradient.)

# %%
momentum = optimizers[0].state[layer.weight]["momentum"].float()
before = torch.linalg.svdvals(momentum / torch.linalg.matrix_norm(momentum))
after = torch.linalg.svdvals(orthogonalize(momentum).float())
spreads = [float(s[0] / s[len(s) * 9 // 10]) for s in (before, after)]
ax = plot.lines(
    {
        "momentum, Frobenius norm 1": (range(len(before)), before.tolist()),
        "after five Newton-Schulz steps": (range(len(after)), after.tolist()),
    },
    f"The largest singular value is {spreads[0]:.0f} times the one that\n"
    f"nine in ten exceed before, {spreads[1]:.1f} times after",
    "index of the singular value",
    "singular value",
    logy=True,
)
run.figure(ax.figure, "singular_values", caption="Muon levels the spectrum of the update.")

# %% [markdown]
# Does it pay? `kexa study muon` gives AdamW and Muon the same grid of learning rates, takes the
# best of each on a seed of its own, and then trains Muon with schedules of several lengths, so
# that every final loss is one after the decay. `muon-small-batch` is the same with 512 tokens a
# step, where a momentum holds more noise.

# %%
for name in ("muon", "muon-small-batch"):
    show(name, study_figures.optimizers)

# %% [markdown]
# ## What changes at full scale
#
# The same function runs the published numbers: 11T tokens at a base context of 8K with a peak
# learning rate of 3e-4 (`configs/full.toml`). Not published, and therefore chosen there: batch
# size, schedule lengths, mixtures, Muon's constants and the FP8 recipe. A gap between FP8 and
# BF16 seen over a few hundred steps says that nothing is broken; it does not bound the gap after
# a million steps. On a chip without FP8 it is emulated and saves neither time nor memory.

# %%
set_numerics(model, "fp32")
save_hf(model, run.dir / "model", vocabulary)
run.finish()
