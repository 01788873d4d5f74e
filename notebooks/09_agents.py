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
# # 9. Agents: tasks that check themselves, and notes that keep a search going
#
# K-EXAONE is trained on hundreds of synthetic tool environments with verifiable pass criteria, and
# searches the web with two sub-agents: a summarizer for opened pages, and a trajectory compressor
# that turns the interaction so far into one record of key facts and open questions. Formats and
# prompts are not published. **What makes a task worth keeping, what does a small model learn from
# the kept ones, and what is the compressor good for?**

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import functools
from collections import Counter

from kexa import notebook, plot, tokenizer
from kexa.agents import towns
from kexa.agents.environments import candidates, oracle, run_tasks, screen
from kexa.agents.policies import Guesser, Meter, ModelPolicy, ShortMemory, silent
from kexa.agents.search import Index, research
from kexa.data.chat import encode_chat, render_chat
from kexa.interop import load_hf
from kexa.post import sft
from kexa.statistics import wilson
from kexa.train import build_optimizers, fit, wsd

run = notebook.begin("09_agents", profile, seed, out_dir)
config = run.config.agents
vocabulary = tokenizer.load(notebook.require(run, "01_tokenizer") / "tokenizer")
model = load_hf(notebook.require(run, "08_preference") / "model").to(run.device)

# %% [markdown]
# ## A tool environment
#
# The environment is a stockroom with three tools. A task passes on what is left at the end, the
# state of the stockroom and the number or name in the answer, so any way there is right. Candidates
# are drawn by rule, and a filter keeps those that a scripted oracle solves while saying nothing and
# guessing both fail.

# %%
drawn = candidates(config.candidates, seed)
kept, dropped = screen(drawn)
tasks = kept[: config.tasks]
print(f"{len(drawn)} drawn, {len(kept)} kept, {len(tasks)} used")
for reason, count in dropped.items():
    print(f"{count:4d} dropped: {reason}")
for task in tasks[:6]:
    print(f"{task.kind:8s} {task.instruction}")
run.value("tasks kept by the filter", len(kept) / len(drawn), unit="share of candidates")

# %% [markdown]
# Here is one task solved by its oracle, in the chat format. The declarations are a large part of
# every prompt.

# %%
declarations = tasks[0].start.toolbox().declarations
[solved] = run_tasks(oracle(tasks), tasks[:1])
print(render_chat(solved.episode.messages))
bare, full = (len(encode_chat(vocabulary, tasks[0].opening(), d)[0]) for d in (None, declarations))
print(f"{full} tokens before the first reply, {full - bare} of them tool declarations")

# %% [markdown]
# ## Demonstrations
#
# The oracle's episodes on other tasks are conversations like any other, with loss on the
# assistant's tokens only. Their instructions do not occur among the tasks that are run.

# %%
asked = {task.instruction for task in tasks}
others = [t for t in candidates(config.demonstrations, seed + 1) if t.instruction not in asked]
taught = [outcome for outcome in run_tasks(oracle(others), others) if outcome.passed]
examples = [sft.Example("tools", "en", o.episode.messages, declarations) for o in taught]
encoded = sft.encode_examples(vocabulary, examples, config.sequence_length)[False]
batches = sft.PackedChats(
    encoded, config.sequence_length, config.batch_size, model.config.pad_token_id, seed
)
print(f"{len(encoded)} of {len(examples)} episodes fit {config.sequence_length} tokens")


# %%
def judged(*policies):
    """Outcomes of all tasks under each policy, and the pass rate with its 95% interval."""
    outcomes = [o for policy in policies for o in run_tasks(policy, tasks, config.max_steps)]
    return outcomes, wilson(sum(o.passed for o in outcomes), len(outcomes))


agent = ModelPolicy(model, vocabulary, config.max_new_tokens, config.context)
results = {
    "silent": judged(silent),
    "guessing": judged(*(Guesser(seed + 1000 + i) for i in range(20))),  # new to the filter
    "model": judged(agent),
    "oracle": judged(oracle(tasks)),
}


# %%
def batch_at(step):
    return {name: value.to(run.device) for name, value in batches.batch(step).items()}


def schedule(step):
    return wsd(step, config.steps, warmup_share=0.05, decay_share=0.5)


optimizers = build_optimizers(model, config)
model.train()
loss_fn = functools.partial(sft.chat_loss, mtp_weight=config.mtp_weight)
for step in fit(model, optimizers, batch_at, loss_fn, config.steps, schedule):
    run.log("demonstrations", step.step, next_token=step.losses["next_token"])
print(f"loss on the last batch {step.losses['next_token']:.3f} nats")
results["model, taught"] = judged(agent)

# %% [markdown]
# ## What the policies achieve
#
# Every fault is an outcome, none an exception. A malformed call opens a call and is no JSON object
# with a name and arguments; a refused call names a wrong tool or a wrong argument.

# %%
print(f"{'':14s}{'passed':>10s}{'calls':>7s}{'malformed':>11s}{'refused':>9s}   how episodes end")
for name, (outcomes, rate) in results.items():
    episodes = [o.episode for o in outcomes]
    calls, malformed, refused = (
        sum(x)
        for x in zip(*[(len(e.calls), e.malformed, e.refused) for e in episodes], strict=True)
    )
    ends = ", ".join(
        f"{n} {reason}" for reason, n in Counter(e.stop.value for e in episodes).items()
    )
    passed = sum(o.passed for o in outcomes)
    share = f"{passed} of {len(outcomes)}"
    print(f"{name:14s}{share:>10s}{calls:7d}{malformed:11d}{refused:9d}   {ends}")
    run.value(f"pass rate, {name}", rate.estimate, note=str(rate), headline="model" in name)

# %%
order = ["silent", "guessing", "model", "model, taught", "oracle"]
rates = {name: results[name][1] for name in order}
before, after = (rates[name].estimate for name in ("model", "model, taught"))
axes = plot.bars(
    {name: rate.estimate for name, rate in rates.items()},
    title=f"Demonstrations take the model from {before:.0%} to {after:.0%} of the tasks",
    ylabel="share of tasks passed, 95% interval",
    intervals={name: (rate.low, rate.high) for name, rate in rates.items()},
)
run.figure(axes.figure, "tasks", f"Pass rates on {len(tasks)} tasks of the stockroom.")

# %% [markdown]
# One episode of the taught model, as it went:

# %%
shown = results["model, taught"][0][0]
print(f"passed: {shown.passed}, ended: {shown.episode.stop.value}")
for message in shown.episode.messages[1:]:
    print(f"{message['role']:10s}{message['content']} {message.get('tool_calls', '')}")

# %% [markdown]
# ## The search agent
#
# A local web of towns, each page with one dated fact among filler. A question asks which of
# several towns has the oldest bridge, so its answer needs all their pages at once. Our small model
# cannot do this (see below), so a scripted reader plays all three roles: primary agent, summarizer
# and compressor. It knows only what the conversation shows. With a *short memory* it is shown the
# task and the latest messages that fit a token budget, as a model with a full context would be.

# %%
web = towns.pages(seed)
index = Index(web)
questions = towns.questions(web, config.questions, config.towns, seed)
print(questions[0].text, "->", questions[0].answer)
print("search:", index.search(f"bridge of {questions[0].answer}"))


# %%
def count(messages):
    return len(encode_chat(vocabulary, messages)[0])


def study(memory, every):
    """All questions under one condition: reports, and the tokens of every request, by question."""
    reports, sent = [], []
    for question in questions:
        meter = Meter(towns.reader, count)
        policy = ShortMemory(meter, memory, count) if memory else meter
        reports.append(
            research(policy, index, question.text, question.answer, config.search_steps, every)
        )
        sent.append(meter.sent)
    return reports, sent


ARMS = {
    "long memory": (0, 0),
    "long memory, compressor": (0, config.compress_every),
    "short memory": (config.memory_tokens, 0),
    "short memory, compressor": (config.memory_tokens, config.compress_every),
}
arms = {name: study(memory, every) for name, (memory, every) in ARMS.items()}

# %% [markdown]
# Tokens are those of the messages in every request, the sub-agents' included; the declarations of
# the tools, which every request of the main agent repeats, are left out. A repeated call has been
# made before in the same episode, word for word.

# %%
rows = {}
print(f"{'':26s}{'correct':>8s}{'calls':>7s}{'repeated':>10s}{'largest':>9s}{'all tokens':>12s}")
for name, (reports, sent) in arms.items():
    rows[name] = {
        "correct": sum(r.correct for r in reports),
        "calls": sum(len(r.episode.calls) for r in reports) / len(reports),
        "repeated calls": sum(r.episode.repeated for r in reports) / len(reports),
        "largest request": max(max(s) for s in sent),
        "tokens per question": sum(sum(s) for s in sent) / len(sent),
    }
    correct, calls, repeated, largest, total = rows[name].values()
    print(
        f"{name:26s}{correct:5d}/{len(reports)}{calls:7.1f}{repeated:10.1f}{largest:9,d}{total:12,.0f}"
    )
    for key, value in rows[name].items():
        run.value(f"{key}, {name}", value)

# %%
plain, noting = rows["long memory"], rows["long memory, compressor"]
ratio = noting["largest request"] / plain["largest request"]
axes = plot.lines(
    {name: (range(1, len(sent[0]) + 1), sent[0]) for name, (_, sent) in arms.items()},
    title=f"With notes the largest request is {ratio:.0%} of what it is without",
    xlabel="request, sub-agents included",
    ylabel="tokens in the request",
    hlines={"short memory": config.memory_tokens},
)
run.figure(axes.figure, "context", "Size of every request while one question is researched.")
run.value(
    "tokens per question, compressor against none",
    noting["tokens per question"] / plain["tokens per question"],
    unit="ratio",
    headline=True,
)

# %% [markdown]
# The record that the compressor leaves is all that the agent keeps:

# %%
first = arms["short memory, compressor"][0][0]
print(first.episode.messages[1]["content"])

# %% [markdown]
# The same code runs our model in all three roles. It was never taught to search, and its outcomes
# say so.

# %%
attempt = research(
    agent, index, questions[0].text, questions[0].answer, config.max_steps, config.compress_every
)
episode = attempt.episode
print(f"correct: {attempt.correct}, ended: {episode.stop.value}, calls: {len(episode.calls)}")
print(
    f"refused: {episode.refused}, malformed: {episode.malformed}, pages read: {attempt.summaries}"
)

# %% [markdown]
# ## Checks

# %%
rate = {name: result[1].estimate for name, result in results.items()}
run.check(
    "the oracle passes every task, saying nothing none, and new guessers less than one in ten",
    rate["oracle"] == 1 and rate["silent"] == 0 and results["guessing"][1].high < 0.1,
    f"{rate['oracle']:.0%}, {rate['silent']:.0%}, {results['guessing'][1]}",
)
run.check(
    "with the compressor the largest request and all tokens together are smaller",
    all(noting[key] < plain[key] for key in ("largest request", "tokens per question")),
    f"{noting['largest request']:,} against {plain['largest request']:,}; "
    f"{noting['tokens per question']:,.0f} against {plain['tokens per question']:,.0f}",
)
forgetful, kept_going = rows["short memory"], rows["short memory, compressor"]
run.check(
    "with a short memory the compressor raises success and removes repeated calls",
    kept_going["correct"] > forgetful["correct"]
    and kept_going["repeated calls"] == 0 < forgetful["repeated calls"],
    f"{kept_going['correct']} against {forgetful['correct']} correct; "
    f"{kept_going['repeated calls']:.1f} against {forgetful['repeated calls']:.1f} repeated",
)

# %% [markdown]
# ## At full scale
#
# The report's agent works with 128K tokens of context and up to 500 steps, compressed every 50,
# and the same model plays the sub-agents. Only the policy changes here: `EndpointPolicy` asks any
# server that speaks the OpenAI chat protocol; tasks, filter, outcomes and record stay. What the
# script hides is the sub-agents' quality: a summary that misses a fact or a record that drops one
# costs a model its answer. `Report` counts replies of the sub-agents in a wrong format, not facts.

# %%
run.finish()
