"""Run benchmarks on a model: likelihood for choices, greedy writing for problems, with intervals.

    choice      argmax over options o of  log p(o | prompt) / bytes(o)
    problem     reply = greedy decoding; check(reply) is right, wrong or unreadable
    accuracy    right / n with Wilson's interval; an unreadable reply is not right
    parse rate  share of replies that could be read

A score of zero is two different findings: a model that answers wrongly, and a harness that cannot
read the answers. The parse rate tells them apart; a run whose rate is under its floor fails rather
than report the second as the first.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from kexa.data import Document, TokenizedDocuments
from kexa.data.chat import encode_chat, parse_reply
from kexa.data.decontamination import Overlap
from kexa.eval.items import Benchmark, Choice, Message, Problem
from kexa.longctx import niah
from kexa.model import KexaForCausalLM
from kexa.model.generate import sample
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
    pairs, sizes = [], []
    for item in items:
        for option in item.options:
            prompt, continuation = encode_option(tokenizer, item, option)
            pairs.append((prompt, continuation))
            text = tokenizer.decode(continuation, skip_special_tokens=False)
            sizes.append(max(len(text.encode("utf-8")), 1))
    scores = continuation_logprobs(model, pairs, batch_size) / np.array(sizes)
    outcomes, at = [], 0
    for item in items:
        best = int(np.argmax(scores[at : at + len(item.options)]))
        outcomes.append("right" if best == item.answer else "wrong")
        at += len(item.options)
    return tuple(outcomes)


def encode_option(tokenizer: Tokenizer, item: Choice, option) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of one option; their border is the same for every option."""
    if isinstance(item.prompt, str):
        prompt = _encode_plain(tokenizer, item.prompt)
        return prompt, tokenizer.encode(option, add_special_tokens=False).ids
    prompt, _ = encode_chat(
        tokenizer, item.prompt, item.tools, add_generation_prompt=True, enable_thinking=False
    )
    whole, _ = encode_chat(tokenizer, [*item.prompt, option], item.tools)
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"item {item.id!r}: the chat template does not extend its own prompt")
    return prompt, whole[len(prompt) :]


def _encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.token_to_id("[BOS]"), *tokenizer.encode(text, add_special_tokens=False).ids]


@torch.no_grad()
def continuation_logprobs(
    model: KexaForCausalLM, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int = 32
) -> np.ndarray:
    """Sum of log p of each continuation's tokens after its prompt, in nats: float64 [len(pairs)].

    A prompt that leaves too little room is cut on the left.
    """
    device = model.lm_head.weight.device
    limit = model.config.max_position_embeddings
    rows = [(prompt[len(continuation) - limit :] if len(prompt) + len(continuation) > limit
             else prompt, continuation) for prompt, continuation in pairs]  # fmt: skip
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    sums = np.empty(len(rows))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(p) + len(c) for p, c in (rows[i] for i in batch))
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        for b, i in enumerate(batch):
            prompt, continuation = rows[i]
            ids_BT[b, : len(prompt) + len(continuation)] = torch.tensor(prompt + continuation)
        hidden_BTD = model.hidden_states(ids_BT.to(device))
        for b, i in enumerate(batch):
            prompt, continuation = rows[i]
            at = slice(len(prompt) - 1, len(prompt) + len(continuation) - 1)
            logprobs_TV = model.lm_head(hidden_BTD[b, at]).float().log_softmax(-1)
            target_T = torch.tensor(continuation, device=device)
            sums[i] = logprobs_TV.gather(1, target_T[:, None]).double().sum().item()
    return sums


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
    prompts = [_encode_plain(tokenizer, item.prompt) for item in items]
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
