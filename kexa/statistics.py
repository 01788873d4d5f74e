"""Intervals for the numbers we report: every comparison in a notebook carries one.

    wilson           a share of successes (accuracy, acceptance, safe rate)
    mean_interval    the mean of independent values (rewards over prompts, losses over seeds)
    mean_band        the same of every point of several curves
    paired_interval  the mean of after - before on the same items: what a before/after claim needs

Wilson (1927): for a share p of n trials and the normal quantile z,

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half   = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

which stays inside [0, 1] and is honest at 0 and n, where the textbook interval has width zero.
Means use Student's t, so five seeds get the wide interval they deserve. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and the two-sided interval around it."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share. ``wilson(8, 10)`` is about 0.8 [0.490, 0.943].

    Raises:
        ValueError: no trials, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"{successes} successes in {n} trials: need n >= 1 and 0 <= successes <= n"
        )
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    scale = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / scale
    # at 0 and n the bound is exactly 0 or 1; rounding must not put the share outside
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean_interval(x: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Student's t interval of a mean. ``mean_interval([1, 2, 3])`` is 2 [-0.484, 4.484].

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    x = np.asarray(x, dtype=np.float64).ravel()
    if x.size < 2:
        raise ValueError(f"{x.size} value(s): an interval of a mean needs at least two")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are not finite")
    mean = float(x.mean())
    half = t_quantile(0.5 + level / 2, x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half)


def mean_band(
    curves: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95
) -> tuple[list[float], list[float], list[float]]:
    """:func:`mean_interval` at every point of curves [S, P]: means, lower and upper ends, each P.

    Raises:
        ValueError: curves of different lengths, or what :func:`mean_interval` refuses.
    """
    points = [mean_interval(column, level) for column in zip(*curves, strict=True)]
    return tuple(map(list, zip(*points, strict=True)))


def paired_interval(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, level: float = 0.95
) -> Interval:
    """Interval of mean(after - before), item by item. Above zero: after is better on these items.

    Raises:
        ValueError: different lengths, or what :func:`mean_interval` refuses.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"paired values need equal shapes, got {before.shape} and {after.shape}")
    return mean_interval(after - before, level)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a probability in [0.5, 1), by bisection on the exact CDF."""
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if _t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0, whole degrees of freedom: Abramowitz and Stegun 26.7.3, 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(theta) ** 2
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(1 if odd else 0, degrees - 1, 2):  # cos^k theta with its double-factorial weight
        total += term
        term *= cos2 * (k + 1) / (k + 2)
    if odd:
        return 0.5 + (theta + math.sin(theta) * total) / math.pi
    return 0.5 + math.sin(theta) * total / 2
