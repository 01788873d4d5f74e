"""The decoding loop: one batch of prompts, a round of new tokens at a time.

    read the prompts -> choose the first token
    then each round    plain    the main model reads the last token and gives the next
                       drafted  the MTP block proposes a token after the last one; the main model
                                reads both in one call; the proposal stands or is replaced (see
                                ``sampling``), and where it stands the same call gives one more
    rows that reached a stop token or the limit leave the batch

Prompts of different lengths are padded on the left and equal ones read once. A prompt longer than
``prefill_chunk`` is read in several calls of at most that many tokens, so that activations and
window buffers stay bounded by the chunk; a batch must then differ in length by less than it.

Every row has its own uniform numbers, used in this order: one for the first token; then one per
round, or where drafts were asked for four: draft, acceptance, replacement, further token. A plain
round uses the first of its four. What a row gets is thus independent of its neighbours beyond
rounding (and beyond a :class:`DraftRule`, which looks at the batch).

Legend: B rows, R of them still unfinished, U distinct prompts, T tokens, N = 1 or 2 tokens a round,
D hidden size, V vocabulary, C uniform numbers per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kexa.model.cache import Cache
from kexa.model.drafting import DraftRule
from kexa.model.sampling import choose, log_probabilities, verify
from kexa.model.transformer import KexaForCausalLM


@dataclass(frozen=True)
class Settings:
    """How to choose tokens and when to stop; ``rule`` is None where nothing is drafted."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    rule: DraftRule | None
    prefill_chunk: int

    @property
    def uniforms(self) -> int:
        """Uniform numbers that a row may use."""
        later = self.max_new_tokens - 1
        return 1 + later * (1 if self.rule is None else 4)


class Round(NamedTuple):
    """New tokens of the rows that were unfinished: the first ``count_R`` of ``tokens_RN`` count."""

    rows_R: Tensor  # int64, which rows of the batch
    made_R: Tensor  # int64, new tokens they had before
    tokens_RN: Tensor  # int64
    logprobs_RN: Tensor  # fp32, nats
    count_R: Tensor  # int64, 1..N
    stopped_R: Tensor  # bool: the last token that counts is a stop token
    accepted_R: Tensor | None  # bool: the draft stood; None where none was made


class Batch:
    """Prompts being continued. Iterate over :meth:`rounds` once, without gradients."""

    def __init__(
        self,
        model: KexaForCausalLM,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        draws_BC: Tensor,
    ):
        self.model, self.prompts, self.settings, self.draws_BC = model, prompts, settings, draws_BC
        rule = settings.rule
        self.drafting = rule is not None and rule.pays(len(prompts), 0.0, settings.max_new_tokens)
        self.drafted_rounds = 0
        self.main_calls = self.mtp_calls = 0
        self._spent = 0.0  # plain steps that drafting cost beside those it replaced
        self._used = 0  # uniform numbers that each row has used
        device = draws_BC.device
        self._stop_S = torch.tensor(sorted(settings.stop_ids), dtype=torch.int64, device=device)
        self._rows_R = torch.arange(len(prompts), device=device)
        self._made_R = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self._most = 0  # upper bound of made_R that needs no device read

    def rounds(self) -> Iterator[Round]:
        """The new tokens, first to last."""
        hidden_RND = self._read_prompts()
        done = self._one_token(hidden_RND)
        self._used += 1
        while True:
            yield done
            kept = self._drop_finished(done)
            if kept is not None:
                if len(kept) == 0:
                    return
                hidden_RND = hidden_RND[kept]
                done = Round(*(None if x is None else x[kept] for x in done))
            self.drafting = self.drafting and self._pays()
            if self.drafting:
                done, hidden_RND = self._drafted_round(done, hidden_RND)
            else:
                done = self._plain_round(done)
            self._used += 1 if self.settings.rule is None else 4

    def _read_prompts(self) -> Tensor:
        """Fill the caches; hidden states [B, 1, D] of the last tokens. A group's prompt is read
        once."""
        model, chunk, device = self.model, self.settings.prefill_chunk, self.draws_BC.device
        unique = list(dict.fromkeys(tuple(p) for p in self.prompts))
        longest = max(len(p) for p in unique)
        ids_UT = torch.tensor([(0,) * (longest - len(p)) + p for p in unique], device=device)
        padding_U = torch.tensor([longest - len(p) for p in unique], device=device)
        documents_UT = None
        if padding_U.any():
            documents_UT = -(torch.arange(longest, device=device) < padding_U[:, None]).long()

        later = 1 if self.settings.rule is None else 2  # most tokens of a call after the prompt
        largest = later if longest <= chunk else max(later, chunk)
        self._cache = model.new_cache(len(unique), largest)
        self._mtp_cache: Cache | None = None
        if self.drafting:
            self._mtp_cache = model.new_mtp_cache(len(unique), max(later, chunk))
        for start in range(0, longest, chunk):
            part_UT = ids_UT[:, start : start + chunk]
            padded_UT = documents_UT[:, :chunk] if start == 0 and documents_UT is not None else None
            hidden_UTD = model.hidden_states(part_UT, padded_UT, self._cache)
            self.main_calls += 1
            next_UT = ids_UT[:, start + 1 : start + 1 + chunk]
            pairs = next_UT.shape[1]  # the prompt's last token has no next one yet
            if self.drafting and pairs:
                padded_UT = None if padded_UT is None else padded_UT[:, :pairs]
                model.mtp_hidden_states(next_UT, hidden_UTD[:, :pairs], padded_UT, self._mtp_cache)
                self.mtp_calls += 1
        if largest > later:
            self._cache.set_chunk(later)

        place = {prompt: i for i, prompt in enumerate(unique)}
        owner_B = torch.tensor([place[tuple(p)] for p in self.prompts], device=device)
        self._cache.keep_rows(owner_B)
        if self.drafting:
            self._mtp_cache.keep_rows(owner_B)
        return hidden_UTD[owner_B, -1:]

    def _plain_round(self, last: Round) -> Round:
        token_R1 = last.tokens_RN.gather(1, last.count_R[:, None] - 1)
        self.main_calls += 1
        return self._one_token(self.model.decode(token_R1, cache=self._cache))

    def _one_token(self, hidden_R1D: Tensor) -> Round:
        logp_R1V = self._log_probabilities(hidden_R1D)
        token_R = self._choose(logp_R1V[:, 0], self._uniform(0))
        return self._round(token_R[:, None], logp_R1V, None)

    def _drafted_round(self, last: Round, hidden_RND: Tensor) -> tuple[Round, Tensor]:
        """``hidden_RND``: the states that gave the last round's tokens, which the block reads with
        those tokens; returns the next ones."""
        model, rows = self.model, len(last.count_R)
        ahead_RND = model.mtp_hidden_states(last.tokens_RN, hidden_RND, cache=self._mtp_cache)
        self._mtp_cache.roll_back(last.tokens_RN.shape[1] - last.count_R)
        index_R = torch.arange(rows, device=ahead_RND.device)
        draft_logp_RV = self._log_probabilities(ahead_RND[index_R, last.count_R - 1])
        draft_R = self._choose(draft_logp_RV, self._uniform(0))

        token_R1 = last.tokens_RN.gather(1, last.count_R[:, None] - 1)
        pair_R2 = torch.cat((token_R1, draft_R[:, None]), dim=1)
        hidden_R2D = model.decode(pair_R2, cache=self._cache)
        self.main_calls, self.mtp_calls = self.main_calls + 1, self.mtp_calls + 1
        logp_R2V = self._log_probabilities(hidden_R2D)
        accepted_R, token_R = verify(
            draft_R,
            draft_logp_RV,
            logp_R2V[:, 0],
            self.settings.temperature,
            self.settings.top_p,
            self._uniform(1),
            self._uniform(2),
        )
        further_R = self._choose(logp_R2V[:, 1], self._uniform(3))
        done = self._round(torch.stack((token_R, further_R), dim=1), logp_R2V, accepted_R)
        self._cache.roll_back(2 - done.count_R)
        self.drafted_rounds += 1
        self._spent += self.settings.rule.at(rows)
        return done, hidden_R2D

    def _pays(self) -> bool:
        """The rule on the unfinished rows, of which each has made a token per round and one more
        per accepted draft."""
        accepted = int(self._made_R.min()) - 1 - self.drafted_rounds
        gain, rows = accepted - self._spent, len(self._rows_R)
        return self.settings.rule.pays(rows, gain, self.settings.max_new_tokens)

    def _round(self, tokens_RN: Tensor, logp_RNV: Tensor, accepted_R: Tensor | None) -> Round:
        """Where each row's new tokens end: at the first stop token, the limit, a refused draft."""
        logprobs_RN = logp_RNV.gather(2, tokens_RN[..., None])[..., 0]
        stop_RN = torch.isin(tokens_RN, self._stop_S)
        count_R = torch.ones_like(self._made_R)
        if accepted_R is not None:
            last_R = stop_RN[:, 0] | (self._made_R + 1 == self.settings.max_new_tokens)
            count_R = count_R + (accepted_R & ~last_R)
        stopped_R = stop_RN.gather(1, count_R[:, None] - 1)[:, 0]
        made_R, self._made_R = self._made_R, self._made_R + count_R
        self._most += tokens_RN.shape[1]
        return Round(self._rows_R, made_R, tokens_RN, logprobs_RN, count_R, stopped_R, accepted_R)

    def _drop_finished(self, done: Round) -> Tensor | None:
        """Which of the rows go on (indices), None for all of them."""
        limit = self.settings.max_new_tokens
        if len(self._stop_S) == 0 and self._most < limit:
            return None
        going_R = ~done.stopped_R & (self._made_R < limit)
        if going_R.all():
            return None
        kept = going_R.nonzero()[:, 0]
        if len(kept):
            self._rows_R, self._made_R = self._rows_R[kept], self._made_R[kept]
            self._cache.keep_rows(kept)
            if self.drafting:
                self._mtp_cache.keep_rows(kept)
        return kept

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return log_probabilities(self.model.lm_head(hidden), self.settings.temperature)

    def _choose(self, logp_RV: Tensor, uniform_R: Tensor) -> Tensor:
        return choose(logp_RV, self.settings.temperature, self.settings.top_p, uniform_R)

    def _uniform(self, number: int) -> Tensor:
        """The ``number``-th uniform number of this round for every unfinished row."""
        return self.draws_BC[self._rows_R, self._used + number]
