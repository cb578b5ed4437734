"""Whether two recipes differ by more than their seeds: Welch's t-test, and the seeds it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, POWER = 0.05, 0.8  # of a test: chance of a false alarm, and of finding what is there
MOST_SEEDS = 1000  # that `seeds_needed` looks for
ANGLES = 2001  # points of the integral in `two_sided_p`


@dataclass(frozen=True)
class Comparison:
    """Two recipes: the mean of the second minus that of the first."""

    difference: float
    error: float  # standard error of the difference
    p: float  # chance of such a difference, or a larger one, if seeds were all that differs


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard error of the mean); the error of a single value is None."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(variance(values) / len(values)) if len(values) > 1 else None


def variance(values: Sequence[float]) -> float:
    """The unbiased variance of two values or more."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def welch(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Welch's t-test (Welch 1947) of two means, each of two values or more.

    It does not take the spreads of both to be equal. Values without any spread differ for certain,
    or not at all.
    """
    difference = mean_and_error(second)[0] - mean_and_error(first)[0]
    parts = [variance(values) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    if not error:
        return Comparison(difference, 0.0, 0.0 if difference else 1.0)
    counts = (len(first), len(second))
    spread = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    freedom = sum(parts) ** 2 / spread  # Welch-Satterthwaite
    return Comparison(difference, error, two_sided_p(difference / error, freedom))


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| ≥ |t|) of Student's t with so many degrees of freedom, at least 1.

    With t = √freedom · tan θ the density is cos(θ)^(freedom - 1), smooth and bounded.
    """
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, ANGLES)
    heights = np.maximum(np.cos(angles), 0.0) ** (freedom - 1)
    tail = float(heights.sum() - (heights[0] + heights[-1]) / 2) * float(angles[1] - angles[0])
    halves = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    return min(1.0, tail / (math.sqrt(math.pi) / 2 * math.exp(halves)))


def quantile(p: float, freedom: float) -> float:
    """The t whose `two_sided_p` is p."""
    low, high = 0.0, 1e3
    for _ in range(35):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > p else (low, middle)
    return high


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def seeds_needed(difference: float, deviation: float, level: float = LEVEL) -> int | None:
    """Seeds of each recipe with which a test probably finds a difference of this size.

    The usual approximation: n ≥ 2 (deviation / difference)² (t_level + t_power)², with the t of
    2 n - 2 degrees of freedom.

    Args:
        difference: of the means.
        deviation: standard deviation over seeds, of both recipes together.
        level: chance of a false alarm, two-sided.

    Returns:
        The number, which the test finds with a chance of `POWER`; None if it is over `MOST_SEEDS`.
    """

    def enough(n: int) -> bool:
        freedom = 2 * n - 2
        # two-sided 2 (1 - POWER) is one-sided 1 - POWER
        both = quantile(level, freedom) + quantile(2 * (1 - POWER), freedom)
        return n * difference**2 >= 2 * (deviation * both) ** 2

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # `low` is too few: a single seed has no spread
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
