"""Continuations of prompts: all at once, or token by token as they are chosen.

    sample              ragged prompts, stop tokens
    sample_with_stats   the same, drafting, with what the drafts were worth
    stream              the same tokens, one at a time
    generate            rows of equal length, a fixed number of new tokens, as one tensor
    measure_break_even  what drafting costs here, for the rule that switches it off

All of them run the one loop of ``decoding``; ``sampling`` holds how a token is chosen and
``drafting`` the rule. Equal seeds give equal tokens, streamed or not.

Legend: B rows, R of them unfinished, T tokens, Q prompts, C uniform numbers per row.
"""

from __future__ import annotations

import enum
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kexa.model.decoding import Batch, Settings
from kexa.model.drafting import ALWAYS, DraftRule, DraftStats
from kexa.model.sampling import uniform
from kexa.model.transformer import KexaForCausalLM

PREFILL_CHUNK = 2048  # chosen


class StopReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"  # its last token is a stop token
    LENGTH = "length"  # it has max_new_tokens tokens


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    ``tokens`` include the stop token if one was reached; ``logprobs`` are in nats, one per token,
    of the untruncated softmax at the sampling temperature (at temperature 0: at temperature 1).
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason


class Token(NamedTuple):
    """One token of a stream: of prompt number ``prompt``; ``stop_reason`` comes with its last."""

    prompt: int
    token: int
    logprob: float
    stop_reason: StopReason | None


def generate(
    model: KexaForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    self_draft: bool | DraftRule = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every row by exactly ``max_new_tokens`` tokens; it is :func:`sample` that stops.

    Args:
        input_ids: int64 [B, T], no padding.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of most probable tokens that holds this mass.
        self_draft: let the MTP block draft, always or while a rule says so; the distribution
            (greedy: the tokens) is unchanged.
        generator: CPU generator; None uses torch's global one.

    Returns:
        int64 [B, T + max_new_tokens].

    Raises:
        ValueError: empty prompt, bad number, sequence too long, or no MTP block to draft with.
    """
    settings = _settings(model, max_new_tokens, temperature, top_p, (), self_draft, PREFILL_CHUNK)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids must be [rows >= 1, tokens >= 1], got shape {list(input_ids.shape)}"
        )
    _check_prompts(model, input_ids[:1].tolist(), max_new_tokens)
    draws_CB = uniform((settings.uniforms, len(input_ids)), generator, input_ids.device)
    done, _ = _collect(Batch(model, input_ids.tolist(), settings, draws_CB.T))
    new_BT = torch.tensor([completion.tokens for completion in done], device=input_ids.device)
    return torch.cat((input_ids, new_BT), dim=1)


def sample(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    self_draft: bool | DraftRule = False,
    prefill_chunk: int = PREFILL_CHUNK,
) -> list[Completion]:
    """Continue prompts of different lengths until a stop token or ``max_new_tokens``.

    Prompts are batched by length; finished rows leave the batch. Each prompt has its own stream of
    uniform numbers, so its completion does not depend on ``batch_size`` or on its neighbours beyond
    rounding of the matrix products. (Sampled with a :class:`DraftRule` it does: the rule looks at
    the whole batch. Its distribution does not.)

    Args:
        prompts: token ids, one non-empty sequence per completion (repeat a prompt for several).
        stop_ids: token ids that end a completion; the stop token is part of it.
        batch_size: most rows decoded together.
        prefill_chunk: most tokens of a prompt read in one call.
        temperature, top_p, generator, self_draft: see :func:`generate`.

    Returns:
        One :class:`Completion` per prompt, in the order given.

    Raises:
        ValueError: empty prompt, bad number, a sequence that would get too long, or no MTP block
        to draft with.
    """
    settings = _settings(
        model, max_new_tokens, temperature, top_p, stop_ids, self_draft, prefill_chunk
    )
    return _sample(model, prompts, settings, generator, batch_size)[0]


def sample_with_stats(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    self_draft: bool | DraftRule = True,
    prefill_chunk: int = PREFILL_CHUNK,
) -> tuple[list[Completion], DraftStats]:
    """:func:`sample`, drafting, and what the drafts were worth."""
    settings = _settings(
        model, max_new_tokens, temperature, top_p, stop_ids, self_draft, prefill_chunk
    )
    return _sample(model, prompts, settings, generator, batch_size)


def stream(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    self_draft: bool | DraftRule = False,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Token]:
    """The tokens of :func:`sample` (same arguments, same errors) as they are chosen.

    Prompts of one batch take turns; the tokens of each come in order. Whoever stops iterating stops
    the decoding.
    """
    settings = _settings(
        model, max_new_tokens, temperature, top_p, stop_ids, self_draft, prefill_chunk
    )
    return _stream(_batches(model, prompts, settings, generator, batch_size), max_new_tokens)


@torch.inference_mode()
def measure_break_even(
    model: KexaForCausalLM,
    rows: Sequence[int] = (1, 2, 4, 8, 16),
    context: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rounds: int = 15,
) -> dict[int, float]:
    """Break-even acceptance on this machine by number of rows decoded together.

    The time of a drafted round over that of a plain one, less one: the median of ``rounds`` ratios
    of rounds that take turns, behind ``context`` random tokens. The figures depend on the clock;
    measure once and pass them on in a :class:`DraftRule`.

    Raises:
        ValueError: no MTP block, a bad number, or no room for the rounds behind ``context``.
    """
    if rounds < 1 or context < 1 or min(rows, default=0) < 1:
        raise ValueError(f"rows={list(rows)}, context={context}, rounds={rounds}: need at least 1")
    new_tokens = 2 * (rounds + 1) + 2  # no row gets this far
    settings = {
        name: _settings(model, new_tokens, temperature, top_p, (), draft, PREFILL_CHUNK)
        for name, draft in (("plain", False), ("drafted", True))
    }
    seeded = torch.Generator().manual_seed(0)
    found = {}
    for size in rows:
        ids = torch.randint(model.config.vocab_size, (size, context), generator=seeded).tolist()
        _check_prompts(model, ids[:1], new_tokens)
        running = {}
        for name, how in settings.items():
            draws = uniform((size, how.uniforms), seeded, model.lm_head.weight.device)
            running[name] = Batch(model, ids, how, draws).rounds()
        for decoding in running.values():  # read the prompts, then one round to warm up
            next(decoding), next(decoding)
        ratios = []
        for _ in range(rounds):
            seconds = {name: _seconds(decoding) for name, decoding in running.items()}
            ratios.append(seconds["drafted"] / seconds["plain"])
        found[size] = statistics.median(ratios) - 1
    return found


def _seconds(decoding: Iterator) -> float:
    start = time.perf_counter()
    found = next(decoding)
    found.count_R.tolist()  # wait for the device
    return time.perf_counter() - start


def _sample(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    generator: torch.Generator | None,
    batch_size: int,
) -> tuple[list[Completion], DraftStats]:
    limit = settings.max_new_tokens
    done = [Completion([], [], StopReason.LENGTH) for _ in prompts]
    stats = DraftStats(torch.full((len(prompts), limit), -1, dtype=torch.int8))
    for which, batch in _batches(model, prompts, settings, generator, batch_size):
        completions, position_BT = _collect(batch)
        for i, completion in zip(which, completions, strict=True):
            done[i] = completion
        stats.position_QT[which] = position_BT
        stats.main_calls += batch.main_calls
        stats.mtp_calls += batch.mtp_calls
        stats.drafted_rounds.append(None if batch.drafting else batch.drafted_rounds)
    return done, stats


@torch.inference_mode()
def _collect(batch: Batch) -> tuple[list[Completion], Tensor]:
    """All rounds of a batch: its completions, and :attr:`DraftStats.position_QT` of its rows."""
    rows, limit, device = len(batch.prompts), batch.settings.max_new_tokens, batch.draws_BC.device
    tokens_BT = torch.zeros(rows, limit, dtype=torch.int64, device=device)
    logprobs_BT = torch.zeros(rows, limit, device=device)
    position_BT = torch.full((rows, limit), -1, dtype=torch.int8, device=device)
    length_B = torch.zeros(rows, dtype=torch.int64, device=device)
    stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)
    for new in batch.rounds():
        tokens_BT[new.rows_R, new.made_R] = new.tokens_RN[:, 0]
        logprobs_BT[new.rows_R, new.made_R] = new.logprobs_RN[:, 0]
        if new.accepted_R is not None:
            position_BT[new.rows_R, new.made_R] = new.accepted_R.to(torch.int8)
            two_R = new.count_R == 2
            rows_R, second_R = new.rows_R[two_R], new.made_R[two_R] + 1
            tokens_BT[rows_R, second_R] = new.tokens_RN[two_R, 1]
            logprobs_BT[rows_R, second_R] = new.logprobs_RN[two_R, 1]
        length_B[new.rows_R] = new.made_R + new.count_R
        stopped_B[new.rows_R] = new.stopped_R
    completions = [
        Completion(tokens[:n], logprobs[:n], StopReason.STOP if stopped else StopReason.LENGTH)
        for tokens, logprobs, n, stopped in zip(
            tokens_BT.tolist(),
            logprobs_BT.tolist(),
            length_B.tolist(),
            stopped_B.tolist(),
            strict=True,
        )
    ]
    return completions, position_BT.cpu()


@torch.inference_mode()
def _stream(batches: Iterator[tuple[list[int], Batch]], limit: int) -> Iterator[Token]:
    for which, batch in batches:
        for new in batch.rounds():
            columns = (new.rows_R, new.made_R, new.tokens_RN, new.logprobs_RN, new.count_R)
            lists = (column.tolist() for column in (*columns, new.stopped_R))
            for row, made, tokens, logprobs, count, stopped in zip(*lists, strict=True):
                reason = StopReason.LENGTH if made + count == limit else None
                reason = StopReason.STOP if stopped else reason
                for i in range(count):
                    last = i == count - 1
                    yield Token(which[row], tokens[i], logprobs[i], reason if last else None)


def _batches(
    model: KexaForCausalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    generator: torch.Generator | None,
    batch_size: int,
) -> Iterator[tuple[list[int], Batch]]:
    """Numbers of prompts of similar length, and the batch that continues them."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    _check_prompts(model, prompts, settings.max_new_tokens)
    device = model.lm_head.weight.device
    draws_QC = uniform((len(prompts), settings.uniforms), generator, device)
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        shortest = len(prompts[batches[-1][0]]) if batches else 0
        full = not batches or len(batches[-1]) == batch_size
        if full or len(prompts[i]) - shortest >= settings.prefill_chunk:
            batches.append([])
        batches[-1].append(i)
    return (
        (which, Batch(model, [prompts[i] for i in which], settings, draws_QC[which]))
        for which in batches
    )


def _settings(
    model: KexaForCausalLM,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: Collection[int],
    self_draft: bool | DraftRule,
    prefill_chunk: int,
) -> Settings:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
    if self_draft and model.mtp is None:
        raise ValueError("self_draft needs an MTP block: set num_nextn_predict_layers to 1")
    rule = ALWAYS if self_draft is True else (self_draft or None)
    return Settings(max_new_tokens, temperature, top_p, tuple(stop_ids), rule, prefill_chunk)


def _check_prompts(
    model: KexaForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: there is nothing to continue")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt of {len(prompt)} tokens plus max_new_tokens={max_new_tokens} exceeds "
                f"max_position_embeddings={limit}"
            )
