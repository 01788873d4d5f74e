"""Sampling: plain, self-drafted by the MTP block, and in ragged batches.

Every random choice is one uniform number from a generator on the CPU, turned into a token by
inverting the cumulative distribution in whole numbers (probability * 2^40). Integer sums do not
depend on the order of summation, so equal seeds give equal tokens on any device with the same
logits.

Self-drafting (lossless): after token x_t is chosen, the MTP block proposes x_{t+1}; the main model
then reads both in one call. With target distribution p and draft distribution q (same temperature
and top-p),

    accept the draft x with probability min(1, p(x) / q(x));
    otherwise draw from max(p - q, 0), normalised

gives exactly p (Leviathan et al. 2023). At temperature 0, accepting iff the draft is the argmax
gives the greedy tokens. An accepted draft yields two tokens for one call of the main model.

Legend: B rows (R of them still unfinished), T tokens, V vocabulary, Q prompts, U distinct prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kexa.model.transformer import KexaForCausalLM

_UNIT = float(2**40)


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    ``tokens`` include the stop token if one was reached; ``logprobs`` are in nats, one per token,
    of the untruncated softmax at the sampling temperature (at temperature 0: at temperature 1);
    ``stop_reason`` is ``"stop"`` or ``"length"``.
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str


@dataclass(frozen=True)
class DraftStats:
    """What self-drafting did.

    ``position_BT`` (int8) is 1 where a new token is an accepted draft, 0 where the draft was
    rejected, -1 where none was made; ``main_calls`` and ``mtp_calls`` count forward calls.
    """

    position_BT: Tensor
    main_calls: int
    mtp_calls: int

    @property
    def drafted(self) -> int:
        return int((self.position_BT >= 0).sum())

    @property
    def accepted(self) -> int:
        return int((self.position_BT == 1).sum())


@torch.no_grad()
def generate(
    model: KexaForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    self_draft: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every row by exactly ``max_new_tokens`` tokens; it is :func:`sample` that stops.

    Args:
        input_ids: int64 [B, T], no padding.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of most probable tokens that holds this mass.
        self_draft: let the MTP block draft; the distribution (greedy: the tokens) is unchanged.
        generator: CPU generator; None uses torch's global one.

    Returns:
        int64 [B, T + max_new_tokens].

    Raises:
        ValueError: empty prompt, bad number, sequence too long, or no MTP block to draft with.
    """
    if self_draft:
        ids, _ = generate_with_stats(
            model, input_ids, max_new_tokens, temperature, top_p, generator
        )
        return ids
    _check_arguments(max_new_tokens, temperature, top_p)
    _check_length(model, input_ids.shape[-1], max_new_tokens)
    batch = len(input_ids)
    draws_TB = _uniform((max_new_tokens, batch), generator, input_ids.device)
    cache = model.new_cache(batch)
    hidden_BTD = model.hidden_states(input_ids, cache=cache)
    tokens = [input_ids]
    for step in range(max_new_tokens):
        if step:
            hidden_BTD = model.decode(tokens[-1], cache=cache)
        logits_BV = model.lm_head(hidden_BTD[:, -1])
        tokens.append(choose(logits_BV, temperature, top_p, draws_TB[step])[:, None])
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def generate_with_stats(
    model: KexaForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, DraftStats]:
    """:func:`generate` with ``self_draft=True``, and what the drafts were worth."""
    _check_arguments(max_new_tokens, temperature, top_p)
    _check_length(model, input_ids.shape[-1], max_new_tokens)
    if model.mtp is None:
        raise ValueError("self_draft needs an MTP block: set num_nextn_predict_layers to 1")
    batch, prompt = input_ids.shape
    end = prompt + max_new_tokens
    device = input_ids.device
    rows_B = torch.arange(batch, device=device)
    ids_BT = torch.cat((input_ids, input_ids.new_zeros(batch, max_new_tokens + 1)), dim=1)
    outcome_BT = torch.full((batch, max_new_tokens), -1, dtype=torch.int8, device=device)

    def uniform() -> Tensor:
        return _uniform((batch,), generator, device)

    cache, mtp_cache = model.new_cache(batch), model.new_mtp_cache(batch)
    hidden_BTD = model.hidden_states(input_ids, cache=cache)
    main_calls, mtp_calls = 1, 0
    ids_BT[:, prompt] = choose(model.lm_head(hidden_BTD[:, -1]), temperature, top_p, uniform())
    # Each round a row knows its first ``known`` tokens, the main cache holds all of them but the
    # last, and the MTP block has ``fresh`` pairs (hidden state, next token) to read: those of the
    # prompt at first, then one or two.
    known_B = torch.full((batch,), prompt + 1, device=device)
    fresh_B = torch.full((batch,), prompt, device=device)
    next_BT = ids_BT[:, 1 : prompt + 1]
    while bool((known_B < end).any()):
        ahead_BTD = model.mtp_hidden_states(next_BT, hidden_BTD, cache=mtp_cache)
        mtp_cache.roll_back(next_BT.shape[1] - fresh_B)
        draft_logits_BV = model.lm_head(ahead_BTD[rows_B, (fresh_B - 1).clamp(min=0)])
        draft_B = choose(draft_logits_BV, temperature, top_p, uniform())

        pair_BT = torch.stack((ids_BT[rows_B, known_B - 1], draft_B), dim=1)
        hidden_BTD = model.decode(pair_BT, cache=cache)
        logits_BTV = model.lm_head(hidden_BTD)
        main_calls, mtp_calls = main_calls + 1, mtp_calls + 1
        accepted_B, token_B = verify(
            draft_B, draft_logits_BV, logits_BTV[:, 0], temperature, top_p, (uniform(), uniform())
        )
        bonus_B = choose(logits_BTV[:, 1], temperature, top_p, uniform())

        live_B = known_B < end  # a finished row stands still: everything it does is taken back
        accepted_B = accepted_B & live_B
        outcome_BT[rows_B[live_B], known_B[live_B] - prompt] = accepted_B[live_B].to(torch.int8)
        ids_BT[rows_B[live_B], known_B[live_B]] = token_B[live_B]
        ids_BT[rows_B[accepted_B], known_B[accepted_B] + 1] = bonus_B[accepted_B]
        fresh_B = live_B.long() + accepted_B.long()
        cache.roll_back(2 - fresh_B)
        next_BT = torch.stack((token_B, bonus_B), dim=1)
        known_B = known_B + fresh_B
    return ids_BT[:, :end], DraftStats(outcome_BT.cpu(), main_calls, mtp_calls)


@torch.inference_mode()
def sample(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    batch_size: int = 32,
) -> list[Completion]:
    """Continue prompts of different lengths until a stop token or ``max_new_tokens``.

    Prompts are batched by length and padded on the left; finished rows leave the batch. Each prompt
    has its own stream of uniform numbers, so its completion does not depend on ``batch_size`` or on
    its neighbours beyond rounding of the matrix products.

    Args:
        prompts: token ids, one non-empty sequence per completion (repeat a prompt for several).
        stop_ids: token ids that end a completion; the stop token is part of it.
        batch_size: most rows decoded together.
        temperature, top_p, generator: see :func:`generate`.

    Returns:
        One :class:`Completion` per prompt, in the order given.

    Raises:
        ValueError: empty prompt, bad number, or a sequence that would get too long.
    """
    _check_arguments(max_new_tokens, temperature, top_p)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: there is nothing to continue")
        _check_length(model, len(prompt), max_new_tokens)
    if not prompts:
        return []
    device = model.lm_head.weight.device
    stop_S = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    draws_QT = _uniform((len(prompts), max_new_tokens), generator, device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: list[Completion] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        completions = _sample_batch(
            model, [prompts[i] for i in batch], temperature, top_p, stop_S, draws_QT[batch]
        )
        for i, completion in zip(batch, completions, strict=True):
            done[i] = completion
    return done


def _sample_batch(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    top_p: float,
    stop_S: Tensor,
    draws_BT: Tensor,
) -> list[Completion]:
    device, steps = draws_BT.device, draws_BT.shape[1]
    unique = list(dict.fromkeys(tuple(p) for p in prompts))  # a group's prompt is read once
    longest = max(len(p) for p in unique)
    ids_UT = torch.tensor([(0,) * (longest - len(p)) + p for p in unique], device=device)
    padding_U = torch.tensor([longest - len(p) for p in unique], device=device)
    documents_UT = None
    if padding_U.any():
        documents_UT = -(torch.arange(longest, device=device) < padding_U[:, None]).long()
    cache = model.new_cache(len(unique), chunk=1)
    hidden_UTD = model.hidden_states(ids_UT, documents_UT, cache)
    place = {prompt: i for i, prompt in enumerate(unique)}
    owner_B = torch.tensor([place[tuple(p)] for p in prompts], device=device)
    cache.keep_rows(owner_B)
    hidden_BTD = hidden_UTD[owner_B, -1:]

    tokens_BT = torch.zeros(len(prompts), steps, dtype=torch.int64, device=device)
    logprobs_BT = torch.zeros(len(prompts), steps, device=device)
    length_B = torch.full((len(prompts),), steps, device=device)
    stopped_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows_R = torch.arange(len(prompts), device=device)  # rows still in the batch
    for step in range(steps):
        if step:
            hidden_BTD = model.decode(tokens_BT[rows_R, step - 1, None], cache=cache)
        logp_RV = log_probabilities(model.lm_head(hidden_BTD[:, -1]), temperature)
        if temperature == 0:
            token_R = logp_RV.argmax(-1)
        else:
            token_R = draw(nucleus(logp_RV.exp(), top_p), draws_BT[rows_R, step])
        tokens_BT[rows_R, step] = token_R
        logprobs_BT[rows_R, step] = logp_RV.gather(1, token_R[:, None])[:, 0]
        if len(stop_S):
            hit_R = torch.isin(token_R, stop_S)
            if hit_R.any():
                length_B[rows_R[hit_R]], stopped_B[rows_R[hit_R]] = step + 1, True
                going = (~hit_R).nonzero()[:, 0]
                rows_R = rows_R[going]
                if len(rows_R) == 0:
                    break
                cache.keep_rows(going)
    return [
        Completion(tokens[:n], logprobs[:n], "stop" if stopped else "length")
        for tokens, logprobs, n, stopped in zip(
            tokens_BT.tolist(),
            logprobs_BT.tolist(),
            length_B.tolist(),
            stopped_B.tolist(),
            strict=True,
        )
    ]


def log_probabilities(logits_BV: Tensor, temperature: float) -> Tensor:
    """Log-softmax in fp32 at ``temperature``; temperature 0, which has none, counts as 1."""
    logits_BV = logits_BV.float()
    if temperature not in (0, 1):
        logits_BV = logits_BV / temperature
    return logits_BV.log_softmax(-1)


def nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Each row cut to its smallest set of most probable tokens that holds ``top_p``."""
    if top_p == 1:
        return p_BV
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    units_BV = (sorted_BV * _UNIT).long()
    before_BV = units_BV.cumsum(-1) - units_BV
    kept_BV = torch.where(before_BV < top_p * _UNIT, sorted_BV, 0.0)
    p_BV = torch.zeros_like(p_BV).scatter_(1, order_BV, kept_BV)
    return p_BV / p_BV.sum(-1, keepdim=True)


def probabilities(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """The sampling distribution [B, V]: softmax at ``temperature > 0``, cut to the nucleus."""
    return nucleus(log_probabilities(logits_BV, temperature).exp(), top_p)


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per row, proportional to ``weights_BV``, from fp64 numbers in [0, 1)."""
    cumulative_BV = (weights_BV * _UNIT).long().cumsum(-1)
    target_B1 = (uniform_B[:, None] * cumulative_BV[:, -1:]).long()
    index_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return index_B1[:, 0].clamp(max=weights_BV.shape[1] - 1)


def choose(logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor) -> Tensor:
    """Next token of each row: the argmax at temperature 0, else a draw."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    return draw(probabilities(logits_BV, temperature, top_p), uniform_B)


def verify(
    draft_B: Tensor,
    draft_logits_BV: Tensor,
    logits_BV: Tensor,
    temperature: float,
    top_p: float,
    uniforms: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Rejection sampling: whether each draft stands [B], and the token [B] that does.

    The token is distributed as the target's own if ``draft_B`` was drawn from ``draft_logits_BV``
    at the same temperature and top-p.
    """
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B == draft_B, token_B
    p_BV = probabilities(logits_BV, temperature, top_p)
    q_BV = probabilities(draft_logits_BV, temperature, top_p)
    p_B, q_B = (x.gather(1, draft_B[:, None])[:, 0] for x in (p_BV, q_BV))
    accepted_B = uniforms[0] * q_B < p_B
    residual_BV = (p_BV - q_BV).clamp(min=0.0)
    return accepted_B, torch.where(accepted_B, draft_B, draw(residual_BV, uniforms[1]))


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)


def _check_arguments(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")


def _check_length(model: KexaForCausalLM, prompt: int, max_new_tokens: int) -> None:
    limit = model.config.max_position_embeddings
    if prompt + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {prompt} tokens plus max_new_tokens={max_new_tokens} exceeds "
            f"max_position_embeddings={limit}"
        )
