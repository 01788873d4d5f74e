"""Self-drafting: no token or probability changes, and it ends where it does not pay."""

from __future__ import annotations

import importlib

import pytest
import torch

from kexa.model import (
    DraftRule,
    StopReason,
    generate,
    measure_break_even,
    sample,
    sample_with_stats,
)
from kexa.model.sampling import choose, log_probabilities, probabilities, verify

CHI2_999_DF60 = 99.6  # 99.9% quantile of chi-square, 60 degrees of freedom


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def agreeing(build):
    """A model whose MTP block often agrees with it: both read little but the last embedding."""
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
        model.mtp.fc.weight[:, :24] += 3 * torch.eye(24)
    return model


@torch.no_grad()
def drafted_by_full_forwards(model, prompt, draws_C, steps, temperature, top_p):
    """New tokens of one prompt, every round from scratch: no cache, no batch."""

    def logp(hidden_1D):
        return log_probabilities(model.lm_head(hidden_1D), temperature)

    def pick(logp_1V, uniform):
        return choose(logp_1V, temperature, top_p, uniform[None])

    known = torch.tensor([prompt])
    first = pick(logp(model.hidden_states(known)[:, -1]), draws_C[0])
    known = torch.cat((known, first[None]), dim=1)
    for draws in draws_C[1:].split(4):
        hidden = model.hidden_states(known)
        ahead = model.mtp_hidden_states(known[:, 1:], hidden[:, :-1])
        draft_logp = logp(ahead[:, -1])
        draft = pick(draft_logp, draws[0])
        both = model.hidden_states(torch.cat((known, draft[None]), dim=1))
        target = logp(both[:, -2])
        accepted, token = verify(
            draft, draft_logp, target, temperature, top_p, draws[1, None], draws[2, None]
        )
        known = torch.cat((known, token[None]), dim=1)
        if accepted:
            known = torch.cat((known, pick(logp(both[:, -1]), draws[3])[None]), dim=1)
        if known.shape[1] >= len(prompt) + steps:
            break
    return known[0, len(prompt) : len(prompt) + steps].tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 1.0), (0.8, 0.9)])
def test_drafted_tokens_are_those_of_a_loop_without_caches(agreeing, ids, temperature, top_p):
    prompts = [ids(1, n)[0].tolist() for n in (6, 1, 9, 6)]
    draws_QC = torch.rand(4, 1 + 4 * 14, generator=seeded(), dtype=torch.float64)
    found = sample(agreeing, prompts, 15, temperature, top_p, (), seeded(), self_draft=True)
    for prompt, draws_C, completion in zip(prompts, draws_QC, found, strict=True):
        alone = drafted_by_full_forwards(agreeing, prompt, draws_C, 15, temperature, top_p)
        assert completion.tokens == alone

    x = ids(3, 6)
    draws_BC = torch.rand(1 + 4 * 14, 3, generator=seeded(), dtype=torch.float64).T
    rows = generate(agreeing, x, 15, temperature, top_p, self_draft=True, generator=seeded())
    for row, draws_C in zip(rows.tolist(), draws_BC, strict=True):
        alone = drafted_by_full_forwards(agreeing, row[:6], draws_C, 15, temperature, top_p)
        assert row[6:] == alone


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
@pytest.mark.parametrize("draft", [True, DraftRule({1: 0.5, 8: 0.9}, slack=0.1, ceiling=1.0)])
def test_greedy_tokens_are_the_same_with_drafts(agreeing, ids, batch_size, draft):
    """Ragged prompts around the window (5), stop tokens, a group's prompt twice."""
    prompts = [ids(1, n)[0].tolist() for n in (1, 2, 4, 5, 6, 9, 10, 11, 30, 7, 5, 3, 8, 1, 12)]
    prompts.append(prompts[3])
    stop = (11, 40)
    plain = sample(agreeing, prompts, 30, 0, stop_ids=stop, batch_size=batch_size)
    drafted, stats = sample_with_stats(
        agreeing, prompts, 30, 0, stop_ids=stop, batch_size=batch_size, self_draft=draft
    )
    assert [(c.tokens, c.stop_reason) for c in plain] == [
        (c.tokens, c.stop_reason) for c in drafted
    ]
    assert {c.stop_reason for c in plain} == set(StopReason)
    assert 0 < stats.accepted < stats.drafted
    for one, other in zip(plain, drafted, strict=True):
        a, b = torch.tensor(one.logprobs), torch.tensor(other.logprobs)
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_stats_count_what_happened(agreeing, ids):
    [completion], stats = sample_with_stats(agreeing, ids(1, 9).tolist(), 40, temperature=0)
    assert len(completion.tokens) == 40
    # One row: the first call gives one token, every later call one, and two if the draft stands.
    extra = int((stats.position_QT[0, :-1] == 1).sum())
    assert extra > 0 and stats.main_calls == 40 - extra
    assert stats.mtp_calls == stats.main_calls == stats.drafted + 1  # both read the prompt once
    assert stats.position_QT[0, 0] == -1  # the first new token is never a draft
    assert stats.drafted_rounds == [None]
    _, plain = sample_with_stats(agreeing, ids(1, 9).tolist(), 40, 0, self_draft=False)
    assert (plain.main_calls, plain.mtp_calls, plain.drafted) == (40, 0, 0)


ALL = DraftRule({1: 0.5}, slack=0.1)  # of 5 tokens: ends unless all first drafts stand


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize(("draft", "n", "rows"), [(True, 6_000, 6_000), (ALL, 2_000, 4)])
def test_sampled_tokens_follow_the_target_distribution(agreeing, top_p, draft, n, rows):
    """The second and third new token after one prompt, against their exact distributions over all
    first and second ones."""
    prompt = [5, 9, 2]
    found, stats = sample_with_stats(
        agreeing, [prompt] * n, 5, 1.0, top_p, (), seeded(), rows, draft
    )
    assert 0.02 < stats.accepted / stats.drafted < 0.98
    if draft is ALL:
        ended = sum(rounds == 1 for rounds in stats.drafted_rounds)
        assert 50 < ended < 450  # of 500 batches
    tokens = torch.tensor([c.tokens for c in found])
    with torch.no_grad():
        x = torch.tensor([prompt])
        one_V = probabilities(agreeing(x)[:, -1], 1.0, top_p)[0]
        x = torch.cat((x.expand(61, -1), torch.arange(61)[:, None]), dim=1)
        two_VV = probabilities(agreeing(x)[:, -1], 1.0, top_p)
        x = torch.cat((x.repeat_interleave(61, 0), torch.arange(61).repeat(61)[:, None]), dim=1)
        three_VVV = probabilities(agreeing(x)[:, -1], 1.0, top_p).view(61, 61, 61)
    both_VV = one_V[:, None] * two_VV
    assert chi_square(tokens[:, 1], both_VV.sum(0)) < CHI2_999_DF60
    assert chi_square(tokens[:, 2], torch.einsum("ab,abc->c", both_VV, three_VVV)) < CHI2_999_DF60


def chi_square(tokens, expected_V):
    impossible_V = expected_V == 0
    observed_V = tokens.bincount(minlength=61)
    assert observed_V[impossible_V].sum() == 0
    e = len(tokens) * expected_V
    return float(((observed_V - e) ** 2 / e)[e >= 5].sum())


def test_sampled_tokens_do_not_depend_on_the_batch(agreeing, ids):
    prompts = [ids(1, n)[0].tolist() for n in (4, 9, 2, 6, 6, 5)]
    runs = [
        sample(agreeing, prompts, 25, 0.8, 0.9, (11, 40), seeded(3), size, self_draft=True)
        for size in (6, 2, 1)
    ]
    assert [c.tokens for c in runs[0]] == [c.tokens for c in runs[1]]
    assert [c.tokens for c in runs[0]] == [c.tokens for c in runs[2]]


def test_a_seed_and_a_rule_fix_the_sampled_tokens(agreeing, ids):
    """Nothing that is timed goes into the decision."""
    prompts, rule = ids(6, 5).tolist(), DraftRule({1: 0.4, 4: 0.6}, slack=0.02)
    runs = [
        sample_with_stats(agreeing, prompts, 40, 1.0, 1.0, (), seeded(5), 4, rule) for _ in range(2)
    ]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].drafted_rounds == runs[1][1].drafted_rounds


def test_drafting_ends_where_it_does_not_pay(agreeing, build, ids):
    prompts = ids(4, 6).tolist()

    def drafted(model, rule):
        return sample_with_stats(model, prompts, 100, 0, self_draft=rule)[1]

    never = drafted(agreeing, DraftRule({1: 0.0, 4: 1.0}))
    assert never.drafted_rounds == [0] and never.mtp_calls == never.drafted == 0
    stubborn = build()  # its drafts are about as good as chance
    lost = drafted(stubborn, DraftRule({4: 0.9}, slack=0.02, ceiling=1.0))
    assert lost.drafted_rounds == [2]  # 100 * 0.02 = 2 plain steps may be lost, 0.9 a round
    assert lost.mtp_calls == 1 + 2 and lost.main_calls == 100 - max_gain(lost)
    assert drafted(agreeing, DraftRule({1: 0.01})).drafted_rounds == [None]


def max_gain(stats):
    """Plain steps that the row which gained least has saved."""
    return int((stats.position_QT == 1).sum(1).min())


def test_a_rule_looks_up_the_next_larger_measurement():
    rule = DraftRule({2: 0.3, 8: 0.7})
    assert [rule.at(rows) for rows in (1, 2, 3, 8, 20)] == [0.3, 0.3, 0.7, 0.7, 0.7]
    # 0.02 of 100 tokens: two plain steps may be lost, of which the next round can lose 0.3
    assert rule.pays(2, -1.69, 100) and not rule.pays(2, -1.71, 100)
    assert not DraftRule({1: 1.0}, ceiling=1.0).pays(1, 5.0, 100)


def test_a_batch_begins_only_below_the_ceiling():
    assert DraftRule({1: 0.64}).pays(1, 0.0, 100) and not DraftRule({1: 0.65}).pays(1, 5.0, 100)
    assert DraftRule({1: 0.8}, ceiling=0.9).pays(1, 0.0, 100)
    assert not DraftRule({1: 0.8}, ceiling=0.8).pays(1, 0.0, 100)


def test_bad_rules_are_named():
    for break_even in ({}, {0: 0.5}):
        with pytest.raises(ValueError, match="at least one number of rows"):
            DraftRule(break_even)
    with pytest.raises(ValueError, match="slack=-1"):
        DraftRule({1: 0.5}, slack=-1)
    with pytest.raises(ValueError, match="ceiling=1.1"):
        DraftRule({1: 0.5}, ceiling=1.1)


def test_break_even_is_the_ratio_of_rounds_that_take_turns(build, monkeypatch):
    """Drafted rounds take 3 units, plain ones 2, so half of the drafts must stand."""
    turns = []

    def seconds(decoding):
        turns.append(next(decoding).accepted_R is not None)
        return 3.0 if turns[-1] else 2.0

    module = importlib.import_module("kexa.model.generate")  # the name is the function's, too
    monkeypatch.setattr(module, "_seconds", seconds)
    assert measure_break_even(build(), (1, 4), context=20, rounds=3) == {1: 0.5, 4: 0.5}
    assert turns == [False, True] * 6


def test_bad_measurements_are_named(build):
    with pytest.raises(ValueError, match="rounds=0"):
        measure_break_even(build(), rounds=0)
    with pytest.raises(ValueError, match="exceeds max_position_embeddings=256"):
        measure_break_even(build(), context=250)
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        measure_break_even(build(num_nextn_predict_layers=0))
