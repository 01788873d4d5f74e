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
# # 5. Context extension: two stages, ended by a gate, teach the global layers to reach
#
# K-EXAONE is pretrained at 8K tokens and then extended to 32K and to 256K. Both stages mix three
# components: rehearsal of short data, synthetic reasoning, and long documents that are not cut;
# their shares change between the stages. No position encoding is rescaled. Training goes on until
# a needle in a haystack is found near-perfectly at every length: the "green light".
#
# **Does that recipe carry retrieval from the pretraining length to lengths never trained before,
# and what does it cost at short range?** Lengths here are hundreds of tokens instead of hundreds
# of thousands; the recipe is the same.

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
from kexa import notebook, plot, tokenizer
from kexa.data import encode, load_corpus
from kexa.interop import load_hf, save_hf
from kexa.longctx import StageBatches, niah, train_stage
from kexa.longctx.extension import COMPONENTS, loss_by_position
from kexa.train import set_numerics
from kexa.train.checkpoint import identity
from kexa.train.evaluation import held_out, pooled, validate
from kexa.train.pretrain import stage_weights, training_streams

run = notebook.begin("05_context_extension", profile, seed, out_dir)
config, pretrain = run.config.extension, run.config.pretrain

# %% [markdown]
# ## Only global layers can carry a needle
#
# A window layer sees `sliding_window` keys. However many of them lie below it, a layer stack of
# windows alone moves information at most (window - 1) tokens per layer; whatever comes from
# further back came through a global layer, which has no position encoding to outgrow.

# %%
model_config = run.config.model
windows = model_config.layer_types.count("sliding_attention")
reach = windows * (model_config.sliding_window - 1)
stages = config.stages
target = max(stage.sequence_length for stage in stages.values())
print(f"layers: {windows} window, {len(model_config.layer_types) - windows} global")
print(f"window layers together reach back {reach} tokens; the extended length is {target}")
print(f"needle probes at {', '.join(map(str, config.probe_lengths))} tokens")

# %%
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
model = load_hf(notebook.require(run, "04_pretraining") / "model").to(run.device)
set_numerics(model, config.numerics)
corpus = load_corpus(run.config.data)
held = encode(vocabulary, corpus.heldout[config.haystack])

# %% [markdown]
# ## What a needle is
#
# One line of held-out text states a fact, the end asks for it; prompt and answer together have
# exactly the stated number of tokens. The keys are words that no training document uses as keys,
# text comes from held-out documents, values are drawn afresh: what can be learned in training is
# the skill, not the answers. Only the exact value counts; a guess is right once in
# $10^{\text{digits}}$ times.

# %%
[example] = niah.make_tasks(
    vocabulary, held, config.probe_lengths[0], 0.5, 1, seed, digits=config.digits
)
print(vocabulary.decode(example.prompt, skip_special_tokens=False))
print("-> must continue with:", vocabulary.decode(example.answer))
print(f"{len(example.prompt)} + {len(example.answer)} tokens")

# %% [markdown]
# The grid crosses depth (where in the text the needle stands) with length. The tasks of the maps
# below are the same before and after; those of the gate are others, drawn anew in every round, so
# that repeating until green cannot select a lucky set.


# %%
def probe(tasks_seed: int, lengths=config.probe_lengths, distractors: int = 0) -> niah.Grid:
    return niah.measure(
        model, vocabulary, held, lengths, config.probe_depths, config.probe_trials,
        tasks_seed, config.digits, distractors,
    )  # fmt: skip


def heat_map(grid: niah.Grid, when: str) -> None:
    accuracy = grid.at(target)
    ax = plot.heatmap(
        grid.accuracy,
        f"{when.capitalize()}: {accuracy.estimate:.0%} of needles found at {target} tokens",
        "length (tokens)",
        "depth of the needle (0 = beginning)",
        xticks=grid.lengths,
        yticks=grid.depths,
        unit=f"share found, {grid.trials} tasks a cell",
        vmin=0.0,
        vmax=1.0,
    )
    caption = f"Needle in a haystack, {when}. Pooled at {target} tokens: {accuracy}."
    run.figure(ax.figure, f"niah_{when.replace(' ', '_')}", caption=caption)


# %%
MAPS = 1_000_000 + seed  # tasks of the maps; the gate's tasks have seeds of their own
before = probe(MAPS)
hard_before = probe(MAPS, (target,), config.probe_distractors).at(target)
heat_map(before, "before extension")

# %% [markdown]
# What must not get lost is measured beside it: the loss on short held-out text, with the protocol
# of pretraining, and the loss by position in documents longer than the model has seen.

# %%
short = held_out(
    vocabulary, corpus.heldout, pretrain.sequence_length, pretrain.validation_rows, seed
)
natural = [text for texts in corpus.heldout.values() for text in texts]
long_held = encode(vocabulary, natural)
BINS = 16


def positions():
    return loss_by_position(model, long_held, target, config.position_rows, BINS)


short_before, positions_before = validate(model, short), positions()
print(f"short-context loss before: {pooled(short_before, short):.3f} nats/token")

# %% [markdown]
# ## The mixture of a stage
#
# Rehearsal continues the last pretraining mixture. Synthetic reasoning is retrieval: text with
# facts in it and questions at its end, in documents from `shortest` tokens up to a whole row,
# where only answers are targets. A long document is a whole document in a row of its own, never
# cut. The loss is the mean over the three components, weighted by their rows.

# %%
streams = training_streams(vocabulary, corpus, pretrain, seed, run.dir / "tokens")
rehearsal = stage_weights(pretrain, list(pretrain.mixtures)[-1], streams)
batches = {
    name: StageBatches(vocabulary, streams, rehearsal, tuple(corpus.train), config, stage, seed + i)
    for i, (name, stage) in enumerate(stages.items())
}
for name, stage in stages.items():
    rows = ", ".join(f"{stage.rows[c] / sum(stage.rows.values()):.0%} {c}" for c in COMPONENTS)
    print(f"{name:<7} {stage.sequence_length:>6} tokens, {stage.steps} steps a round ", end="")
    print(f"at {stage.learning_rate:g}: {rows}")

# %% [markdown]
# ## Train, probe, repeat until green
#
# $$\text{green} \iff \text{accuracy}(n) \ge \theta
# \quad \text{for every probed length } n \le \text{the stage's length}$$
#
# The threshold is not published; `threshold` is chosen. A round that leaves the gate red is
# followed by another one, until `rounds` is used up. The second stage has a lower learning rate:
# it carries further what the first has taught, and a high rate would undo that.


# %%
def train(name: str):
    rounds = train_stage(
        model, batches[name], config, name,
        probe=lambda number: probe(1000 * seed + 100 * list(stages).index(name) + number),
        directory=run.dir / "checkpoints",
        identity=identity(
            model=run.config.model, extension=config, pretrain=pretrain, data=run.config.data,
            tokenizer=run.config.tokenizer, stage=name, seed=seed,
        ),
    )  # fmt: skip
    for r in rounds:
        for step in r.steps:
            run.log(f"{name} {r.number}", step.step, **step.losses)
        colour = "green" if r.verdict.green else "red"
        print(f"{name} stage, round {r.number}: {colour}, ", end="")
        print(f"worst at {r.verdict.length} tokens: {r.verdict.accuracy}")
        yield r


# %%
history, maps = [], {"before extension": before}
for name in stages:
    history += train(name)
    maps[f"after the {name} stage"] = probe(MAPS)
    heat_map(maps[f"after the {name} stage"], f"after the {name} stage")

# %% [markdown]
# The two components that retrieval is learned from and protected by:


# %%
def curve(component, window=10):
    values = [step.losses[component] for r in history for step in r.steps]
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    return range(len(means)), means


ends = [sum(len(r.steps) for r in history[: i + 1]) for i in range(len(history))]
first, last = curve("reasoning")[1][0], curve("reasoning")[1][-1]
ax = plot.lines(
    {
        "rehearsal": curve("rehearsal"),
        "long documents": curve("long"),
        "answers": curve("reasoning"),
    },
    f"The loss on answers goes from {first:.2f} to {last:.2f} nats per token",
    "optimizer step",
    "nats per target (mean of 10 steps)",
)
for end in ends:
    ax.axvline(end, color="0.7", linewidth=0.8)
run.figure(ax.figure, "loss", caption="Loss by component; grey lines end a round.")

# %% [markdown]
# ## Did it work?

# %%
after = maps[f"after the {list(stages)[-1]} stage"]
hard_after = probe(MAPS, (target,), config.probe_distractors).at(target)
series, bands = {}, {}
for when, grid in maps.items():
    accuracies = [grid.at(n) for n in grid.lengths]
    series[when] = (grid.lengths, [a.estimate for a in accuracies])
    bands[when] = ([a.low for a in accuracies], [a.high for a in accuracies])
ax = plot.lines(
    series,
    f"At {target} tokens {before.at(target).estimate:.0%} of needles were found before, "
    f"{after.at(target).estimate:.0%} after",
    "length (tokens, logarithmic)",
    "share of needles found",
    bands=bands,
    hlines={"guessing": 10.0**-config.digits},
    logx=True,
)
run.figure(ax.figure, "niah_by_length", caption="NIAH pooled over depths, 95% Wilson intervals.")

# %% [markdown]
# A stage may reach further than it trained: with no positions to outgrow, a global layer that has
# learned what to look for only has to find it among more tokens.

# %%
for name, stage in stages.items():
    untrained = [n for n in before.lengths if n > stage.sequence_length]
    for n in untrained:
        print(f"{name} stage, {stage.sequence_length} tokens at most, probed at {n}: ", end="")
        print(maps[f"after the {name} stage"].at(n))

# %%
found, found_before = after.at(target), before.at(target)
run.value(f"NIAH at {target} tokens before", found_before.estimate, note=str(found_before))
run.value(f"NIAH at {target} tokens after", found.estimate, note=str(found), headline=True)
run.check(
    f"NIAH accuracy at the extended length ({target} tokens) is above 0.8",
    found.estimate > 0.8,
    str(found),
)
run.check(
    "NIAH accuracy at the extended length is above its value before extension, "
    "by more than both 95% intervals",
    found.low > found_before.high,
    f"{found_before} before, {found} after",
)

# %%
for name, stage in stages.items():
    final = [r for r in history if r.stage == name][-1]
    run.value(f"rounds of the {name} stage", final.number)
    run.check(
        f"the gate of the {name} stage is green: at least {config.threshold:.0%} of needles found "
        f"at every length up to {stage.sequence_length}",
        final.verdict.green,
        f"round {final.number}, worst at {final.verdict.length} tokens: {final.verdict.accuracy}",
    )

# %% [markdown]
# A single needle can be found by its form alone. With further facts in the text the key has to be
# compared, and its words were in no question of the training: the harder task, measured but not
# part of the gate.

# %%
for when, accuracy in {"before": hard_before, "after": hard_after}.items():
    name = f"multi-key NIAH at {target} tokens {when}"
    run.value(name, accuracy.estimate, unit="share", note=str(accuracy))
    print(f"{name} extension, {config.probe_distractors} distractors: {accuracy}")

# %% [markdown]
# ## What it cost at short range

# %%
short_after, positions_after = validate(model, short), positions()
short_loss = pooled(short_before, short), pooled(short_after, short)
rise = short_loss[1] / short_loss[0] - 1
ax = plot.grouped_bars(
    list(short),
    {"before extension": list(short_before.values()), "after": list(short_after.values())},
    f"Short-context loss {'rises' if rise > 0 else 'falls'} by {abs(rise):.1%}",
    "nats per token",
)
run.figure(ax.figure, "short_context", caption="Held-out loss at the pretraining length.")
run.value("short-context loss before", short_loss[0], unit="nats/token")
run.value("short-context loss after", short_loss[1], unit="nats/token")
run.check(
    f"short-context validation loss rises by at most {config.short_rise:.0%}",
    rise <= config.short_rise,
    f"{short_loss[0]:.3f} before, {short_loss[1]:.3f} after: {rise:+.2%}",
)

# %%
width = target // BINS
beyond = slice(pretrain.sequence_length // width, None)
gains = (positions_before - positions_after)[beyond].mean()
ax = plot.lines(
    {
        "before extension": ([i * width for i in range(BINS)], positions_before),
        "after": ([i * width for i in range(BINS)], positions_after),
    },
    f"Beyond the pretraining length, long documents {'gain' if gains > 0 else 'lose'} "
    f"{abs(gains):.2f} nats per token",
    "position in the document (tokens)",
    "nats per token",
)
ax.axvline(pretrain.sequence_length, color="0.7", linewidth=0.8)
caption = "Loss on held-out long documents; the grey line is the pretraining length."
run.figure(ax.figure, "loss_by_position", caption=caption)
run.value("gain beyond the pretraining length", float(gains), unit="nats/token")

# %% [markdown]
# ## What changes at full scale
#
# `configs/full.toml` runs the same two stages from 8K to 32K and 256K. Reported: lengths, the
# three components, their re-weighting, the gate and the short-context evaluation after every
# stage. Not reported and chosen there: shares, steps, learning rate and threshold. At this size
# pretraining has shown the model few questions about its own text, so extension teaches
# retrieval itself and not only its range; a large model comes with the skill.

# %%
set_numerics(model, "fp32")
save_hf(model, run.dir / "model", vocabulary)
run.finish()
