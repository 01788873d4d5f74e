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
# # 3. Multi-token prediction: when does a free draft pay?
#
# K-EXAONE trains one extra block beside the main model that predicts the token *after* the next.
# It is 0.2% of the weights. In decoding it drafts a token that the main model then checks, two
# tokens for one call when the draft was right. **How often is it right, and how often must it be
# right to pay?**
#
# At position $t$ the block reads the main model's final hidden state $h_t$ and the embedding of
# the next token, and predicts $x_{t+2}$ through the main model's own head:
#
# $$z_t = W\,[\mathrm{RMSNorm}(\mathrm{Emb}(x_{t+1}))\,;\,\mathrm{RMSNorm}(h_t)], \qquad
# \mathcal L = \mathcal L_{\text{next}} + \lambda\,\mathcal L_{\text{MTP}},
# \quad \lambda = 0.05$$
#
# One layer with global attention and a dense feed-forward turns $z_t$ into that prediction.

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import functools
import math

import torch

from kexa import notebook, plot, runtime, tokenizer
from kexa.data import Mixture, encode, load_corpus
from kexa.model import KexaForCausalLM, ModelConfig, sample, sample_with_stats
from kexa.model.accounting import account, draft_break_even
from kexa.statistics import wilson
from kexa.train import build_optimizers, fit, wsd
from kexa.train.pretrain import stage_weights

run = notebook.begin("03_mtp", profile, seed, out_dir)
config, pretrain = run.config.mtp, run.config.pretrain

# %% [markdown]
# ## What the block sees
#
# Every line is one position. The main model predicts from the left column alone; the block gets
# one token more and predicts one token further.

# %%
words = ["the", "cat", "sat", "on", "the", "mat"]
print("hidden state of        and embedding of   predicts")
for t in range(len(words) - 2):
    print(f"{' '.join(words[: t + 1]):22s} {words[t + 1]:18s} {words[t + 2]}")

# %% [markdown]
# ## Training both at once
#
# A small model of the published shape learns from the foundation mixture of the pretraining stage.
# Documents are packed, and neither loss predicts across the end of one.

# %%
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
corpus = load_corpus(run.config.data)
streams = {name: encode(vocabulary, documents) for name, documents in corpus.train.items()}
weights = stage_weights(pretrain, "foundation", streams)
mixture = Mixture(streams, weights, pretrain.sequence_length, pretrain.batch_size, seed)


def batch(step):
    input_ids, document_ids = mixture.batch(step)
    return {"input_ids": input_ids, "document_ids": document_ids}


def loss_fn(model, batch):
    return model.loss(
        batch["input_ids"],
        batch["document_ids"],
        mtp_weight=pretrain.mtp_weight,
        balance_weight=pretrain.balance_weight,
    )


# %%
torch.manual_seed(seed)
model = KexaForCausalLM(run.config.model).to(run.device)
schedule = functools.partial(
    wsd,
    steps=config.steps,
    warmup_share=pretrain.warmup_share,
    decay_share=pretrain.decay_share,
)
losses = {"next token": [], "MTP": []}
for step in fit(
    model,
    build_optimizers(model, pretrain),
    batch,
    loss_fn,
    config.steps,
    schedule,
    balance_step=pretrain.balance_step,
):
    run.log("train", step.step, **step.losses)
    losses["next token"].append(step.losses["next_token"])
    losses["MTP"].append(step.losses["mtp"])

# %%
tenth = max(1, config.steps // 10)
begun = {name: sum(values[:tenth]) / tenth for name, values in losses.items()}
ended = {name: sum(values[-tenth:]) / tenth for name, values in losses.items()}
gap = ended["MTP"] - ended["next token"]
axes = plot.lines(
    {name: (range(config.steps), values) for name, values in losses.items()},
    title=f"Looking one token further costs {gap:.2f} nats at the end",
    xlabel="optimizer step",
    ylabel="training loss, nats per token",
    hlines={"uniform guess": math.log(run.config.model.vocab_size)},
)
run.figure(axes.figure, "loss", "Training loss of the main model and of the MTP block.")
run.value("MTP loss, last tenth", ended["MTP"], unit="nats/token")
run.value("next-token loss, last tenth", ended["next token"], unit="nats/token")

# %% [markdown]
# ## Drafting without loss
#
# A round of self-drafting: the block proposes a token, the main model reads the last token and the
# proposal in one call, and keeps the proposal $x$ with probability $\min(1, p(x)/q(x))$, where $p$
# is its own distribution and $q$ the block's; otherwise it draws from $\max(p - q, 0)$,
# normalised. The result is distributed as $p$ exactly. At temperature 0 this means: keep the
# proposal if it is the main model's own choice. Either way the round also yields the main model's
# next token, so it gives two tokens or one.
#
# Prompts are the first tokens of held-out documents, up to the same number from every category.

# %%
size = config.prompt_tokens
prompts, categories = [], []
for name, documents in corpus.heldout.items():
    tokens = encode(vocabulary, documents)
    starts = [
        int(s) for s, e in zip(tokens.offsets, tokens.offsets[1:], strict=False) if e - s > size
    ]
    for start in starts[: config.prompts]:
        prompts.append(tokens.tokens[start : start + size].tolist())
        categories.append(name)
print({name: categories.count(name) for name in corpus.heldout}, f"prompts of {size} tokens")


# %%
def draft(model, temperature):
    """Continuations of all prompts, and what became of each draft."""
    random = runtime.generator(seed, "drafts")
    return sample_with_stats(
        model,
        prompts,
        config.new_tokens,
        temperature,
        generator=random,
        batch_size=len(prompts),
    )


model.eval()
drafted, greedy = draft(model, temperature=0)
plain = sample(model, prompts, config.new_tokens, temperature=0, batch_size=len(prompts))
same = sum(a.tokens == b.tokens for a, b in zip(drafted, plain, strict=True))
print(f"{same} of {len(prompts)} greedy continuations are equal with and without drafting")
print(f"{greedy.main_calls} calls of the main model instead of {config.new_tokens}")

# %% [markdown]
# The batch ends with its slowest row, so the calls saved are fewer than the drafts accepted. That
# sampling keeps the distribution is tested exactly, on a vocabulary small enough to enumerate
# (`tests/model/test_drafting.py`).
#
# ## How often is a draft right?
#
# The same trunk with a fresh, untrained block shows what chance gives. The intervals are Wilson's
# for independent drafts; drafts within one text are not independent, so they are too narrow.

# %%
fresh = KexaForCausalLM(run.config.model).to(run.device).eval()
trunk = {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}
fresh.load_state_dict(trunk, strict=False)
outcomes = {
    "temperature 0": greedy.position_QT,
    "temperature 1": draft(model, temperature=1)[1].position_QT,
    "temperature 1, untrained block": draft(fresh, temperature=1)[1].position_QT,
}


# %%
def acceptance(outcome):
    """Share of accepted drafts, with its interval."""
    return wilson(int((outcome == 1).sum()), int((outcome >= 0).sum()))


overall = {label: acceptance(outcome) for label, outcome in outcomes.items()}
for label, share in overall.items():
    print(f"{label:32s}{share}")
    headline = label == "temperature 1"
    run.value(f"acceptance, {label}", share.estimate, note=str(share), headline=headline)

# %%
names = sorted(set(categories))
rows = {name: torch.tensor([c == name for c in categories]) for name in names}
shares = {
    label: [acceptance(outcome[rows[name]]) for name in names]
    for label, outcome in outcomes.items()
}
most, least = (pick(zip(shares["temperature 1"], names, strict=True)) for pick in (max, min))
axes = plot.grouped_bars(
    names,
    {label: [share.estimate for share in row] for label, row in shares.items()},
    title=f"At temperature 1, {least[0].estimate:.0%} ({least[1]}) to "
    f"{most[0].estimate:.0%} ({most[1]}) of the drafts are accepted",
    ylabel="share of drafts accepted",
    intervals={label: [share[1:] for share in row] for label, row in shares.items()},
)
run.figure(axes.figure, "acceptance", "Accepted drafts by category of the prompt.")

# %% [markdown]
# A small model is easy to draft for at temperature 1: its distributions are broad, close to word
# frequencies, and two broad distributions overlap. Temperature 0 asks for the same single token.
# Along the continuation:

# %%
width = max(1, config.new_tokens // 6)
edges = list(range(1, config.new_tokens - width + 1, width))  # the first new token is never a draft
along = {
    label: [acceptance(outcomes[label][:, edge : edge + width]) for edge in edges]
    for label in ("temperature 0", "temperature 1")
}
first, last = along["temperature 0"][0].estimate, along["temperature 0"][-1].estimate
axes = plot.lines(
    {label: (edges, [s.estimate for s in row]) for label, row in along.items()},
    title=f"Greedy acceptance goes from {first:.0%} to {last:.0%} along the continuation",
    xlabel="first new token of the interval",
    ylabel="share of drafts accepted",
    bands={label: ([s.low for s in row], [s.high for s in row]) for label, row in along.items()},
)
run.figure(axes.figure, "along", "Accepted drafts along the continuation.")

# %% [markdown]
# ## How often must it be right?
#
# Decoding is bound by what a call reads: weights, keys and values. A round of drafting reads the
# block and the head once more and shows the main model two tokens per row instead of one. It pays
# when the acceptance is above
#
# $$a^* = \frac{\mathrm{cost}(\text{main, 2 tokens}) + \mathrm{cost}(\text{MTP})}
# {\mathrm{cost}(\text{main, 1 token})} - 1, \qquad
# \mathrm{cost} = \max\Big(\text{bytes},\ \frac{\text{FLOPs}}{\text{FLOPs per byte}}\Big)$$
#
# In a dense model the second token is nearly free. In a mixture of experts it is not: two tokens
# read up to twice as many experts, until the batch is so large that every expert is read anyway.
# Where FLOPs are what binds, two tokens cost twice one and no draft can pay ($a^* > 1$). All of
# this is counted from shapes, for H100 cards (989 TFLOP/s in BF16, 3.35 TB/s): the published shape
# behind 4,096 tokens of context, this model behind the prompts above.

# %%
H100 = 989e12 / 3.35e12  # FLOPs per byte
published = ModelConfig(num_nextn_predict_layers=1)
batches = [2**i for i in range(12)]
here = functools.partial(
    draft_break_even, run.config.model, context=config.prompt_tokens, flops_per_byte=H100
)
need = {
    "published shape": [draft_break_even(published, size, 4096, H100) for size in batches],
    "this model": [here(size) for size in batches],
}
best, own = min(zip(need["published shape"], batches, strict=True)), here(len(prompts))

# %%
sampled, alone = overall["temperature 1"], need["published shape"][0]
axes = plot.lines(
    {label: (batches, values) for label, values in need.items()},
    title=f"Published shape: {alone:.0%} for one sequence, {best[0]:.0%} for {best[1]}",
    xlabel="sequences decoded together",
    ylabel="break-even acceptance",
    hlines={"acceptance of this model at temperature 1": sampled.estimate},
    logx=True,
)
run.figure(axes.figure, "break_even", "Acceptance that self-drafting needs, by batch size.")
run.value("break-even acceptance, published shape, one sequence", alone)
run.value("break-even acceptance, published shape, best batch", best[0], note=f"batch {best[1]}")
run.value("break-even acceptance, this model", own, note=f"batch {len(prompts)}, as decoded here")

# %% [markdown]
# A single reader of the published model thus gains little from drafting, a busy server much. In a
# model as small as ours the head is a large part of the weights, and every draft reads it once
# more, so its own break-even stays high at every batch size.

# %%
counts = {"published": account(published), "this model": account(run.config.model)}
for label, count in counts.items():
    print(
        f"{label:10s} MTP block {count.mtp / count.total:6.2%} of the main model's weights, "
        f"head {count.head / count.total:6.2%}"
    )

# %% [markdown]
# ## Checks

# %%
run.check(
    "the MTP loss falls by at least 1 nat per token",
    begun["MTP"] - ended["MTP"] >= 1,
    f"{begun['MTP']:.2f} to {ended['MTP']:.2f}, means of the first and last tenth of the steps",
)
run.check(
    "greedy tokens are the same with and without drafting",
    same == len(prompts),
    f"{same} of {len(prompts)} continuations of {config.new_tokens} tokens",
)

# %%
untrained = overall["temperature 1, untrained block"]
run.check(
    "drafts at temperature 1 are accepted more often than those of an untrained block "
    "(95% intervals apart)",
    sampled.low > untrained.high,
    f"{sampled} against {untrained}",
)
run.check(
    "acceptance at temperature 1 (lower end of its 95% interval) is above this model's own "
    "break-even at the batch size decoded here",
    sampled.low > own,
    f"{sampled} against {own:.3f} at batch {len(prompts)}",
)

# %% [markdown]
# ## What changes at full scale
#
# The block, its place and its loss weight are the published ones; acceptance is not: a large model
# is sure of more of its tokens, so its distributions are narrow and a draft is right where the text
# is predictable. The report gives no acceptance rate. What carries over is the curve of the
# break-even, since it comes from shapes: it says at which batch sizes to switch drafting on.

# %%
run.finish()
