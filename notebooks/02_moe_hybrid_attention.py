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
# # 2. Architecture: 236B parameters that cost 23B, 256K tokens that cost a quarter of the cache
#
# Two ideas keep K-EXAONE affordable. A **mixture of experts** stores 128 feed-forward networks per
# layer and uses 8 of them per token. **Hybrid attention** lets 36 of 48 layers look back 128 tokens
# only, and 12 look back over everything. **What does each idea need in order to work, and what does
# it save?**
#
# Every layer is pre-norm, and the first feed-forward is dense for stability:
#
# $$x \mathrel{+}= \mathrm{Attention}(\mathrm{RMSNorm}(x)), \qquad
# x \mathrel{+}= \mathrm{FFN}(\mathrm{RMSNorm}(x))$$

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import functools
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.ticker import NullLocator

from kexa import notebook, plot, tokenizer
from kexa.config import ROOT, load
from kexa.data import Mixture, encode, load_corpus
from kexa.interop import save_hf
from kexa.kernels import attention, check, costs
from kexa.kernels.attention import reference
from kexa.model import KexaForCausalLM, accounting
from kexa.model.moe import SparseMoE
from kexa.model.reach import reach
from kexa.train import build_optimizers, fit, wsd

run = notebook.begin("02_moe_hybrid_attention", profile, seed, out_dir)
config = run.config.architecture
small = replace(run.config.model, num_nextn_predict_layers=0, **config.model)  # MTP: notebook 3

# %% [markdown]
# ## The router: a bias that selects but does not weigh
#
# Each token $u$ scores every expert, takes the $K$ best and mixes their outputs; a shared expert
# sees every token:
#
# $$s_i = \sigma(u^\top e_i), \quad S = \mathrm{TopK}_i(s_i + b_i), \quad
# g_i = 2.5\,\frac{s_i}{\sum_{j \in S} s_j}, \quad
# y = \sum_{i \in S} g_i E_i(u) + E_\text{shared}(u)$$
#
# The bias $b$ is in the selection and nowhere else. Push one token's weakest expert into its
# selection and look at the weights:

# %%
torch.manual_seed(seed)
moe = SparseMoE(small)
torch.nn.init.normal_(moe.gate.weight)
token = torch.randn(1, small.hidden_size) / small.hidden_size**0.5
scores = moe.gate(token)
weakest = int(scores.argmin())
for bias in (0.0, 1.0):
    moe.e_score_correction_bias[weakest] = bias
    chosen = moe.route(scores).chosen_NK[0].sort().values
    weights = scores[0, chosen] / scores[0, chosen].sum() * small.routed_scaling_factor
    print(f"bias {bias:.0f} on expert {weakest}: experts {chosen.tolist()}", end=", weights ")
    print([round(w, 3) for w in weights.tolist()])

# %% [markdown]
# The forced expert's weight comes from its own low score: balancing changes *who* computes, never
# *how much* a score counts. That is why a bias may be strong where an auxiliary loss, whose
# gradient competes with the task's, has to be weak.
#
# Routing is **dropless**: no expert has a capacity, every chosen pair of token and expert is
# computed. Sorted by expert, the rows of a batch form ragged groups. Some may be empty; a kernel
# has to live with that.

# %%
moe.e_score_correction_bias.zero_()
batch = torch.randn(512, small.hidden_size)
chosen = moe.route(moe.gate(batch)).chosen_NK
groups = chosen.flatten().bincount(minlength=small.num_experts)
print("rows per expert:", groups.tolist())
run.check(
    "no token is dropped: the groups hold every chosen pair",
    int(groups.sum()) == 512 * small.num_experts_per_tok,
    f"{int(groups.sum())} rows for {512 * small.num_experts_per_tok} pairs",
)

# %% [markdown]
# ## Left alone, the router overloads some experts
#
# An expert that is used learns, and one that learns is used more. Two counterweights, both on all
# through training (reported: strength 1e-4 each): after every step the bias moves against the
# load $c_i$, and a sequence-level loss punishes rows whose probability mass $P_i$ goes where the
# tokens $f_i$ already go.
#
# $$b_i \leftarrow b_i + \gamma\,\mathrm{sign}(\bar c - c_i), \qquad
# \mathcal L_\text{bal} = \alpha \sum_i f_i P_i$$
#
# The same model is trained twice from the same initial weights on the same batches, with and
# without both.

# %%
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
streams = {}
for category, documents in load_corpus(run.config.data).train.items():
    sizes = itertools.accumulate(len(d.text.encode()) for d in documents)
    kept = [
        d for d, size in zip(documents, sizes, strict=True) if size <= config.bytes_per_category
    ]
    streams[category] = encode(vocabulary, kept or documents[:1])
mixture = Mixture(
    streams, dict.fromkeys(streams, 1.0), config.sequence_length, config.batch_size, seed
)


# %%
def train(balance_step: float, balance_weight: float, description: str):
    torch.manual_seed(seed)
    model = KexaForCausalLM(small).to(run.device)

    def batch_at(step):
        return dict(zip(("input_ids", "document_ids"), mixture.batch(step), strict=True))

    def loss_fn(model, batch):
        return model.loss(batch["input_ids"], batch["document_ids"], balance_weight=balance_weight)

    schedule = functools.partial(wsd, steps=config.steps, warmup_share=0.05, decay_share=0.2)
    steps = fit(
        model, build_optimizers(model, config), batch_at, loss_fn, config.steps, schedule,
        balance_step=balance_step, description=description,
    )  # fmt: skip
    records = list(steps)
    for record in records:
        run.log(description, record.step, **record.losses)
    load = torch.tensor([record.expert_load for record in records]).float()  # step, layer, expert
    return model, load / load.sum(-1, keepdim=True), records


model, balanced, balanced_records = train(config.balance_step, config.balance_weight, "balanced")
_, free, free_records = train(0.0, 0.0, "unbalanced")


# %% [markdown]
# The load of the busiest expert sets the pace of a layer that is spread over machines: everybody
# waits for it. It is drawn against the mean load, and beside it who does the work at the end.


# %%
def busiest(load, window=10):
    """Busiest expert over the mean load, mean of layers, smoothed over steps."""
    ratio = (load.amax(-1) * small.num_experts).mean(1)
    return ratio.unfold(0, min(window, len(ratio)), 1).mean(1)


last = max(1, config.steps // 5)
curves = {"without balancing": busiest(free), "bias and balance loss": busiest(balanced)}
ends = {
    name: float(load[-last:].amax(-1).mean()) * small.num_experts
    for name, load in (("free", free), ("balanced", balanced))
}
figure, (left, right) = plot.panels(2, width=5.6)
plot.lines(
    {name: (range(len(curve)), curve.tolist()) for name, curve in curves.items()},
    "Busiest expert at the end:\n"
    f"{ends['balanced']:.2f}x the mean load, without balancing {ends['free']:.2f}x",
    "optimizer step",
    "busiest expert / mean load",
    hlines={"perfect balance": 1.0},
    ax=left,
)
shown = min(8, small.num_experts)
shares = {
    name: load[-last:, 0].mean(0).sort(descending=True).values[:shown].tolist()
    for name, load in (("without balancing", free), ("bias and balance loss", balanced))
}
plot.grouped_bars(
    [f"{i + 1}." for i in range(shown)],
    shares,
    "First sparse layer: share of each expert,\nbusiest first, last fifth of the run",
    "share of token-expert pairs",
    baseline={"perfect balance": 1 / small.num_experts},
    ax=right,
)
run.figure(figure, "expert_load", caption="Expert load with and without balancing, same batches.")

# %%
for name, ratio in ends.items():
    run.value(f"busiest expert over mean load, {name}", ratio, headline=name == "balanced")
for name, records in (("balanced", balanced_records), ("free", free_records)):
    mean = sum(r.losses["next_token"] for r in records[-last:]) / last
    run.value(f"training loss at the end, {name}", mean, unit="nats/token", note="last fifth")
    print(f"{name:9s} training loss {mean:.3f} nats/token")
run.check(
    "balancing brings the busiest expert closer to the mean load",
    ends["balanced"] < ends["free"],
    f"{ends['balanced']:.2f} against {ends['free']:.2f}",
)

# %% [markdown]
# One seed, so the difference of the losses above says nothing; the ablations (notebook 12) pair
# several. A short run needs a larger bias step than the published 1e-4, which is meant for hundreds
# of thousands of steps: over 1,000 of those a bias can move by 0.1 in all.
#
# ## Three window layers, one global layer
#
# Which token sees which? Ask the model itself: feed distinct tokens, and see which embeddings the
# gradient of a hidden state reaches. A window layer reaches $W$ keys, its own included; three of
# them reach $3(W - 1) + 1$, since information hops; the global layer reaches everything.

# %%
W = small.sliding_window
T = 4 * W


def stack(pattern: str, **changes) -> KexaForCausalLM:
    torch.manual_seed(seed)
    return KexaForCausalLM(
        replace(
            small,
            num_hidden_layers=len(pattern),
            sliding_window_pattern=pattern,
            layer_types=(),
            vocab_size=max(small.vocab_size, T),
            **changes,
        )
    ).to(run.device)


documents = (torch.arange(T) >= T // 3).long()
seen = {name: reach(stack(name), T) for name in ("L", "LLL", "LLLG")}
seen["LLLG, two documents"] = reach(stack("LLLG"), T, documents)

# %%
widths = {name: int(matrix[-1].sum()) for name, matrix in seen.items()}
figure, axes = plot.panels(4, width=3.6)
ticks = [t if t % W == 0 else "" for t in range(T)]
for ax, (name, matrix) in zip(axes, seen.items(), strict=True):
    title = f"{name}\nlast token sees {widths[name]} of {T}"
    plot.heatmap(matrix.int(), title, "key token", "query token", ticks, ticks, "reached", ax=ax)
    ax.tick_params(length=0)
run.figure(figure, "reach", caption="Which token's embedding each hidden state depends on.")

# %%
run.check("one window layer sees exactly the window", widths["L"] == W, f"{widths['L']} keys")
run.check(
    "three window layers see 3(W - 1) + 1 tokens", widths["LLL"] == 3 * W - 2, f"{widths['LLL']}"
)
run.check("one global layer completes the view", widths["LLLG"] == T, f"{widths['LLLG']} of {T}")
crossing = int(seen["LLLG, two documents"][documents[:, None] != documents[None, :]].sum())
run.check("packed documents never see each other", crossing == 0, f"{crossing} pairs cross")

# %% [markdown]
# ## Positions live in the window layers only
#
# Rotary embeddings (RoPE) turn queries and keys by their position, and only window layers use them.
# A global layer then has no idea of order: shuffle the earlier tokens and its last output stays
# the same. What it cannot know it cannot get wrong either: no distance is ever longer than those
# seen in training, which is what lets the context be extended (notebook 5).

# %%
tokens = torch.randperm(small.vocab_size, generator=torch.Generator().manual_seed(seed))[:W]
shuffled = torch.cat([tokens[:-1].flip(0), tokens[-1:]])  # all within one window
replaced = torch.cat([tokens[1:2], tokens[1:]])  # another first token


@torch.no_grad()
def last_output_moves(pattern: str, other: torch.Tensor) -> float:
    layer = stack(pattern).double().eval()
    before, after = (layer.hidden_states(t[None].to(run.device))[0, -1] for t in (tokens, other))
    return float((before - after).abs().max())


moves = {}
for pattern, name in (("G", "global layer, no positions"), ("L", "window layer with RoPE")):
    moves[pattern] = [last_output_moves(pattern, other) for other in (shuffled, replaced)]
    print(f"{name:27s} earlier tokens shuffled: {moves[pattern][0]:.0e}", end=", ")
    print(f"first token replaced: {moves[pattern][1]:.0e}")
run.check(
    "a global layer sees every token but not their order; a window layer sees both",
    moves["G"][0] < 1e-6 < min(moves["G"][1], *moves["L"]),
    f"shuffling moves the global layer by {moves['G'][0]:.0e}",
)

# %% [markdown]
# ## QK-norm: attention logits cannot run away
#
# Queries and keys pass an RMSNorm per head before RoPE. By Cauchy-Schwarz no logit can then exceed
# $\sqrt{K}$ times the norms' weights, however large the projections grow in training; without it
# logits grow with the square of the weights, until softmax is an argmax and stops learning.

# %%
x = torch.randn(1, 64, small.hidden_size, generator=torch.Generator().manual_seed(seed))
x = x.to(run.device)


@torch.no_grad()
def largest_logit(use_qk_norm: bool, growth: float) -> float:
    layer = stack("G", use_qk_norm=use_qk_norm).model.layers[0].self_attn
    heads = (1, 64, -1, small.head_dim)
    q = layer.q_norm(layer.q_proj(x).mul(growth).view(heads)).transpose(1, 2)
    k = layer.k_norm(layer.k_proj(x).mul(growth).view(heads)).transpose(1, 2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return float((q @ k.mT).abs().max()) / small.head_dim**0.5


growths = [2.0**n for n in range(6)]
logits = {flag: [largest_logit(flag, g) for g in growths] for flag in (True, False)}
bound = small.head_dim**0.5

# %%
ax = plot.lines(
    {"with QK-norm": (growths, logits[True]), "without": (growths, logits[False])},
    f"Weights {growths[-1]:.0f}x larger: logits {logits[True][-1] / logits[True][0]:.2f}x with "
    f"QK-norm, {logits[False][-1] / logits[False][0]:.0f}x without",
    "growth of the query and key projections",
    "largest attention logit",
    hlines={"bound sqrt(K)": bound},
    logx=True,
    logy=True,
)
run.figure(ax.figure, "qk_norm", caption="Largest attention logit as the projections grow.")
run.check(
    "with QK-norm no logit exceeds sqrt(K)",
    max(logits[True]) <= bound * (1 + 1e-5),
    f"{max(logits[True]):.2f} against {bound:.2f}",
)

# %% [markdown]
# ## What the window saves
#
# Keys and values of the published model, in BF16. A window layer keeps 128 tokens however long the
# text is, so only 12 of 48 layers grow.

# %%
full = load("full").model
dense = replace(full, sliding_window_pattern="G", layer_types=())
lengths = [2**n for n in range(7, 19)]
gib = {
    "all 48 layers global": [accounting.kv_cache_bytes(dense, n) / 2**30 for n in lengths],
    "36 window, 12 global": [accounting.kv_cache_bytes(full, n) / 2**30 for n in lengths],
}
all_global, hybrid = (series[-1] for series in gib.values())
ax = plot.lines(
    {name: (lengths, series) for name, series in gib.items()},
    f"At 256K tokens the hybrid cache is {hybrid:.1f} GiB instead of {all_global:.0f} GiB",
    "tokens in context",
    "keys and values of one sequence, GiB",
    logx=True,
    logy=True,
)
run.figure(
    ax.figure, "kv_cache", caption="BF16 cache of the published model against context length."
)
run.value("KV cache at 256K, hybrid", hybrid, unit="GiB", headline=True)
run.value("KV cache at 256K, all layers global", all_global, unit="GiB")

# %% [markdown]
# ## The published model, counted
#
# The `full` profile builds the same classes on the meta device, where tensors have shapes and no
# memory. The counts are those of the published checkpoint; the routers' correction biases, stored
# but not trained by gradients, are among them.

# %%
with torch.device("meta"):
    giant = KexaForCausalLM(full)
stored = sum(p.numel() for p in giant.parameters())
stored += sum(layer.e_score_correction_bias.numel() for layer in giant.moe_layers)
mtp = sum(p.numel() for p in giant.mtp.parameters())
counts = accounting.account(full)
flops = accounting.training_flops(accounting.REPORTED_ACTIVE, 11e12)

# %%
run.value("parameters of the main model", stored - mtp, headline=True)
run.value("active parameters per token", counts.active, headline=True)
for claim, measured, expected in (
    ("the main model has 236,571,156,352 parameters", stored - mtp, 236_571_156_352),
    ("the MTP block has 528,513,280", mtp, 528_513_280),
    ("the formula from the config alone agrees", counts.total, stored - mtp),
    ("36 window layers", counts.window_layers, 36),
    ("12 global layers", counts.global_layers, 12),
    ("a token costs 48 KiB of global cache", counts.kv_bytes_per_token_global, 48 * 1024),
):
    run.check(claim, measured == expected, f"{measured:,}")
run.check(
    "about 22.7B are active", round(counts.active / 1e9, 1) == 22.7, f"{counts.active / 1e9:.2f}B"
)
run.check("11T tokens cost 1.52e24 FLOPs", f"{flops:.2e}" == "1.52e+24", f"{flops:.3e}")

# %% [markdown]
# ## The same function as the public implementation
#
# `transformers` has an inference implementation of this architecture. The model trained above is
# saved in the published checkpoint layout and loaded there, with a selection bias that training
# has moved, on a text of several windows, in double precision.

# %%
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
save_hf(model.double().eval(), run.dir / "model")
theirs = AutoModelForCausalLM.from_pretrained(
    run.dir / "model",
    dtype=torch.float64,
    experts_implementation="eager",
    attn_implementation="sdpa",
).to(run.device)
text = mixture.batch(0)[0][:1, : 5 * W + 3].to(run.device)
with torch.no_grad():
    ours = model(text)
    difference = float((ours - theirs(text).logits).abs().max())
moved_bias = max(float(layer.e_score_correction_bias.abs().max()) for layer in model.moe_layers)
print(f"largest selection bias {moved_bias:.3f}; logits spread over {float(ours.std()):.2f}")
run.check("logits equal transformers' to 1e-9", difference < 1e-9, f"{difference:.0e} apart")

# %% [markdown]
# ## Kernels: count first
#
# Before a kernel is written, its bytes and FLOPs say what it can reach. An H100 does 989 TFLOP/s
# in BF16 and reads 3.35 TB/s, so an operation needs 295 FLOPs per byte before arithmetic, and not
# memory, is what it waits for. The published shapes, forward, one row of 8,192 tokens:

# %%
heads = (full.num_attention_heads, full.num_key_value_heads, full.head_dim)
tokens = 8192
rows = tokens * full.num_experts_per_tok
work = {
    "window attention": costs.attention(tokens, *heads, window=full.sliding_window),
    "global attention": costs.attention(tokens, *heads, window=tokens),
    "experts' up product": costs.grouped_gemm(
        rows, full.hidden_size, 2 * full.moe_intermediate_size, full.num_experts
    ),
    "head and its loss": costs.linear_cross_entropy(tokens, full.hidden_size, full.vocab_size),
    "RMSNorm": costs.rms_norm(tokens, full.hidden_size),
    "experts' SwiGLU": costs.swiglu(rows, full.moe_intermediate_size),
}
ridge = costs.H100_FLOPS / costs.H100_BYTES
print("operation            TFLOP     GB   FLOP/byte   bound by     least time on an H100")
for name, cost in work.items():
    bound_by = "arithmetic" if cost.intensity > ridge else "memory"
    print(
        f"{name:20s} {cost.flops / 1e12:5.2f} {cost.bytes / 1e9:6.2f} {cost.intensity:11.0f}   "
        f"{bound_by:10s} {cost.least_seconds() * 1e6:8.0f} us"
    )

# %% [markdown]
# So the window kernel must read each key once and never store a score; the global one must keep
# the tensor cores busy; and the experts sit near the ridge, which is why they want many tokens. The
# head's loss is arithmetic as long as no logit is written: 8,192 times 153,600 of them are 5 GB in
# fp32, so the kernel keeps a tile of them in registers and leaves one log-sum-exp per row and tile.
# Norm and SwiGLU are bytes and nothing else: one kernel each, so that nothing in between is stored.
#
# The definition, which the tests trust:

# %%
print(inspect.getsource(reference.attention))

# %% [markdown]
# And the heart of the forward kernel. It walks over the key tiles of a query tile, from the
# window's start to the diagonal, and keeps a running maximum `m` and sum `total` (online
# softmax), so
# the work is the window's and not the sequence's:

# %%
source = Path(attention.__file__).with_name("triton.py").read_text(encoding="utf-8")
kernel = source[source.index("def _forward(") : source.index("def _backward_q(")]
loop = kernel[kernel.index("    for start in") : kernel.index("    total = tl.where(query")]
print(inspect.cleandoc("\n" + loop))

# %% [markdown]
# Read it as the definition with its loop turned around: `score` is one tile of $qk^\top$ in base 2,
# `shrink` corrects what was summed under an older maximum, and `_visible` is the mask of the figure
# above. Two more kernels walk the same tiles for the gradients. The grouped product finds its
# expert by a prefix sum over the offsets, inside the kernel, so the host never waits for the
# routing. The experts' kernels also fetch the rows of their tokens, apply SwiGLU and bring weighed
# rows back themselves, so that no gathered copy is ever stored.
#
# Without a GPU they are tested all the same: Triton's interpreter runs them here, on shapes that
# no tile divides, with packed documents and empty experts, against the reference in fp64. Every
# operation of training is checked forward and in every gradient, FP8 as the three products (output
# and both gradients) of equal codes; decoding has no gradient. The unit tests add planted faults
# that must be caught.

# %%
if importlib.util.find_spec("triton"):
    checked = subprocess.run(
        [sys.executable, "-m", "kexa.kernels.check"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(checked.stdout or checked.stderr)
    run.check(
        "interpreted kernels equal their references on odd shapes",
        checked.returncode == 0,
        f"{checked.stdout.count('right')} of {len(check.OPERATIONS)} operations",
    )
else:
    print("Triton has no build for this system: its kernels are not checked here")

# %% [markdown]
# Whether they are fast cannot be seen without the chip. What can be seen is whether they
# compile to what is fast there: the tensor-core instruction of each chip in every matrix product
# (norm, SwiGLU, routing, rounding to FP8 and adding the parts of a long decode have none), no
# spilled registers, shared memory within its 227 KiB. This table is committed, and a test compiles
# it again.

# %%
compiled = json.loads((ROOT / "benchmarks/results/aot.json").read_text(encoding="utf-8"))
print(f"{'operation':28s} {'kernel':17s} chip   registers  spilled  shared KiB  tensor-core")
for row in compiled["rows"]:
    print(
        f"{row['operation']:28s} {row['kernel']:17s} sm_{row['capability']:<4d}"
        f"{row['registers']:9d} {row['spilled']:8d} {row['shared'] / 1024:11.1f} "
        f"{row['tensor_core']:12d}"
    )

# %% [markdown]
# Registers are per thread (255 at most), tensor-core counts are instructions in the program text.
# `backward_kv` is the tight one: two accumulators and four operands live at once, so its tiles are
# smaller and it runs with a single pipeline stage.
#
# ## Kernels: then measure
#
# `python -m benchmarks` times each operation, forward and backward, against other ways to compute
# it, after its check has passed on that device. The files it leaves are committed; these are the
# published shapes on one GPU, and small ones on two CPU cores.

# %%
measured = {
    name: json.loads((ROOT / f"benchmarks/results/{folder}/kernels.json").read_text("utf-8"))
    for name, folder in {"an H200": "nvidia-h200", "two cores": "cpu-x86-64-2-cores"}.items()
}
sizes = {
    "window attention": "T",
    "global attention, packed": "T",
    "decode attention": "S",
    "RMSNorm": "D",
    "grouped GEMM": "E",
    "linear cross-entropy": "V",
    "routing": "E",
}
bound = "dense product of equal FLOPs"  # one expert's worth of overhead: no rival
figure, axes = plot.panels(len(measured), width=6.2, height=4.6)
for ax, (device, found) in zip(axes, measured.items(), strict=True):
    ratios = {}
    for row in found["rows"]:
        rivals = {name: ratio for name, ratio in row["ratio"].items() if name != bound}
        strongest = min(rivals, key=lambda name: rivals[name]["median"])
        ratio, key = rivals[strongest], sizes.get(row["operation"])
        label = row["operation"] + (f" {key}={row['shape'][key]}" if key in row["shape"] else "")
        print(f"{device:10s} {label:32s} {ratio['median']:6.2f}  {strongest}")
        ratios[label] = (ratio["median"], ratio["low"], ratio["high"])
    ahead = sum(low > 1 for _, low, _ in ratios.values())
    plot.bars(
        {name: median for name, (median, _, _) in ratios.items()},
        f"On {device} the kernels beat the best alternative\nin {ahead} of {len(ratios)} cases",
        "time of the best alternative over ours",
        intervals={name: (low, high) for name, (_, low, high) in ratios.items()},
        baseline={"equal": 1.0},
        ax=ax,
    )
    ax.set_yscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.yaxis.set_minor_locator(NullLocator())
run.figure(figure, "benchmarks", caption="Kernels against the best alternative, fwd and bwd.")

# %% [markdown]
# Read a bar as a ratio of times: at 2 the best alternative takes twice as long, below 1 it is
# faster than ours. Whiskers are the middle 80% of interleaved rounds. "Best" is the strongest
# rival of each case, printed above: FlexAttention and masked SDPA for attention, PyTorch's grouped
# and FP8 products, Liger's norm, SwiGLU and loss, cuBLAS through a plain product. The alternatives
# that people start from (a dense mask for a window, a loop over experts) are in the table beside
# the file and lose by far more. Below 1 on the GPU are products that cuBLAS writes by hand for the
# chip, the loss, which computes its logits twice so as not to store 1.2 GB of them, and the norm of
# wide rows, where the time is the launches'. On a CPU FP8 is emulated: its bars say what looking
# ahead to that chip costs, and the loop over experts is a match for PyTorch's grouped product.
#
# ## At full scale
#
# Nothing above changes but the numbers: `configs/full.toml` holds the published ones. At 16 bytes
# per parameter for weights, gradients and optimizer state the model takes 3.8 TB, 48 cards of 80 GB
# before the first activation: sharding it is the job of FSDP2 and expert parallelism. On one GPU,
# `python -m kexa.kernels.check` says whether the kernels are right there and `python -m benchmarks`
# how fast they are beside PyTorch's own.

# %%
run.finish()
