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
# # 8. Preference learning: GROUPER ranks a group instead of a pair
#
# Not everything has a verifier. After reinforcement learning K-EXAONE is aligned with preferences
# by GROUPER: several responses per prompt, scored by rules and rubrics, and a loss that needs
# neither a reference model nor pairs. **Does training on groups sampled once raise the preference
# reward on prompts that were held out, and what does it cost?**

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import random

import torch

from kexa import notebook, plot, tokenizer
from kexa.interop import load_hf, save_hf
from kexa.post import grouper, sft, tasks
from kexa.post.judge import RUBRIC, EndpointJudge, Request, rule_judge, score_groups
from kexa.post.rollout import attempt, freeze_router, respond, rewards
from kexa.runtime import generator
from kexa.statistics import mean_interval, paired_interval
from kexa.train import build_adamw

run = notebook.begin("08_preference", profile, seed, out_dir)
config, sums = run.config.preference, run.config.sft
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
model = load_hf(notebook.require(run, "07_rl") / "model").to(run.device)

# %% [markdown]
# ## The loss
#
# Rewards of a group are stretched to $[-1, 1]$, and every response pulls with its advantage times
# its inverse perplexity:
#
# $$A_{\text{pref},i}=2\,\frac{z_i-\min_k z_k}{\max_k z_k-\min_k z_k}-1,\qquad
# \mathcal L=-\mathbb E\Big[\frac1G\sum_i A_{\text{pref},i}
# \exp\Big(\frac1{|o_i|}\log\pi_\theta(o_i\mid x)\Big)\Big]$$
#
# where $z$ is the z-score of the reward in its group (it cancels: both steps are affine). A tied
# group, 0/0 in the formula, pulls nowhere. With two responses this is half of SimPER's loss.

# %%
print(grouper.grouper_advantages(torch.tensor([[0.0, 1, 4, 3], [2, 2, 2, 2]])).tolist())
logprobs = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
loss = grouper.grouper_loss(logprobs, torch.tensor([1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool))
print(f"inverse perplexities 0.5 and 0.4, advantages 1 and -1: loss {loss:.3f}")

# %% [markdown]
# ## Rewards
#
# Two of the report's domains: chat, scored by a rubric alone, and instruction following, here chat
# with a constraint on the reply, where a rule's verdict counts half. The judge is a function from
# request and response to one score per dimension. At this size it is a set of rules about the
# surface of a reply (`rules`); with the base URL of an OpenAI-compatible server in the config, a
# language model answers the same questions.

# %%
judge = rule_judge if config.judge == "rules" else EndpointJudge(config.judge, config.judge_model)
for dimension, question in RUBRIC.items():
    print(f"{dimension:<12} {question}")
print(rule_judge("Do you like music?", "Music music music", tuple(RUBRIC)))


# %%
def requests(side, count):
    """Openings of conversations; every second one gets a constraint."""
    sides = dict(
        zip(
            ("train", "heldout"),
            sft.dialogues(sums.dialogue_source, tasks.HELDOUT_SHARE),
            strict=True,
        )
    )
    openings = list({e.messages[0]["content"]: e.language for e in sides[side]}.items())
    if len(openings) < count:
        raise ValueError(f"{count} {side} openings asked for, {len(openings)} found: ask for fewer")
    rng = random.Random(f"{seed} {side}")
    return [
        Request(*tasks.constrain(opening, language, rng)) if i % 2 else Request(opening)
        for i, (opening, language) in enumerate(rng.sample(openings, count))
    ]


def sampled(chosen, group_size, label):
    """Groups of replies without reasoning, and what they are worth."""
    groups = respond(
        model, vocabulary, [[{"role": "user", "content": r.text}] for r in chosen], group_size,
        thinking=False, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        generator=generator(seed, "preference", label),
    )  # fmt: skip
    return groups, *score_groups(chosen, groups, judge, config.rule_weight)


# %% [markdown]
# ## Groups from the initial policy
#
# Sampled once, before any update (reported); so are the held-out replies for the first half of the
# comparison.

# %%
heldout = requests("heldout", config.heldout_prompts)
_, before, parts_before = sampled(heldout, config.heldout_samples, "before")
skills = tasks.distinct("instruction", "heldout", config.heldout_prompts, seed + 3)


def skill():
    """Mean reward of every instruction task of the stage before."""
    _, verdicts = attempt(
        model, vocabulary, skills, config.heldout_samples,
        thinking=False, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        generator=generator(seed, "preference", "skill"),
    )  # fmt: skip
    return rewards(verdicts).mean(1).tolist()


skill_before = skill()
chosen = requests("train", config.prompts)
groups, train_rewards, _ = sampled(chosen, config.group_size, "train")

# %% [markdown]
# The best- and the worst-scored reply to one training request:

# %%
widest = int((train_rewards.amax(1) - train_rewards.amin(1)).argmax())
for name, pick in {
    "best": train_rewards[widest].argmax(),
    "worst": train_rewards[widest].argmin(),
}.items():
    reply = groups[widest].responses[int(pick)].answer
    print(f"{name} ({train_rewards[widest, pick]:.2f}): {chosen[widest].text!r} -> {reply!r}")

# %% [markdown]
# ## The run

# %%
freeze_router(model)
curve = []
for step in grouper.train(model, build_adamw(model, config), groups, train_rewards, config, seed):
    run.log("train", step.step, **step.losses)
    curve.append(step.losses)

# %%
steps = range(len(curve))
epoch = len(curve) // config.epochs
margins = [
    sum(c["preferred"] - c["rejected"] for c in part) / epoch
    for part in (curve[:epoch], curve[-epoch:])
]
ax = plot.lines(
    {name: (steps, [c[name] for c in curve]) for name in ("preferred", "rejected")},
    f"Preferred over rejected replies: {margins[0]:+.3f} in epoch 1, {margins[1]:+.3f} in the last",
    "optimizer step",
    "mean inverse perplexity",
)
run.figure(
    ax.figure, "likelihood", caption="Likelihood of replies with positive and negative advantage."
)

# %% [markdown]
# ## Held-out preference reward, before and after

# %%
_, after, parts_after = sampled(heldout, config.heldout_samples, "after")
gain = paired_interval(before.mean(1).tolist(), after.mean(1).tolist())
run.value("held-out preference reward before", before.mean().item())
run.value("held-out preference reward after", after.mean().item(), headline=True)
run.value(
    "held-out preference gain", gain.estimate, note=f"95% paired interval {gain}", headline=True
)
plain = [request.check is None for request in heldout]
for domain, rows in {"chat": plain, "instructions": [not chat for chat in plain]}.items():
    part = paired_interval(before.mean(1)[rows].tolist(), after.mean(1)[rows].tolist())
    run.value(f"gain on {domain}", part.estimate, note=f"95% paired interval {part}")
    print(f"{domain}: {part}")
run.check(
    "GROUPER raises the mean preference reward on held-out prompts: 95% paired interval above zero",
    gain.low > 0,
    f"gain {gain}",
)


# %% [markdown]
# What it costs: preference learning saw none of the lists, numbers and counts of the stage before.

# %%
cost = paired_interval(skill_before, skill())
run.value("change on instruction tasks", cost.estimate, note=f"95% paired interval {cost}")
print(f"instruction tasks of the stage before: {cost}")


# %%
def by_dimension(parts):
    """Mean and interval of every dimension over the prompts that have it."""
    means = {name: scores.mean(1) for name, scores in parts.items()}
    return {name: mean_interval(m[~m.isnan()].tolist()) for name, m in means.items()}


bars = {"before": by_dimension(parts_before), "after": by_dimension(parts_after)}
rises = sum(bars["after"][n].estimate > bars["before"][n].estimate for n in bars["after"])
ax = plot.grouped_bars(
    list(bars["after"]),
    {label: [p.estimate for p in points.values()] for label, points in bars.items()},
    f"Preference reward: {gain.estimate:+.3f}; {rises} of {len(bars['after'])} parts of it rise",
    "mean score",
    intervals={label: [(p.low, p.high) for p in ps.values()] for label, ps in bars.items()},
)
run.figure(
    ax.figure, "dimensions", caption="Held-out scores by dimension, 95% intervals over prompts."
)

# %% [markdown]
# ## What changes at full scale
#
# Group size, rubrics, weights and learning rate are not published. A language model as the judge
# can score truth, safety and style, which rules cannot; it can also be pleased, so its scores need
# their own audit. The rules used here are known to the policy only through rewards, yet they are
# simple enough to be satisfied by a bland short sentence: read the gain as obedience to the rubric.

# %%
save_hf(model, run.dir / "model", vocabulary)
run.finish()
