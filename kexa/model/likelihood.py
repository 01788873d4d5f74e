"""Which of several continuations a model finds likeliest: multiple choice without writing.

    answer = argmax over options o of  log p(o | prompt) / bytes(o)

Per byte, since options differ in length and tokenizers in how they cut them. It needs no parsing,
has a known chance level, and says something about a model that cannot yet write.

chosen: all of it; the report scores multiple choice by a written "answer: letter".

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kexa.data.choices import Question
from kexa.model.transformer import KexaForCausalLM


def choose(
    model: KexaForCausalLM, questions: Sequence[Question], batch_size: int = 32
) -> list[int]:
    """The place of the option that the model takes, question by question."""
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    sizes = [size for q in questions for size in q.sizes]
    scores = continuation_logprobs(model, pairs, batch_size) / np.array(sizes)
    ends = np.cumsum([len(q.options) for q in questions])[:-1]
    return [int(np.argmax(part)) for part in np.split(scores, ends)]


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
