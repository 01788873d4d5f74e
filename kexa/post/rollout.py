"""Responses from a policy, and what another policy (or the same one later) thinks of their tokens.

    respond            prompts -> groups of responses, with each token's sampling log-probability
    attempt            tasks -> groups and the verdict of each task's rule on each response
    collate            groups -> one padded batch
    response_logprobs  the same log-probabilities under a model in training, with gradient

The sampler decodes with a cache, row by row; the trainer reads whole sequences. Both take the
log-softmax of fp32 logits at the sampling temperature, so with equal weights they agree to
rounding, and an importance ratio that differs from 1 means that the policy moved.

N rows (responses)   T positions   M counted tokens   D hidden   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kexa.data.chat import Message, encode_chat, parse_reply
from kexa.model import KexaForCausalLM, StopReason, sample
from kexa.post.rewards import Check, Verdict
from kexa.post.tasks import Task


@dataclass(frozen=True)
class Response:
    """One sampled reply: its tokens with the log-probability each had, and what they say.

    ``finished`` is false when the reply ran into the token limit.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    reasoning: str
    answer: str


@dataclass(frozen=True)
class Group:
    """A prompt and the responses sampled for it."""

    prompt: list[int]
    responses: list[Response]


def respond(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    group_size: int,
    *,
    thinking: bool,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    batch_size: int = 256,
) -> list[Group]:
    """Sample ``group_size`` replies to every conversation.

    Args:
        conversations: messages so far, the last one the user's.
        thinking: open the reply's think block, or close it empty.
        batch_size: most rows decoded together.
    """
    prompts = [
        encode_chat(tokenizer, c, add_generation_prompt=True, enable_thinking=thinking)[0]
        for c in conversations
    ]
    model.eval()
    completions = sample(
        model,
        [prompt for prompt in prompts for _ in range(group_size)],
        max_new_tokens,
        temperature=temperature,
        stop_ids=(model.config.eos_token_id,),
        generator=generator,
        batch_size=batch_size,
    )
    responses = []
    for completion in completions:
        reply = parse_reply(tokenizer, completion.tokens, thinking)
        responses.append(
            Response(
                completion.tokens,
                completion.logprobs,
                completion.stop_reason is StopReason.STOP,
                reply.get("reasoning_content", ""),
                reply["content"],
            )
        )
    return [
        Group(prompt, responses[i * group_size : (i + 1) * group_size])
        for i, prompt in enumerate(prompts)
    ]


def judge(check: Check, group: Group) -> list[Verdict]:
    """The check's verdict on every response. A response cut off by the limit is unreadable."""
    return [check(r.answer) if r.finished else Verdict("unreadable") for r in group.responses]


def attempt(
    model: KexaForCausalLM, tokenizer: Tokenizer, tasks: Sequence[Task], group_size: int, **sampling
) -> tuple[list[Group], list[list[Verdict]]]:
    """Responses to tasks and the verdicts on them; ``sampling`` as for :func:`respond`."""
    prompts = [[{"role": "user", "content": task.prompt}] for task in tasks]
    groups = respond(model, tokenizer, prompts, group_size, **sampling)
    return groups, [judge(t.check, g) for t, g in zip(tasks, groups, strict=True)]


def rewards(verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
    """Rewards [Q, G] of verdicts, fp32."""
    return torch.tensor([[v.reward for v in row] for row in verdicts])


def collate(groups: Sequence[Group], pad: int) -> dict[str, Tensor]:
    """A right-padded batch of rows prompt + response, group after group.

    Returns:
        ``input_ids`` [N, T] int64; ``document_ids`` [N, T], 0 on tokens and -1 on padding; ``mask``
        [N, T], true on response tokens; ``rollout_logprobs`` [N, T] fp32, 0 outside the mask.
    """
    pairs = [(group.prompt, response) for group in groups for response in group.responses]
    rows = [[*prompt, *response.tokens] for prompt, response in pairs]
    input_ids = pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(r) for r in rows])[:, None]
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    position = torch.arange(input_ids.shape[1])
    mask = (position >= starts) & (position < lengths)
    logprobs = torch.zeros(input_ids.shape)
    logprobs[mask] = torch.tensor([x for _, response in pairs for x in response.logprobs])
    return {
        "input_ids": input_ids,
        "document_ids": -(position >= lengths).long(),
        "mask": mask,
        "rollout_logprobs": logprobs,
    }


def response_logprobs(
    model: KexaForCausalLM, batch: dict[str, Tensor], temperature: float = 1.0
) -> Tensor:
    """Log-probability of every response token given what precedes it, [N, T]; 0 outside the mask.

    The vocabulary projection, the widest product of the model, runs on the counted positions only.
    """
    mask_NT = batch["mask"][:, 1:]
    hidden_NTD = model.hidden_states(batch["input_ids"], batch["document_ids"])[:, :-1]
    logits_MV = model.lm_head(hidden_NTD[mask_NT]).float() / temperature
    targets_M = batch["input_ids"][:, 1:][mask_NT]
    chosen_M = logits_MV.gather(1, targets_M[:, None])[:, 0] - logits_MV.logsumexp(1)
    logprobs_NT = chosen_M.new_zeros(mask_NT.shape).masked_scatter(mask_NT, chosen_M)
    return torch.nn.functional.pad(logprobs_NT, (1, 0))


def freeze_router(model: KexaForCausalLM) -> None:
    """Stop the routers from learning (reported for reinforcement learning).

    Their selection biases are not parameters; they stand still as long as nobody calls
    ``model.update_balance_bias``.
    """
    for layer in model.moe_layers:
        layer.gate.weight.requires_grad_(False)
