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
# # 7. Reinforcement learning: AGAPO turns checks into skill
#
# Fine-tuning imitates solutions. Reinforcement learning samples the model's own and asks a rule
# which of them are right. K-EXAONE uses AGAPO, an off-policy policy gradient with truncated
# importance sampling, on a mix of verifiable tasks. **Does it raise the reward on prompts that it
# was never trained on, by more than chance?**

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import torch

from kexa import notebook, plot, tokenizer
from kexa.interop import load_hf, save_hf
from kexa.post import agapo, tasks
from kexa.post.rollout import attempt, freeze_router, rewards
from kexa.runtime import generator
from kexa.statistics import mean_interval, paired_interval
from kexa.train import build_adamw

run = notebook.begin("07_rl", profile, seed, out_dir)
config, sums = run.config.rl, run.config.sft
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
model = load_hf(notebook.require(run, "06_sft") / "model").to(run.device)

# %% [markdown]
# ## The objective
#
# Each of $B$ prompts gets a group of $G$ responses with rewards $r_i \in [0, 1]$. A response is
# compared with the others of its group, and the result is normalised over the batch:
#
# $$A_{\text{group},i}=r_i-\frac{1}{G-1}\sum_{j\ne i}r_j,\qquad
# A_{\text{global},i}=\frac{A_{\text{group},i}-\mathrm{mean}_k A_{\text{group},k}}
# {\mathrm{std}_k A_{\text{group},k}}$$
#
# A group that is all right or all wrong says nothing and is dropped. By hand: of three groups of
# four, the second is dropped, and a lone right answer weighs more than one of two:

# %%
example = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
print(agapo.informative_groups(example).tolist())
print(agapo.agapo_advantages(example).numpy().round(3))

# %% [markdown]
# Several updates are made per rollout batch, so from the second on the policy differs from the one
# that sampled. The ratio $\rho$ of the two probabilities corrects for that; it is cut at
# $\varepsilon$ from above and carries no gradient:
#
# $$\mathcal J=\mathbb E\Big[\frac1G\sum_i\frac1{|o_i|}\sum_t
# \mathrm{sg}\big(\min(\rho_{i,t},\varepsilon)\big)\,A_{\text{global},i}\,
# \log\pi_\theta(o_{i,t}\mid q,o_{i,<t})\Big]$$
#
# Here $\varepsilon$ truncates the weight of the second token, which has become five times likelier:

# %%
now, then = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.05]]).log()
loss = agapo.agapo_loss(now, then, torch.tensor([1.5]), torch.ones(1, 2, dtype=torch.bool), 2.0)
print(f"ratios {agapo.importance_ratios(now, then).numpy().round(2)}, loss {loss:.4f}")

# %% [markdown]
# ## Held-out prompts
#
# The measure is fixed before training: held-out tasks of both families, several samples each, the
# same prompts before and after. The policy practises on questions that fine-tuning has not shown it
# either, so it starts from the errors that it would make on new ones; on questions whose solutions
# it has imitated it would mostly learn to recall them.


# %%
heldout = [
    task
    for family in tasks.FAMILIES
    for task in tasks.distinct(
        family, "heldout", config.heldout_prompts, seed + 2, sums.max_terms, sums.max_number
    )
]


def evaluate(label):
    """Mean reward of every held-out prompt."""
    groups, verdicts = attempt(
        model, vocabulary, heldout, config.heldout_samples,
        thinking=True, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        generator=generator(seed, "held out", label),
    )  # fmt: skip
    reply = groups[0].responses[0]
    print(f"{label}: {heldout[0].prompt!r} -> {reply.reasoning!r} -> {reply.answer!r}")
    return rewards(verdicts).mean(1)


before = evaluate("before")
print(f"mean reward before: {mean_interval(before.tolist())}")

# %% [markdown]
# ## The run
#
# The router is frozen (reported), there is no KL term (reported). Not published, therefore chosen:
# group size, $\varepsilon$, learning rate, optimizer. The optimizer is AdamW: Muon
# gives every direction of an update the same size, and most directions of a policy gradient from
# a few hundred samples are noise.


# %%
def train_tasks(step):
    """Half of the batch from each family."""
    share, salt = config.prompts // len(tasks.FAMILIES), seed * 100_003 + step
    return [
        task
        for family in tasks.FAMILIES
        for task in tasks.generate(family, "rl", share, salt, sums.max_terms, sums.max_number)
    ]


freeze_router(model)
history = []
for it in agapo.train(model, build_adamw(model, config), vocabulary, train_tasks, config, seed):
    lengths = [len(r.tokens) for group in it.groups for r in group.responses]
    record = {
        "reward": it.rewards_QG.mean().item(),
        "zero-variance share": 1 - it.kept_Q.float().mean().item(),
        "response tokens": sum(lengths) / len(lengths),
        "unreadable": sum(v.outcome == "unreadable" for row in it.verdicts for v in row)
        / len(lengths),
    }
    run.log("train", it.step, **record)
    history.append((it, record))

telling = sum(int(it.kept_Q.sum()) for it, _ in history)
run.check(
    "some groups hold right and wrong answers, so there is something to learn from",
    telling > 0,
    f"{telling} of {sum(len(it.groups) for it, _ in history)} groups",
)
if not telling:
    run.finish()  # fails here: what follows would have nothing to show

# %% [markdown]
# ## Reward while training


# %%
def family_curve(family, window):
    """Mean reward of a family and its 95% interval over windows of rollout batches."""
    points = []
    for start in range(0, len(history) - window + 1, window):
        values = [
            row.mean().item()
            for it, _ in history[start : start + window]
            for task, row in zip(it.tasks, it.rewards_QG, strict=True)
            if task.family == family
        ]
        points.append((start + window / 2, mean_interval(values)))
    return [x for x, _ in points], [p for _, p in points]


window = max(2, len(history) // 4)
curves = {family: family_curve(family, window) for family in tasks.FAMILIES}
rising = [f for f, (_, points) in curves.items() if points[-1].low > points[0].high]
ax = plot.lines(
    {family: (x, [p.estimate for p in points]) for family, (x, points) in curves.items()},
    f"Training reward ends above its start, intervals apart, in: {', '.join(rising) or 'none'}",
    "rollout batch",
    "mean reward (share of right answers)",
    bands={f: ([p.low for p in ps], [p.high for p in ps]) for f, (_, ps) in curves.items()},
)
run.figure(
    ax.figure, "reward", caption="Training reward by task family, 95% intervals over prompts."
)

# %% [markdown]
# ## Held-out reward, before and after

# %%
after = evaluate("after")
gain = paired_interval(before.tolist(), after.tolist())
run.value("held-out reward before", before.mean().item())
run.value("held-out reward after", after.mean().item(), headline=True)
run.value("held-out reward gain", gain.estimate, note=f"95% paired interval {gain}", headline=True)
run.check(
    "AGAPO raises the mean reward on held-out prompts: 95% paired interval above zero",
    gain.low > 0,
    f"gain {gain}",
)

# %%
names = ("all", *tasks.FAMILIES)
rows = {n: [i for i, t in enumerate(heldout) if n in ("all", t.family)] for n in names}
bars = {
    label: [mean_interval(values[rows[n]].tolist()) for n in names]
    for label, values in {"before": before, "after": after}.items()
}
ax = plot.grouped_bars(
    names,
    {label: [p.estimate for p in points] for label, points in bars.items()},
    f"Held-out reward changes by {gain.estimate:+.3f} (paired 95% interval {gain.low:+.3f} to "
    f"{gain.high:+.3f})",
    "mean reward",
    intervals={label: [(p.low, p.high) for p in points] for label, points in bars.items()},
)
run.figure(ax.figure, "heldout", caption="Held-out reward by family; error bars are not paired.")

# %% [markdown]
# ## How far off policy
#
# The first update of a batch sees the sampling policy itself: its ratios differ from 1 by rounding
# only, which also shows that trainer and sampler compute the same probabilities. Later updates
# drift.

# %%
updates = [[it.ratios[i] for it, _ in history if len(it.ratios) > i] for i in range(config.updates)]
by_update = {f"update {i}": torch.cat(parts) for i, parts in enumerate(updates, 1) if parts}
on_policy = (by_update["update 1"] - 1).abs().max().item()
last, spread = [(name, ratios.std().item()) for name, ratios in by_update.items()][-1]
ax = plot.histogram(
    {name: ratios.clamp(0, config.epsilon).tolist() for name, ratios in by_update.items()},
    f"Importance ratios: spread {spread:.2f} by {last}, at most {on_policy:.0e} off 1 at update 1",
    "importance ratio (larger ones at the truncation)",
)
ax.set_yscale("log")
run.figure(ax.figure, "ratios", caption="Importance ratio of every token by update within a batch.")
truncated = torch.cat(list(by_update.values())).gt(config.epsilon).float().mean().item()
run.value("largest deviation of an on-policy ratio from 1", on_policy)
run.check(
    "sampler and trainer agree: on-policy ratios are within 1% of 1",
    on_policy < 0.01,
    f"largest deviation {on_policy:.1e}",
)
run.value("share of truncated weights", truncated)
print(f"{truncated:.2%} of the weights are truncated")

# %% [markdown]
# ## What the groups say
#
# Only groups with right and wrong answers teach. As the policy improves, more groups are all right;
# the share of dropped groups is work without effect, which a full-scale run avoids by choosing
# prompts of medium difficulty.

# %%
steps = [it.step for it, _ in history]
dropped = [record["zero-variance share"] for _, record in history]
length = [record["response tokens"] for _, record in history]
figure, axes = plot.panels(2)
plot.lines(
    {"dropped": (steps, dropped)},
    f"{sum(dropped) / len(dropped):.0%} of groups dropped",
    "rollout batch", "share of groups without variance", ax=axes[0],
)  # fmt: skip
plot.lines(
    {"length": (steps, length)},
    f"Responses: {length[0]:.1f} to {length[-1]:.1f} tokens",
    "rollout batch", "mean tokens per response", ax=axes[1],
)  # fmt: skip
run.figure(figure, "groups", caption="Zero-variance share and response length over training.")

# %% [markdown]
# ## What changes at full scale
#
# Code and STEM join the mix, verified by tests and by an LLM judge; rollouts run on other machines
# and arrive several updates late, which is what the importance weights are for. At this size the
# policy mostly becomes surer of what fine-tuning made likely; a gain on held-out prompts is a gain
# in reliability, and says nothing about skills that no sample ever showed.

# %%
save_hf(model, run.dir / "model", vocabulary)
run.finish()
