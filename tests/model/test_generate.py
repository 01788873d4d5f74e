"""Sampling: greedy, nucleus, self-drafting without loss, ragged batches."""

from __future__ import annotations

import pytest
import torch

from kexa.model import generate, generate_with_stats, sample
from kexa.model.generate import draw, probabilities

CHI2_999_DF60 = 99.6  # 99.9% quantile of chi-square, 60 degrees of freedom


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agreeing(build):
    """A model whose MTP block often agrees with it: both read little but the last embedding."""
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
        model.mtp.fc.weight[:, :24] += 3 * torch.eye(24)
    return model


@torch.no_grad()
def greedy_by_full_forwards(model, x, steps):
    for _ in range(steps):
        x = torch.cat((x, model(x)[:, -1:].argmax(-1)), dim=1)
    return x


def test_greedy_equals_full_forwards(build, ids):
    model, x = build(), ids(3, 7)
    assert torch.equal(generate(model, x, 30, temperature=0), greedy_by_full_forwards(model, x, 30))


def test_self_drafted_greedy_is_identical_and_saves_calls(build, ids):
    model, x = agreeing(build), ids(6, 9)
    plain = generate(model, x, 50, temperature=0)
    drafted, stats = generate_with_stats(model, x, 50, temperature=0)
    assert torch.equal(plain, drafted)
    assert 0 < stats.accepted < stats.drafted
    assert stats.main_calls < 50
    assert torch.equal(generate(model, x, 50, temperature=0, self_draft=True), plain)


def test_stats_count_what_happened(build, ids):
    model = agreeing(build)
    _, stats = generate_with_stats(model, ids(1, 9), 40, temperature=0)
    # One row: the first call gives one token, every later call one, and two if the draft stands.
    extra = int((stats.position_BT[0, :-1] == 1).sum())
    assert stats.main_calls == 40 - extra
    assert stats.mtp_calls == stats.main_calls - 1 == stats.drafted
    assert stats.position_BT[0, 0] == -1  # the first new token is never a draft


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_self_draft_follows_the_target_distribution(build, top_p):
    """The second new token after one prompt, against its exact distribution over all firsts."""
    model = agreeing(build)
    n, prompt = 6_000, torch.tensor([[5, 9, 2]])
    tokens, stats = generate_with_stats(model, prompt.expand(n, -1), 2, 1.0, top_p, seeded())
    assert 0.02 < stats.accepted / stats.drafted < 0.98
    with torch.no_grad():
        first = probabilities(model(prompt)[:, -1], 1.0, top_p)[0]
        pairs = torch.cat((prompt.expand(61, -1), torch.arange(61)[:, None]), dim=1)
        expected = first @ probabilities(model(pairs)[:, -1], 1.0, top_p)
    observed = tokens[:, 4].bincount(minlength=61)
    impossible = expected == 0
    assert observed[impossible].sum() == 0
    e = n * expected[~impossible]
    chi2 = float(((observed[~impossible] - e) ** 2 / e)[e >= 5].sum())
    assert chi2 < CHI2_999_DF60, chi2


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
        assert completion.stop_reason == "length"


def test_sample_logprobs_stop_tokens_and_batch_size(build, ids):
    model = build()
    prompts = [ids(1, n)[0].tolist() for n in (4, 9, 2, 6, 6, 5)]
    stop = tuple(range(0, 61, 9))
    runs = [
        sample(model, prompts, 25, 0.8, 0.9, stop, seeded(3), batch_size=size) for size in (6, 2)
    ]
    assert [c.tokens for c in runs[0]] == [c.tokens for c in runs[1]]
    assert {c.stop_reason for c in runs[0]} == {"stop", "length"} or len(runs[0][0].tokens) < 25
    for prompt, completion in zip(prompts, runs[0], strict=True):
        stopped = [i for i, t in enumerate(completion.tokens) if t in stop]
        assert stopped == ([len(completion.tokens) - 1] if completion.stop_reason == "stop" else [])
        with torch.no_grad():
            row = torch.tensor([prompt + completion.tokens])
            logp = (model(row)[0] / 0.8).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=5e-5, rtol=0)


def test_no_prompts_no_completions(build):
    assert sample(build(), [], 5) == []


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
    with pytest.raises(ValueError, match=message):
        sample(model, [[1, 2, 3]], **arguments)


def test_empty_prompts_and_missing_mtp_are_named(build, ids):
    model = build(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"\[1, 0\]"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(model, [[1], []], 3)
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        generate(model, ids(1, 3), 3, self_draft=True)
    with pytest.raises(ValueError, match="token id 61"):
        sample(model, [[61]], 3)
