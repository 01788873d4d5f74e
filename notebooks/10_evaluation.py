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
# # 10. Evaluation: what each training stage added, and what these numbers cannot say
#
# The report measures K-EXAONE on nine kinds of ability. **Which of them does a model of this size
# have at all, and which stage gave it?** Three checkpoints answer the same local items: after
# pretraining, after supervised fine-tuning, after preference learning.
#
# A small model needs two kinds of measurement. Where the answer is one of several options, the
# option with the highest likelihood per byte counts, so that the model need not write yet:
#
# $$\hat o = \arg\max_{o}\ \frac{\log p_\theta(o \mid \text{question})}{\text{bytes}(o)}$$
#
# Where the answer is written, a program checks it: right, wrong, or *unreadable*. A harness that
# cannot read answers reports zero for every model, so unreadable replies are counted apart.

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
from tqdm.auto import tqdm

from kexa import notebook, plot
from kexa.agents.sandbox import run_python
from kexa.data import encode, load_corpus
from kexa.data.choices import encode_option
from kexa.eval import items, tasks
from kexa.interop import load_hf
from kexa.model.likelihood import continuation_logprobs
from kexa.statistics import paired_interval
from kexa.tokenizer import load

run = notebook.begin("10_evaluation", profile, seed, out_dir)
config = run.config.evaluation

# %%
tokenizer = load(notebook.require(run, "01_tokenizer") / "tokenizer")
STAGES = {"pretrained": "04_pretraining", "fine-tuned": "06_sft", "preference": "08_preference"}
models = {
    name: load_hf(notebook.require(run, stage) / "model").to(run.device).eval()
    for name, stage in STAGES.items()
}

# %% [markdown]
# ## The items
#
# One benchmark per category, all read from pinned packages or written here. They are a few hundred
# worked examples that an evaluation harness ships, held-out tasks of our own, and a sample of
# HumanEval: **not the test sets of the benchmarks**, whatever the name says. *Chance* is the score
# of the best constant or random answer.


# %%
def passes(program: str) -> bool:
    return run_python(program, config.program_seconds).ending == "passed"


sums = (run.config.sft.max_terms, run.config.sft.max_number)
benchmarks = [
    items.mmlu(config.choices),
    items.kmmlu(config.choices),
    items.mmlu_translated(config.choices),
    items.tool_calls(config.choices // 2),
    items.decline_or_help(config.choices),
    items.verifiable("math", "math", config.problems, seed, *sums),
    items.verifiable("instruction", "instruction", config.problems, seed, *sums),
    items.humaneval(config.programs, passes),
]
for b in benchmarks:
    kind = "options" if isinstance(b.items[0], items.Choice) else "written"
    print(f"{b.category:13s} {b.name:18s} {len(b.items):4d} items  {kind}  chance {b.chance:.2f}")

# %% [markdown]
# One item by hand: the four options of a question, their log-probability, and what remains per
# byte.

# %%
example = benchmarks[0].items[1]
print(example.prompt)
for i, option in enumerate(example.options):
    pair = encode_option(tokenizer, example, option)
    [logprob] = continuation_logprobs(models["pretrained"], [pair])
    mark = "<- right" if i == example.answer else ""
    print(
        f"{option:60.60s} {logprob:8.2f} nats {logprob / len(option.encode()):7.3f} per byte {mark}"
    )

# %% [markdown]
# ## Is the harness itself right?
#
# Before a model is scored, the answers must be: every worked solution has to pass and every empty
# one to fail.

# %%
solutions = {p["task_id"]: p["canonical_solution"] for p in items.humaneval_problems()}
programs = benchmarks[-1].items
accepted = sum(item.check(solutions[item.id]).outcome == "right" for item in programs)
stubs = ("    pass\n", "    exit()\n")
refused = sum(all(item.check(s).outcome == "wrong" for s in stubs) for item in programs)
print(f"HumanEval: {accepted} of {len(programs)} published solutions pass, {refused} stubs fail")

# %% [markdown]
# And no question may stand in the text of pretraining. An item is contaminated when ten words of
# its question, or all of them if it is shorter, occur in a row in a document. The tasks of
# fine-tuning and reinforcement learning are kept apart from the held-out ones by a hash.

# %%
corpus = load_corpus(run.config.data)
documents = [d for side in corpus.train.values() for d in side]
overlaps = tasks.contaminated(benchmarks, documents)
for name, found in overlaps.items():
    print(f"{name:18s} {len(found):3d} contaminated", found[:3] if found else "")

# %% [markdown]
# Long context needs text to hide a fact in: held-out documents, laid end to end, with a line such
# as `wheel = 73` somewhere and the question at the end.

# %%
haystack = encode(tokenizer, corpus.heldout["en"])
needles = (haystack, config.needle_tokens, config.needles, seed)
print(f"{len(haystack.tokens):,} tokens of text, {config.needles} needles, "
      f"each in {config.needle_tokens} tokens")  # fmt: skip

# %% [markdown]
# ## The run
#
# Greedy decoding, the same items and the same prompts for all three checkpoints. Tasks of
# post-training are asked twice: with an open think block (reasoning) and with an empty one
# (direct). The pretrained model has never seen a chat turn: it is asked in that form all the same,
# because that is the question its successors answer.

# %%
taught = ["math", "instruction"]  # what post-training teaches, with and without reasoning
scores = {name: {} for name in models}
for name, model in models.items():
    for b in tqdm(benchmarks, desc=name):
        if b.category in taught:
            for mode, thinking in {"reasoning": True, "direct": False}.items():
                scores[name][f"{b.category}, {mode}"] = tasks.evaluate(
                    model, tokenizer, b, config.max_new_tokens, thinking
                )
        else:
            scores[name][b.category] = tasks.evaluate(model, tokenizer, b, config.program_tokens)
    scores[name]["long context"] = tasks.find_needles(model, tokenizer, *needles)

# %%
for name in models:
    for category, score in scores[name].items():
        run.value(
            f"{category}: {score.benchmark}, {name}",
            score.accuracy.estimate,
            unit="accuracy",
            note=f"chance {score.chance:.2f}, {score.n} items",
            headline=name == "preference",
        )

# %%
categories = list(scores["preference"])
chance = [scores["preference"][c].chance for c in categories]
print(f"{'category':24s}" + "".join(f"{name:>26s}" for name in models))
for c in categories:
    print(f"{c:24s}" + "".join(f"{scores[n][c].accuracy!s:>26s}" for n in models))

# %%
last = scores["preference"]
above = [c for c in categories if last[c].accuracy.low > last[c].chance]
axes = plot.grouped_bars(
    categories,
    {"chance": chance} | {n: [scores[n][c].accuracy.estimate for c in categories] for n in models},
    title=f"Clearly above chance after the last stage: {', '.join(above) or 'nothing'}",
    ylabel="share of items right, 95% interval",
    intervals={"chance": [(c, c) for c in chance]}
    | {n: [scores[n][c].accuracy[1:] for c in categories] for n in models},
)
run.figure(axes.figure, "accuracy", "Accuracy by category and training stage, with chance.")

# %% [markdown]
# Categories whose interval reaches down to chance are not measured by these items: the model is
# too small or the items are too few to tell. What the stages changed is a *paired* question, on
# the same items.


# %%
def right(name: str, category: str) -> list[float]:
    return [float(outcome == "right") for outcome in scores[name][category].outcomes]


changes = {}
for category in categories:
    changes[category] = paired_interval(
        right("pretrained", category), right("preference", category)
    )
    print(f"{category:24s} after the last stage minus after pretraining: {changes[category]}")
    run.value(f"gain in {category}", changes[category].estimate, unit="accuracy")

# %% [markdown]
# ## Could the replies be read?
#
# The share of written answers in a form the check understands. A wrong answer is readable; a
# missing box is not.

# %%
written = [c for c in categories if c.split(",")[0] in taught]
for category in written:
    rates = "  ".join(f"{n} {scores[n][category].parse_rate:.0%}" for n in models)
    print(f"{category:24s} {rates}")
    print(f"    the last model writes {scores['preference'][category].replies[0]!r}")

# %%
first, final = (scores[n]["math, direct"].parse_rate for n in ("pretrained", "preference"))
axes = plot.grouped_bars(
    written,
    {n: [scores[n][c].parse_rate for c in written] for n in models},
    title=f"Boxed answers that can be read: {first:.0%} after pretraining, {final:.0%} at the end",
    ylabel="share of replies that could be read",
    baseline={"floor": config.parse_floor},
)
run.figure(axes.figure, "parse_rate", "Readable replies by stage; below the floor a score is void.")

# %% [markdown]
# ## What the report states
#
# For orientation only: other items, another protocol (written answers, temperature 1.0, top-p
# 0.95, up to 160K tokens of context) and a model 100,000 times as large. Nothing in this table was
# measured here.
#
# | reported by LG AI Research | benchmark | K-EXAONE, reasoning | non-reasoning |
# |---|---|--:|--:|
# | knowledge | MMLU-Pro | 83.8 | 81.0 |
# | math | AIME 2025 | 92.8 | 44.6 |
# | coding | LiveCodeBench v6 | 80.7 | 44.6 |
# | tool use | τ² retail | 78.6 | 73.2 |
# | instruction | IFEval | 89.7 | 85.5 |
# | long context | OpenAI-MRCR | 52.3 | 60.9 |
# | Korean | KMMLU-Pro | 67.3 | 63.5 |
# | multilingual | MMMLU | 85.7 | 83.8 |
# | safety | KGC-Safety | 96.1 | 88.4 |
#
# ## At full scale
#
# `full` keeps the harness and changes the numbers: all exemplars, every HumanEval problem, replies
# of up to 32,768 tokens. Likelihood scoring of options then gives way to written answers, since a
# model that reasons before it answers is mismeasured by the likelihood of the bare option; and the
# published test sets take the place of the exemplars, which needs the hub. The parse-rate floor,
# the contamination check and the intervals stay.

# %%
run.check(
    "the coding harness accepts every published solution and no stub",
    accepted == refused == len(programs),
    f"{accepted} accepted, {refused} stubs refused, of {len(programs)}",
)
for family in taught:
    rates = [
        scores["preference"][f"{family}, {mode}"].parse_rate for mode in ("reasoning", "direct")
    ]
    run.check(
        f"{family}: at least {config.parse_floor:.0%} of the last model's replies can be read",
        sum(rates) / 2 >= config.parse_floor,
        f"{rates[0]:.0%} with reasoning, {rates[1]:.0%} without",
    )
before, after = ([r for c in written for r in right(n, c)] for n in ("pretrained", "preference"))
learned = paired_interval(before, after)
run.check(
    "post-training raises the share of right written answers, 95% interval above 0",
    learned.low > 0,
    str(learned),
)
dirty = {name: found for name, found in overlaps.items() if name in ("HumanEval", "math tasks")}
run.check(
    "no HumanEval problem and no held-out sum stands in the text of pretraining",
    not any(dirty.values()),
    f"{sum(map(len, dirty.values()))} found",
)

# %%
run.finish()
