"""Run benchmarks on a model: likelihood for choices, greedy writing for problems, with intervals.

    choice      the likeliest option per byte (kexa.model.likelihood) is the right one or not
    problem     reply = greedy decoding; check(reply) is right, wrong or unreadable
    accuracy    right / n with Wilson's interval; an unreadable reply is not right
    parse rate  share of replies that could be read

A score of zero is two different findings: a model that answers wrongly, and a harness that cannot
read the answers. The parse rate tells them apart; a run whose rate is under its floor fails rather
than report the second as the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from kexa.data import Document, TokenizedDocuments
from kexa.data.chat import Message, encode_chat, parse_reply
from kexa.data.choices import Choice, encode_plain, in_tokens
from kexa.data.decontamination import Overlap
from kexa.eval.items import Benchmark, Problem
from kexa.longctx import niah
from kexa.model import KexaForCausalLM
from kexa.model.generate import sample
from kexa.model.likelihood import choose
from kexa.statistics import Interval, wilson


@dataclass(frozen=True)
class Score:
    """One model on one benchmark; ``outcomes`` are right, wrong or unreadable, item by item."""

    benchmark: str
    category: str
    outcomes: tuple[str, ...]
    chance: float
    replies: tuple[str, ...] = ()  # what was written, for problems

    @property
    def n(self) -> int:
        return len(self.outcomes)

    @property
    def accuracy(self) -> Interval:
        """Share of right answers."""
        return wilson(self.outcomes.count("right"), self.n)

    @property
    def parse_rate(self) -> float:
        """Share of answers that could be read; 1 for choices."""
        return 1 - self.outcomes.count("unreadable") / self.n


def evaluate(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    max_new_tokens: int,
    thinking: bool = False,
    batch_size: int = 32,
) -> Score:
    """Score one benchmark.

    Args:
        max_new_tokens: most tokens written per problem; not used for choices.
        thinking: whether replies open with a think block (reasoning mode); only chats have one.

    Raises:
        ValueError: a benchmark without items.
    """
    if not benchmark.items:
        raise ValueError(f"benchmark {benchmark.name!r} has no items")
    choices = [i for i in benchmark.items if isinstance(i, Choice)]
    if choices:
        outcomes, replies = _choices(model, tokenizer, choices, batch_size), ()
    else:
        outcomes, replies = _problems(
            model, tokenizer, benchmark.items, max_new_tokens, thinking, batch_size
        )
    return Score(benchmark.name, benchmark.category, outcomes, benchmark.chance, replies)


def find_needles(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    haystack: TokenizedDocuments,
    length: int,
    count: int,
    seed: int,
) -> Score:
    """Needles of :mod:`kexa.longctx.niah` in ``length`` tokens of text, at evenly spread depths."""
    needles = [
        niah.make_tasks(tokenizer, haystack, length, float(depth), 1, seed)[0]
        for depth in np.linspace(0, 1, count)
    ]
    outcomes = tuple("right" if hit else "wrong" for hit in niah.score(model, needles))
    return Score(f"needle in {length} tokens", "long context", outcomes, 0.01)  # two digits


def _choices(
    model: KexaForCausalLM, tokenizer: Tokenizer, items: Sequence[Choice], batch_size: int
) -> tuple[str, ...]:
    picks = choose(model, [in_tokens(tokenizer, item) for item in items], batch_size)
    return tuple(
        "right" if pick == item.answer else "wrong" for pick, item in zip(picks, items, strict=True)
    )


def _problems(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    items: Sequence[Problem],
    max_new_tokens: int,
    thinking: bool,
    batch_size: int,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if isinstance(items[0].prompt, str):
        replies = continuations(model, tokenizer, items, max_new_tokens, batch_size)
    else:
        replies = chat_replies(
            model, tokenizer, [item.prompt for item in items], max_new_tokens, thinking, batch_size
        )
    outcomes = tuple(i.check(reply).outcome for i, reply in zip(items, replies, strict=True))
    return outcomes, tuple(replies)


def continuations(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    items: Sequence[Problem],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Greedy continuations of plain prompts, each up to its item's stop."""
    prompts = [encode_plain(tokenizer, item.prompt) for item in items]
    written = _greedy(model, prompts, max_new_tokens, batch_size)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
    return [
        text.split(item.stop)[0] if item.stop else text
        for item, text in zip(items, texts, strict=True)
    ]


def chat_replies(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    thinking: bool = False,
    batch_size: int = 32,
) -> list[str]:
    """Greedy replies to conversations, what stands after the think block of each."""
    prompts = [
        encode_chat(tokenizer, c, add_generation_prompt=True, enable_thinking=thinking)[0]
        for c in conversations
    ]
    written = _greedy(model, prompts, max_new_tokens, batch_size)
    return [parse_reply(tokenizer, t, enable_thinking=thinking)["content"] for t in written]


def _greedy(
    model: KexaForCausalLM, prompts: list[list[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    stop_ids = (model.config.eos_token_id, model.config.bos_token_id)
    return [
        completion.tokens
        for completion in sample(
            model,
            prompts,
            max_new_tokens,
            temperature=0.0,
            stop_ids=stop_ids,
            batch_size=batch_size,
        )
    ]


def contaminated(
    benchmarks: Iterable[Benchmark], documents: Iterable[Document], n: int = 10
) -> Mapping[str, list[str]]:
    """Items whose question shares ``n`` words in a row with a training document, by benchmark.

    The runs and words are those of :mod:`kexa.data.decontamination`: a question shorter than ``n``
    words is compared whole, and spacing, punctuation and case hide no copy.

    Raises:
        ValueError: ``n`` below 1.
    """
    benchmarks = list(benchmarks)
    texts = {(b.name, item.id): item.text() for b in benchmarks for item in b.items}
    overlap = Overlap(texts, n)
    found: dict[str, set[str]] = {b.name: set() for b in benchmarks}
    for document in documents:
        for name, item in overlap.find(document.text):
            found[name].add(item)
    return {name: sorted(items) for name, items in found.items()}
