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
# # 1. Tokenizer: superwords and new languages put more bytes into a token
#
# Every training FLOP and every cache byte is spent per token, so a tokenizer that packs more text into a token
# makes everything after it cheaper. K-EXAONE replaces the 100K vocabulary of EXAONE 4.0 by one of 150K and
# reports about 30% more bytes per token. **Can the recipe, as published, be rebuilt, and does it pay in every
# category?**
#
# $$\text{bytes per token} = \frac{\text{UTF-8 bytes of held-out text}}{\text{tokens that encode it}}$$
#
# The recipe has three moves: keep the most frequent 70% of the old vocabulary, learn new subwords for German,
# Japanese, Vietnamese, STEM and code, and give a fifth of the vocabulary to *superwords*, tokens that span
# several words (SuperBPE), split English : Korean : multilingual = 2 : 3 : 1.

# %% tags=["parameters"]
profile: str = "smoke"  # a file in configs/, or the path of a .toml
seed: int = 0
out_dir: str = ""  # where runs are kept; empty: runs/<profile>

# %%
import unicodedata

import numpy as np

from kexa import notebook, plot
from kexa.data import load_corpus
from kexa.tokenizer import (
    budget,
    gain_interval,
    load,
    overlap,
    save,
    split,
    superwords,
    token_counts,
    train_baseline,
    train_tokenizer,
    utf8_bytes,
)
from kexa.tokenizer.vocabulary import PHRASES, WORDS

run = notebook.begin("01_tokenizer", profile, seed, out_dir)
config = run.config.tokenizer

# %% [markdown]
# ## The idea on one line of text
#
# Byte-pair encoding merges inside *pre-tokens* only, and a regular expression decides where those end. Stage 1
# cuts after every word. Stage 2 cuts at punctuation, digits and line breaks, but lets words joined by single
# spaces stay together, so merges may now cross the space. Nothing else differs between the two stages.

# %%
line = "In 1997, one of the most common words was: the."
print("stage 1:", split(WORDS, line))
print("stage 2:", split(PHRASES, line))

# %% [markdown]
# How many ids each part of the vocabulary gets follows from the published shares alone.

# %%
sizes = budget(config)
for part, ids in sizes.ranges().items():
    print(f"{part:24s} {len(ids):7,d} ids   {len(ids) / config.vocab_size:6.1%}")

# %% [markdown]
# ## The text
#
# Eight categories; documents held out by their hash are never seen in training and carry every number below.

# %%
corpus = load_corpus(run.config.data)
train = {c: [d.text for d in documents] for c, documents in corpus.train.items()}
heldout = {c: [d.text for d in documents] for c, documents in corpus.heldout.items()}
for category in train:
    seen, unseen = (int(utf8_bytes(side[category]).sum()) for side in (train, heldout))
    print(
        f"{category:5s} train {seen:12,d} bytes   held out {unseen:10,d} bytes in {len(heldout[category]):5d} documents"
    )

# %% [markdown]
# ## Two tokenizers
#
# The baseline follows EXAONE 4.0: subwords only, NFKC, trained on Korean, English, Spanish and code. The new
# one starts from its merges. Kept tokens are those *formed* most often on the way to an encoding of the new
# text; a token is never formed more often than its parts, so the kept merges always hang together.

# %%
baseline = train_baseline(train, config)
tokenizer = train_tokenizer(train, config, baseline)
save(tokenizer, run.dir / "tokenizer")
tokenizer = load(run.dir / "tokenizer")
print(f"baseline {baseline.get_vocab_size():,} tokens, new {tokenizer.get_vocab_size():,} tokens")
print(f"tokens of the baseline that live on: {overlap(tokenizer, baseline):.1%}")

# %%
for name, each in (("baseline", baseline), ("new", tokenizer)):
    ids = each.encode(line).ids
    print(f"{name:9s} {len(ids):3d} tokens:", [each.decode([i]) for i in ids])

# %% [markdown]
# ## Bytes per token
#
# Both tokenizers encode the same held-out documents. The interval resamples documents. The last column is what
# the report states for vocabularies of 100K and 150K on its own, far larger and different text: it stands beside
# ours for orientation, not for comparison.

# %%
REPORTED = {
    "en": 19.6,
    "ko": 29.0,
    "multilingual": 49.8,
    "stem": 20.1,
    "code": 26.7,
}  # figure 3, percent
groups = {c: heldout[c] for c in heldout}
groups["multilingual"] = [text for c in ("es", "de", "ja", "vi") for text in heldout[c]]
before, after, gains = {}, {}, {}
for name, texts in groups.items():
    old, new, size = (
        token_counts(baseline, texts),
        token_counts(tokenizer, texts),
        utf8_bytes(texts).sum(),
    )
    before[name], after[name] = size / old.sum(), size / new.sum()
    gains[name] = gain_interval(old, new, seed)

# %%
print("category      baseline    new     gain  95% interval     reported gain")
for name in groups:
    gain, low, high = (100 * x for x in gains[name])
    reported = f"{REPORTED[name]:+.1f}%" if name in REPORTED else ""
    print(
        f"{name:13s} {before[name]:7.3f} {after[name]:7.3f} {gain:+7.1f}%  [{low:+.1f}, {high:+.1f}]     {reported}"
    )
    run.value(
        f"bytes per token, {name}",
        after[name],
        unit="bytes/token",
        note=f"baseline {before[name]:.3f}",
    )
    run.value(f"gain in bytes per token, {name}", gain, unit="%", headline=name in REPORTED)

# %%
categories = list(heldout)
least = min(categories, key=lambda c: gains[c].estimate)
axes = plot.grouped_bars(
    categories,
    {
        "EXAONE-4-style baseline": [before[c] for c in categories],
        "SuperBPE": [after[c] for c in categories],
    },
    title=f"Bytes per token change by {gains[least].estimate:+.1%} ({least}) or more in every category",
    ylabel="UTF-8 bytes per token, held-out text",
)
run.figure(axes.figure, "bytes_per_token", "Bytes per token on held-out text, by category.")

# %% [markdown]
# ## What the vocabulary is made of, and what is used
#
# Left: the ids. Right: the tokens that held-out text is actually encoded with.

# %%
ranges = sizes.ranges()
held_ids = {
    c: np.concatenate([e.ids for e in tokenizer.encode_batch(heldout[c])]).astype(int)
    for c in categories
}
edges = [r.start for r in ranges.values()]
used = {
    c: np.bincount(np.searchsorted(edges, ids, side="right") - 1, minlength=len(edges))
    for c, ids in held_ids.items()
}
share = {c: counts / counts.sum() for c, counts in used.items()}
superword_use = {c: float(share[c][4:].sum()) for c in categories}
most = max(superword_use, key=superword_use.get)

# %%
figure, (left, right) = plot.panels(2, width=5.6)
plot.bars(
    {name: len(ids) / config.vocab_size for name, ids in ranges.items()},
    title="The ids", ylabel="share of the vocabulary", ax=left,
)  # fmt: skip
plot.grouped_bars(
    categories,
    {name: [share[c][i] for c in categories] for i, name in enumerate(ranges) if name in ("kept", "new")}
    | {"superwords": [superword_use[c] for c in categories]},
    title=f"Superwords are at most {superword_use[most]:.0%} of the tokens ({most})",
    ylabel="share of the tokens of held-out text", ax=right,
)  # fmt: skip
run.figure(
    figure, "composition", "Left: make-up of the vocabulary. Right: parts used on held-out text."
)

# %% [markdown]
# The longest superwords show what the text repeats: fixed phrases of its own domain.

# %%
phrases = superwords(tokenizer)
for token_id, text in sorted(phrases.items(), key=lambda item: (-len(item[1].encode()), item[0]))[
    :15
]:
    print(f"{token_id:7d} {len(text.encode()):4d} bytes  {text!r}")
run.value("superwords", len(phrases), unit="tokens", note="tokens that span two words or more")
run.value("share of superwords among tokens, en", superword_use["en"], unit="share")
run.value("baseline tokens kept", overlap(tokenizer, baseline), unit="share")

# %% [markdown]
# ## Checks
#
# The claim of this notebook, and two that everything after it relies on: the parts have their published shares,
# and decoding an encoding gives the text back in NFC.

# %%
run.check(
    "bytes per token rise in every category on held-out text",
    all(gains[c].estimate > 0 for c in categories),
    ", ".join(f"{c} {gains[c].estimate:+.1%}" for c in categories),
)
wanted = sum(n for n in sizes.superwords.values())
run.check(
    "exactly the budgeted superwords, English : Korean : multilingual as configured",
    [i for name, ids in ranges.items() if name.startswith("superwords") for i in ids]
    == list(phrases),
    f"{len(phrases)} of {wanted}",
)
changed = sum(
    tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
    != unicodedata.normalize("NFC", text)
    for texts in heldout.values()
    for text in texts
)
run.check(
    "every held-out document survives encoding and decoding", changed == 0, f"{changed} changed"
)

# %% [markdown]
# ## At full scale
#
# `full` asks for the published sizes: 153,600 ids, of which 30,720 are superwords, from a baseline of 102,405.
# Two things change with size. The 30% of the baseline that goes was chosen last and is rarely used, so giving it
# up costs next to nothing, while here each of those tokens still mattered. And most words are single tokens
# by then, so that superwords are whole phrases rather than word ends joined to word beginnings. Both raise
# the gains in English and Korean; the gains in the new languages shrink, because their text competes for
# fewer bytes that the old vocabulary left raw.

# %%
run.finish()
