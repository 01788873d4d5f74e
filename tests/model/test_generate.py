"""Decoding: greedy, nucleus, ragged batches, stop tokens, streams, prompts read in chunks."""

from __future__ import annotations

import itertools

import pytest
import torch

from kexa.model import StopReason, generate, sample, stream
from kexa.model.sampling import choose, draw, log_probabilities, probabilities


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def greedy_by_full_forwards(model, x, steps):
    for _ in range(steps):
        x = torch.cat((x, model(x)[:, -1:].argmax(-1)), dim=1)
    return x


@torch.no_grad()
def plain_loop(model, x, documents, draws_BT, temperature, top_p, chunk):
    """New tokens and their log-probabilities [B, T] of padded rows that all go to the end."""
    cache, step, tokens, logprobs = model.new_cache(len(x), chunk), x, [], []
    for t in range(draws_BT.shape[1]):
        logits_BV = model.lm_head(model.decode(step, documents if t == 0 else None, cache)[:, -1])
        logp_BV = log_probabilities(logits_BV, temperature)
        step = choose(logp_BV, temperature, top_p, draws_BT[:, t])[:, None]
        tokens.append(step)
        logprobs.append(logp_BV.gather(1, step))
    return torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1)


def test_greedy_equals_full_forwards(build, ids):
    model, x = build(), ids(3, 7)
    assert torch.equal(generate(model, x, 30, temperature=0), greedy_by_full_forwards(model, x, 30))


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 1.0), (0.8, 0.9)])
def test_generate_is_the_plain_loop(build, ids, temperature, top_p):
    """The loop that also drafts, stops and streams gives the tokens of one that does nothing else,
    from the same uniform numbers."""
    model = build()
    for seed in range(5):
        x = ids(4, 9)
        draws = torch.rand(20, 4, generator=seeded(seed), dtype=torch.float64).T
        expected, _ = plain_loop(model, x, None, draws, temperature, top_p, chunk=8)
        found = generate(model, x, 20, temperature, top_p, generator=seeded(seed))
        assert torch.equal(found, torch.cat((x, expected), dim=1))


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 1.0), (0.8, 0.9)])
def test_sample_is_the_plain_loop_bit_for_bit(build, ids, temperature, top_p):
    model, lengths = build(), (3, 8, 8, 12)
    for seed in range(5):
        x = ids(4, 12)
        documents = -(torch.arange(12) < 12 - torch.tensor(lengths)[:, None]).long()
        x = x * (documents + 1)
        draws = torch.rand(4, 20, generator=seeded(seed), dtype=torch.float64)
        tokens, logprobs = plain_loop(model, x, documents, draws, temperature, top_p, chunk=1)
        prompts = [row[12 - n :] for row, n in zip(x.tolist(), lengths, strict=True)]
        found = sample(model, prompts, 20, temperature, top_p, generator=seeded(seed))
        assert [c.tokens for c in found] == tokens.tolist()
        assert [c.logprobs for c in found] == logprobs.tolist()


def test_draw_inverts_the_cumulative_distribution():
    weights = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64).expand(5, -1)
    uniform = torch.tensor([0.0, 0.249999, 0.25, 0.749999, 0.999999], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [0, 0, 2, 2, 3]


def test_nucleus_keeps_the_smallest_set_with_the_mass():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    expected = torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]])
    torch.testing.assert_close(probabilities(logits, 1.0, 0.69), expected, atol=1e-6, rtol=0)
    assert (probabilities(logits, 1.0, 0.71) > 0).tolist() == [[False, True, True, True]]
    assert (probabilities(logits, 1.0, 1e-9) > 0).tolist() == [[False, True, False, False]]


def test_sampling_repeats_for_equal_seeds_only(build, ids):
    model, x = build(), ids(2, 5)
    a, b, c = (generate(model, x, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_sample_of_ragged_prompts_equals_each_alone(build, ids):
    model = build()
    prompts = [ids(1, n)[0].tolist() for n in (1, 12, 7, 7, 30)]
    together = sample(model, prompts, 15, temperature=0)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = generate(model, torch.tensor([prompt]), 15, temperature=0)[0, len(prompt) :]
        assert completion.tokens == alone.tolist()
        assert completion.stop_reason is StopReason.LENGTH


def test_sample_logprobs_stop_tokens_and_batch_size(build, ids):
    model = build()
    prompts = [ids(1, n)[0].tolist() for n in (4, 9, 2, 6, 6, 5)]
    stop = tuple(range(0, 61, 9))
    runs = [
        sample(model, prompts, 25, 0.8, 0.9, stop, seeded(3), batch_size=size) for size in (6, 2)
    ]
    assert [c.tokens for c in runs[0]] == [c.tokens for c in runs[1]]
    assert StopReason.STOP in {c.stop_reason for c in runs[0]}
    for prompt, completion in zip(prompts, runs[0], strict=True):
        stopped = [i for i, t in enumerate(completion.tokens) if t in stop]
        ended = completion.stop_reason is StopReason.STOP
        assert stopped == ([len(completion.tokens) - 1] if ended else [])
        assert ended or len(completion.tokens) == 25
        with torch.no_grad():
            row = torch.tensor([prompt + completion.tokens])
            logp = (model(row)[0] / 0.8).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("draft", [False, True])
def test_a_stream_gives_what_sample_gives(build, ids, draft):
    model, prompts = build(), [ids(1, n)[0].tolist() for n in (4, 9, 2, 6, 6)]
    settings = (prompts, 25, 0.8, 0.9, range(0, 61, 9))
    whole = sample(model, *settings, seeded(3), batch_size=2, self_draft=draft)
    tokens = list(stream(model, *settings, seeded(3), batch_size=2, self_draft=draft))
    for i, completion in enumerate(whole):
        own = [t for t in tokens if t.prompt == i]
        assert [t.token for t in own] == completion.tokens
        assert [t.logprob for t in own] == completion.logprobs
        ends = [None] * (len(own) - 1) + [completion.stop_reason]
        assert [t.stop_reason for t in own] == ends


def test_a_stream_decodes_no_further_than_it_is_read(build, monkeypatch):
    model, calls = build(), []
    real = model.decode
    monkeypatch.setattr(model, "decode", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    read = list(itertools.islice(stream(model, [[1, 2], [3]], 50), 6))
    assert [t.prompt for t in read] == [1, 0] * 3  # by length, then in turns
    assert len(calls) == 3
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 39, 40])
def test_a_prompt_read_in_chunks_is_the_same_prompt(build, ids, monkeypatch, chunk, draft):
    """Chunks below, at and above the window (5), rings that wrap, rows that are padded."""
    model, read, caches = build(torch.float64), [], []
    prompts = [ids(1, n)[0].tolist() for n in (40, 1, 38, 17, 40, 3)]
    real = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda x, *rest: (read.append(x.shape[1]), real(x, *rest))[1]
    )
    new = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *a: (caches.append(new(*a)), caches[-1])[1])
    settings = (prompts, 12, 0.9, 0.95, (7, 23))
    whole = sample(model, *settings, seeded(1), self_draft=draft)
    assert max(read) == 40
    read.clear()
    parts = sample(model, *settings, seeded(1), self_draft=draft, prefill_chunk=chunk)
    assert max(read) <= chunk
    # a chunk's slots are given back once the prompt is read
    assert {cache.layers[0].slots for cache in caches} == {5 + (2 if draft else 1)}
    for one, other in zip(whole, parts, strict=True):
        assert one.tokens == other.tokens
        a, b = torch.tensor(one.logprobs), torch.tensor(other.logprobs)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # they are fp32


def test_no_prompts_no_completions(build):
    assert sample(build(), [], 5) == list(stream(build(), [], 5)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature=-0.5"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 1, "top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 254}, "254 exceeds max_position_embeddings=256"),
    ],
)
def test_bad_arguments_are_named(build, ids, arguments, message):
    model = build()
    for draft in (False, True):
        with pytest.raises(ValueError, match=message):
            generate(model, ids(1, 3), **arguments, self_draft=draft)
        for function in (sample, stream):  # before the first token is asked for
            with pytest.raises(ValueError, match=message):
                function(model, [[1, 2, 3]], **arguments, self_draft=draft)


def test_empty_prompts_and_missing_mtp_are_named(build, ids):
    model = build(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"\[1, 0\]"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(model, [[1], []], 3)
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        generate(model, ids(1, 3), 3, self_draft=True)
    with pytest.raises(ValueError, match="batch_size=0"):
        sample(model, [[1]], 3, batch_size=0)
    with pytest.raises(ValueError, match="prefill_chunk=0"):
        sample(model, [[1]], 3, prefill_chunk=0)
    with pytest.raises(ValueError, match="token id 61"):
        sample(model, [[61]], 3)
