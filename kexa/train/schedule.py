"""The learning-rate schedule: warm-up, stable, decay (WSD), as a pure function of the step.

    factor(t) = (t + 1) / W                       t < W          linear warm-up
              = 1                                 W <= t < S - D stable
              = 1 - sqrt((t + 1 - (S - D)) / (D + 1))  otherwise decay

with S steps in all, W = ceil(warmup_share * S) and D = ceil(decay_share * S). Every step of a run
has equally many tokens, so this is a function of the tokens seen as well.

reported: WSD with linear warm-up; peak 3.0e-4.
not reported: lengths and the shape of the decay. chosen: the two shares are config keys; the
decay is 1 - sqrt, which falls fast first. The ends are placed so that no step has a factor of
exactly zero.

Since all stable steps are alike, a decay can branch off any of them: :func:`branched` decays from a
step of a run that was planned longer, or had no planned end. Up to there its factors are those of
that run, so a checkpoint of the stable part continues under it, and equals bit for bit a run that
was planned this way from the start.

A schedule is any ``Callable[[int], float]``: ``functools.partial(wsd, steps=..., ...)`` is one.
"""

from __future__ import annotations

import math


def wsd(step: int, steps: int, warmup_share: float, decay_share: float) -> float:
    """The factor in (0, 1] that multiplies every peak learning rate at ``step`` (counted from 0).

    Example with 10 steps, ``warmup_share=0.2``, ``decay_share=0.3``: 0.5, 1, 1, 1, 1, 1, 1, then
    ``1 - sqrt(k / 4)`` for k = 1, 2, 3, which is 0.5, 0.293, 0.134.

    Raises:
        ValueError: a step outside 0..steps-1, or shares that are negative or add up to more than 1.
    """
    if min(warmup_share, decay_share) < 0 or warmup_share + decay_share > 1:
        raise ValueError(
            f"warmup_share={warmup_share} and decay_share={decay_share}: "
            "both must be at least 0 and their sum at most 1"
        )
    return _factor(step, steps, math.ceil(warmup_share * steps), math.ceil(decay_share * steps))


def branched(step: int, warmup: int, decay_from: int, decay: int) -> float:
    """The factor at ``step`` of a run that warms up, is stable and decays at chosen steps.

    Args:
        warmup: W, steps of warm-up: ``ceil(warmup_share * steps)`` of the run that is left.
        decay_from: S - D, the first step of the decay: a checkpoint's number of steps.
        decay: D, how many steps it lasts. The run ends after ``decay_from + decay`` steps.

    Example: ``branched(t, 2, 7, 3)`` is ``wsd(t, 10, 0.2, 0.3)`` at every t.

    Raises:
        ValueError: a step outside the run, no decay, or a decay that begins within the warm-up.
    """
    if not 0 <= warmup <= decay_from:
        raise ValueError(
            f"decay_from={decay_from} lies within a warm-up of {warmup} steps: branch off later"
        )
    if decay < 1:
        raise ValueError(f"decay={decay}: a branch needs at least one step")
    return _factor(step, decay_from + decay, warmup, decay)


def _factor(step: int, steps: int, warmup: int, decay: int) -> float:
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside 0..{steps - 1}")
    if step < warmup:
        return (step + 1) / warmup
    into_decay = step + 1 - (steps - decay)
    return 1.0 if into_decay <= 0 else 1 - math.sqrt(into_decay / (decay + 1))
