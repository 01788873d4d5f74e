"""Trainer and sampler agree on probabilities; loops move what they should; routers stand still."""

import dataclasses

import pytest
import torch

from kexa.config import PreferenceConfig, RLConfig
from kexa.post import agapo, grouper, rollout, tasks
from kexa.post.rewards import Verdict
from kexa.post.rollout import (
    Group,
    Response,
    collate,
    freeze_router,
    judge,
    respond,
    response_logprobs,
)
from kexa.train import build_optimizers

RL = RLConfig(
    iterations=2,
    prompts=4,
    group_size=4,
    groups_per_pass=4,
    updates=2,
    epsilon=2.0,
    temperature=1.0,
    max_new_tokens=12,
    learning_rate=1e-2,
    weight_decay=0.0,
    heldout_prompts=0,
    heldout_samples=0,
)
PREFERENCE = PreferenceConfig(
    prompts=6,
    group_size=4,
    rule_weight=0.5,
    judge="rules",
    judge_model="",
    temperature=1.0,
    max_new_tokens=14,
    batch_prompts=3,
    epochs=1,
    learning_rate=3e-3,
    weight_decay=0.0,
    heldout_prompts=0,
    heldout_samples=0,
)


def sampled(model, tokenizer, thinking=True, temperature=1.0, seed=0, group_size=3):
    drawn = tasks.generate("math", "rl", 3, seed) + tasks.generate("instruction", "rl", 3, 1)
    return respond(
        model,
        tokenizer,
        [[{"role": "user", "content": task.prompt}] for task in drawn],
        group_size,
        thinking=thinking,
        max_new_tokens=14,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("thinking", [True, False])
def test_trainer_and_sampler_agree_on_every_token(model, tokenizer, thinking, temperature):
    batch = collate(sampled(model, tokenizer, thinking, temperature), pad=0)
    with torch.no_grad():
        logprobs = response_logprobs(model, batch, temperature)
    assert batch["mask"].sum() > 100
    assert (logprobs - batch["rollout_logprobs"]).abs().max() < 1e-5


def test_log_probabilities_equal_the_plain_log_softmax(model, tokenizer):
    batch = collate(sampled(model, tokenizer), pad=0)
    with torch.no_grad():
        got = response_logprobs(model, batch)
        for row in range(len(got)):
            length = int((batch["document_ids"][row] == 0).sum())
            ids = batch["input_ids"][row : row + 1, :length]
            plain = model(ids)[0].log_softmax(-1)
            for t in batch["mask"][row].nonzero()[:, 0].tolist():
                assert got[row, t].item() == pytest.approx(plain[t - 1, ids[0, t]].item(), abs=1e-5)
    assert got[~batch["mask"]].eq(0).all()


def test_the_same_generator_gives_the_same_responses(model, tokenizer):
    assert sampled(model, tokenizer, seed=4) == sampled(model, tokenizer, seed=4)
    assert sampled(model, tokenizer, seed=4) != sampled(model, tokenizer, seed=5)


def test_collate_by_hand():
    def response(*tokens):
        return Response(list(tokens), [-float(t) for t in tokens], True, "", "")

    groups = [Group([1, 2], [response(3), response(4, 5)]), Group([6], [response(7), response(8)])]
    batch = collate(groups, pad=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 0, 0], [6, 8, 0, 0]]
    assert batch["document_ids"].tolist() == [
        [0, 0, 0, -1],
        [0] * 4,
        [0, 0, -1, -1],
        [0, 0, -1, -1],
    ]
    assert batch["mask"].int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert batch["rollout_logprobs"][1].tolist() == [0, 0, -4, -5]


def test_a_cut_off_response_is_unreadable_even_when_its_text_is_right():
    task = tasks.generate("math", "rl", 1, 0)[0]
    done = Response([1], [0.0], True, "", task.answer)
    found = judge(task.check, Group([1], [done, dataclasses.replace(done, finished=False)]))
    assert [v.outcome for v in found] == ["right", "unreadable"]


def router_state(model):
    state = model.state_dict().items()
    return {name: value.clone() for name, value in state if ".mlp.gate." in name or "bias" in name}


def odd_length(answer):
    """A check by the parity of the length: an untrained model passes it now and then."""
    return Verdict("right" if len(answer) % 2 else "wrong")


def lucky_tasks(step):
    drawn = tasks.generate("math", "rl", RL.prompts, step)
    return [dataclasses.replace(task, check=odd_length) for task in drawn]


def finished(monkeypatch):
    """An untrained model never ends a reply: count every response as finished."""
    inner = rollout.respond

    def respond(*args, **kwargs):
        return [
            Group(
                group.prompt,
                [
                    dataclasses.replace(r, finished=True, answer=r.reasoning)
                    for r in group.responses
                ],
            )
            for group in inner(*args, **kwargs)
        ]

    monkeypatch.setattr(rollout, "respond", respond)


def test_agapo_moves_everything_but_the_router(model, tokenizer, monkeypatch):
    finished(monkeypatch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    routers = router_state(model)
    assert len(routers) == 2 * len(model.moe_layers)
    freeze_router(model)
    optimizers = build_optimizers(model, RL)
    iterations = list(agapo.train(model, optimizers, tokenizer, lucky_tasks, RL, seed=0))
    assert len(iterations) == RL.iterations
    assert any(it.kept_Q.any() for it in iterations)
    for name, value in router_state(model).items():
        assert value.equal(routers[name]), name
    for name, p in model.named_parameters():
        moves = not name.startswith("mtp.") and ".gate.weight" not in name
        assert moves != p.equal(before[name]), name


def test_only_the_first_update_of_a_rollout_is_on_policy(model, tokenizer, monkeypatch):
    finished(monkeypatch)
    freeze_router(model)
    optimizers = build_optimizers(model, RL)
    iteration = next(agapo.train(model, optimizers, tokenizer, lucky_tasks, RL, seed=0))
    first, second = iteration.ratios
    assert (first - 1).abs().max() < 1e-4
    assert (second - 1).abs().max() > 1e-2


def test_passes_bound_memory_and_leave_the_gradient(model, tokenizer, monkeypatch):
    """One optimizer step on four groups, in one pass and one group at a time."""
    monkeypatch.setattr(agapo, "rewards", lambda verdicts: torch.eye(4))
    freeze_router(model)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def draw(step):
        return tasks.generate("math", "rl", RL.prompts, step)

    norms, after = [], []
    for groups_per_pass in (4, 1):
        model.load_state_dict(state, strict=False)
        config = dataclasses.replace(RL, iterations=1, updates=1, groups_per_pass=groups_per_pass)
        sgd = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)]
        [iteration] = agapo.train(model, sgd, tokenizer, draw, config, seed=0)
        norms += iteration.grad_norms
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert norms[0] > 0
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[1], after[0], rtol=1e-4, atol=1e-6)


def test_a_batch_without_information_makes_no_update(model, tokenizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze_router(model)

    def draw(step):
        return tasks.generate("math", "rl", RL.prompts, step)

    iterations = list(agapo.train(model, build_optimizers(model, RL), tokenizer, draw, RL, seed=0))
    assert all(not it.kept_Q.any() and it.ratios == [] for it in iterations)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_grouper_raises_the_likelihood_of_what_is_preferred(model, tokenizer):
    config = dataclasses.replace(PREFERENCE, epochs=4)
    groups = sampled(model, tokenizer, group_size=4)
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    routers = router_state(model)
    freeze_router(model)
    optimizers = build_optimizers(model, config)
    steps = list(grouper.train(model, optimizers, groups, rewards, config, seed=0))
    assert len(steps) == 2 * 4
    first, last = steps[0].losses, steps[-1].losses
    assert last["preferred"] - last["rejected"] > first["preferred"] - first["rejected"]
    for name, value in router_state(model).items():
        assert value.equal(routers[name]), name


def test_tied_groups_are_left_out(model, tokenizer):
    config = dataclasses.replace(PREFERENCE, batch_prompts=1)
    groups = sampled(model, tokenizer, group_size=4)
    rewards = torch.zeros(6, 4)
    rewards[2] = torch.tensor([0.0, 1.0, 0.5, 0.5])
    freeze_router(model)
    optimizers = build_optimizers(model, config)
    assert len(list(grouper.train(model, optimizers, groups, rewards, config, seed=0))) == 1
