"""Likelihoods against one forward at a time; the choice per byte by hand."""

import numpy as np
import pytest
import torch

from kexa.data.choices import Question
from kexa.model.likelihood import choose, continuation_logprobs

PAIRS = [([1, 30, 31], [40]), ([1, 30, 31, 32, 50, 51], [40, 41, 42]), ([1], [43, 44])]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_logprobs_equal_one_forward_each(build, batch_size):
    model, expected = build(), []
    for prompt, continuation in PAIRS:
        logprobs = model(torch.tensor([prompt + continuation])).log_softmax(-1)[0]
        at = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
        expected.append(sum(logprobs[t, c].item() for t, c in zip(at, continuation, strict=True)))
    assert continuation_logprobs(model, PAIRS, batch_size) == pytest.approx(
        np.array(expected), abs=1e-4
    )


def test_a_prompt_that_is_too_long_is_cut_on_the_left(build):
    model = build()
    prompt = [10 + i % 40 for i in range(model.config.max_position_embeddings + 30)]
    long, short = continuation_logprobs(model, [(prompt, [40, 41]), (prompt[32:], [40, 41])])
    assert long == pytest.approx(short, abs=1e-4)


def test_the_choice_is_the_likeliest_option_per_byte(build):
    model = build()
    options = [[40], [41, 42], [43, 44, 45], [46]]
    questions = [
        Question([1, 30, 31], options, [1, 9, 4, 2], 0),
        Question([1, 32], options[:3], [30, 1, 1], 0),
    ]
    expected = []
    for q in questions:
        sums = continuation_logprobs(model, [(q.prompt, option) for option in q.options])
        per_byte = [total / size for total, size in zip(sums, q.sizes, strict=True)]
        expected.append(per_byte.index(max(per_byte)))
    assert choose(model, questions) == expected
    # sizes decide: a log-probability over very many bytes is next to zero
    assert choose(model, [Question([1, 30], options, [1, 1, 10**6, 1], 0)]) == [2]
