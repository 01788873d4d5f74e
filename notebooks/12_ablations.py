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
# # 12. Ablations: what one change at a time does in a short run
#
# K-EXAONE combines a window of 128 tokens, RoPE in window layers only, QK-norm, one MTP block and
# two balancing rules. The report gives reasons for each (a small cache, extrapolation to long
# context, bounded logits, faster decoding, used experts) but no ablation. **Which of these
# choices shows in the loss or in the expert load of a short run?**
#
# Each variant differs from the base in one thing. For one seed all variants share initial values
# and batches, so the difference of held-out losses is paired:
#
# $$\Delta = \text{loss}(\text{variant}, \text{seed}) - \text{loss}(\text{base}, \text{seed})$$
#
# Losses are next-token losses, so dropping the MTP term is not rewarded by itself.

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import dataclasses

import torch

from kexa import notebook, plot, statistics, tokenizer
from kexa.data import encode, load_corpus
from kexa.parallel import beside
from kexa.train.ablation import run_variant, variants
from kexa.train.evaluation import held_out, unigram_entropy

run = notebook.begin("12_ablations", profile, seed, out_dir)
config, pretrain = run.config.ablation, run.config.pretrain

# %% [markdown]
# ## The base and its variants
#
# The base is the profile's model, made smaller so that many runs fit, on the foundation mixture.

# %%
base = dataclasses.replace(run.config.model, **config.model, layer_types=())
table = variants(base)
for variant in table:
    changes = {**variant.model, **variant.training}
    print(f"{variant.name:<16} {', '.join(f'{k} = {v}' for k, v in changes.items())}")

# %%
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
corpus = load_corpus(run.config.data)
streams = {name: encode(vocabulary, documents) for name, documents in corpus.train.items()}
sets = held_out(vocabulary, corpus.heldout, config.sequence_length, config.validation_rows, seed)
entropy = unigram_entropy(torch.cat([rows.targets for rows in sets.values()]))
tokens = config.steps * config.batch_size * config.sequence_length
print(f"{len(table)} variants x {config.seeds} seeds, {tokens:,} tokens each")

# %% [markdown]
# ## The runs
#
# They do not depend on each other, so on CPU cores every other one is made in a process beside
# this one. Each leaves its checkpoint, from which all are read back in order.

# %%
seeds = [seed + i for i in range(config.seeds)]
jobs = [(variant, s) for variant in table for s in seeds]


def arguments(variant, s):
    checkpoints = run.dir / "checkpoints" / f"{variant.name.replace(' ', '-')}-{s}"
    return variant, base, config, pretrain, streams, sets, s, run.device, checkpoints


with beside(run_variant, [arguments(*job) for job in jobs[1::2]], run.config.runtime, seed):
    for job in jobs[::2]:
        run_variant(*arguments(*job))
outcomes = {variant.name: [run_variant(*arguments(variant, s)) for s in seeds] for variant in table}
for name, results in outcomes.items():
    for s, outcome in zip(seeds, results, strict=True):
        run.log(name, s, loss=outcome.loss, busiest=outcome.busiest)
losses = {name: [outcome.loss for outcome in results] for name, results in outcomes.items()}

# %%
worst = max(max(values) for values in losses.values())
run.check(
    "every run learns: its held-out loss is below the unigram entropy of the same rows",
    worst < entropy,
    f"worst {worst:.3f}, entropy {entropy:.3f} nats",
)

# %% [markdown]
# ## Loss
#
# Bars are means over seeds, whiskers 95% t intervals of the paired difference. With few seeds
# they are wide, and they should be: a bar whose whisker crosses zero says nothing about the
# change.

# %%
effects = {
    name: statistics.paired_interval(losses["base"], values)
    for name, values in losses.items()
    if name != "base"
}
for name, effect in effects.items():
    run.value(f"loss difference, {name}", effect.estimate, unit="nats/token")
    each = ", ".join(f"{v - b:+.3f}" for v, b in zip(losses[name], losses["base"], strict=True))
    print(
        f"{name:<16} {effect.estimate:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]  seeds: {each}"
    )

# %%
clear = [name for name, effect in effects.items() if effect.low > 0 or effect.high < 0]
ax = plot.bars(
    {name: effect.estimate for name, effect in effects.items()},
    f"{len(clear)} of {len(effects)} changes move the loss beyond seed noise"
    + (f": {', '.join(clear)}" if clear else ""),
    "held-out loss minus base, nats per token",
    intervals={name: (effect.low, effect.high) for name, effect in effects.items()},
)
for i, name in enumerate(effects):
    points = [v - b for v, b in zip(losses[name], losses["base"], strict=True)]
    ax.scatter([i] * len(points), points, color="black", s=14, zorder=4)
run.figure(
    ax.figure,
    "loss_difference",
    caption="Paired loss difference of each change: bars are means, dots seeds, whiskers 95%.",
)
run.value("changes beyond seed noise", len(clear), unit=f"of {len(effects)}", headline=True)

# %% [markdown]
# ## Expert load
#
# Balancing is not meant to lower the loss but to keep every expert, and every device that holds
# one, in use. The measure is the load of a layer's busiest expert at the end of training, in
# units of its fair share.

# %%
load = {name: [outcome.busiest for outcome in results] for name, results in outcomes.items()}
means = {name: sum(values) / len(values) for name, values in load.items()}
ax = plot.bars(
    means,
    f"Without balancing the busiest expert has {means['no balancing']:.2f} times its share, "
    f"with it {means['base']:.2f}",
    "load of the busiest expert / fair share",
    baseline={"perfect balance": 1.0},
)
run.figure(
    ax.figure, "expert_load", caption="Load of the busiest expert at the end, mean over seeds."
)

# %%
pairs = list(zip(load["base"], load["no balancing"], strict=True))
run.value("busiest expert, base", means["base"], unit="of its fair share", headline=True)
run.value("busiest expert, no balancing", means["no balancing"], unit="of its fair share")
run.check(
    "balancing lowers the load of the busiest expert for every seed",
    all(balanced < free for balanced, free in pairs),
    "; ".join(f"{balanced:.2f} against {free:.2f}" for balanced, free in pairs),
)

# %% [markdown]
# ## What this can and cannot say
#
# These runs are short, the model is tiny and every row is shorter than a few windows. The reasons
# the report gives for its choices (extrapolation to 256K tokens, cache size, stability over
# millions of steps, decoding speed) do not show in the loss of such a run, so an absent
# difference here is no evidence against a choice. What transfers is the method: same data, same
# initial values, several seeds, intervals of paired differences. At full scale the same notebook
# runs the `full` profile's ablation section.

# %%
run.finish()
