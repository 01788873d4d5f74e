"""Does self-drafting pay? The rule that switches it off, and what it did.

A round of drafting (one call of the MTP block, one of the main model on two tokens per row) costs
1 + a* plain steps (one call on one token per row) and yields 1 + a tokens per row, where a is the
share of drafts accepted. It pays where a > a*, the break-even acceptance. A batch ends with its
slowest row, so what counts is the row that gained least; after D rounds

    gain = accepted drafts of that row - sum of a* over the rounds         in plain steps

and a further round is drafted while gain - a* >= -slack * max_new_tokens: while the measured
acceptance is not below the break-even by more than slack * max_new_tokens / D, or so. Drafts that
do not pay thus cost at most ``slack`` of the time of ``max_new_tokens`` plain steps, and a few
unlucky ones at the start do not end it. Not counted is the block's own reading of the prompt, worth
some steps; so no batch begins where a* >= ``ceiling``, where little can be won.

The rule reads accepted drafts and the given a*, no clock. Greedy tokens do not depend on it at all.
Sampled tokens follow the same distribution with or without drafts, so a decision taken from past
tokens leaves it as it is; which tokens a seed gives is fixed by the rule and the batches together.

chosen: all of this rule; the report says only that the block may draft. chosen: a ceiling of 0.65;
a block trained at the laptop profile was seen to have 0.62 to 0.73 of its drafts accepted.

Legend: Q prompts, T new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class DraftRule:
    """When a batch stops drafting.

    Args:
        break_even: acceptance above which a round of drafting pays, by number of rows decoded
            together, e.g. from :func:`kexa.model.measure_break_even`. A number of rows that is
            missing counts as the next larger one, or as the largest.
        slack: share of ``max_new_tokens`` plain steps that drafting may lose.
        ceiling: break-even from which on nothing is drafted; at most 1, where nothing can pay.

    Raises:
        ValueError: no break-even, a number of rows below 1, a negative slack, a ceiling above 1.
    """

    break_even: Mapping[int, float]
    slack: float = 0.02
    ceiling: float = 0.65

    def __post_init__(self):
        if not self.break_even or min(self.break_even) < 1:
            raise ValueError(
                f"break_even={dict(self.break_even)} must name at least one number of rows >= 1"
            )
        if not self.slack >= 0:
            raise ValueError(f"slack={self.slack} must not be negative")
        if not self.ceiling <= 1:
            raise ValueError(f"ceiling={self.ceiling} must be at most 1: above, no draft pays")

    def at(self, rows: int) -> float:
        """The break-even acceptance of ``rows`` rows."""
        known = [size for size in self.break_even if size >= rows]
        return self.break_even[min(known) if known else max(self.break_even)]

    def pays(self, rows: int, gain: float, max_new_tokens: int) -> bool:
        """Whether ``rows`` rows draft in the next round; ``gain`` as in the module header."""
        cost = self.at(rows)
        return cost < self.ceiling and gain - cost >= -self.slack * max_new_tokens


ALWAYS = DraftRule({1: -math.inf})  # what ``self_draft=True`` means


@dataclass
class DraftStats:
    """What self-drafting did.

    ``position_QT`` (int8) is 1 where a new token is an accepted draft, 0 where the draft was
    rejected, -1 where none was made. ``main_calls`` and ``mtp_calls`` count forward calls, those on
    prompts included. ``drafted_rounds`` has one entry per batch, in the order decoded: after how
    many rounds the rule ended drafting (0: it never began), None where it did not.
    """

    position_QT: Tensor
    main_calls: int = 0
    mtp_calls: int = 0
    drafted_rounds: list[int | None] = field(default_factory=list)

    @property
    def drafted(self) -> int:
        return int((self.position_QT >= 0).sum())

    @property
    def accepted(self) -> int:
        return int((self.position_QT == 1).sum())
