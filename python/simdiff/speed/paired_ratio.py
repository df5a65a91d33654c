"""Medians with quartiles, and medians of the ratios of paired rounds with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with an interval by order statistics."""

    median: float
    low: float
    high: float
    coverage: float
    """Coverage of the interval: at least 0.95 from 6 pairs on, less with fewer."""


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, interpolated between the values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The median of the rounds' ratios, with an interval for the true median.

    The true median is between the k-th smallest and the k-th largest of n ratios with probability
    1 − 2·P(Binomial(n, 1/2) < k), for any distribution; k is the largest that gives 0.95, or 1.

    Source: David and Nagaraja, "Order Statistics" (2003), Section 7.1.
    """
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    count = len(ratios)

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(count, i) for i in range(rank)) / 2**count

    rank = max((k for k in range(1, count // 2 + 1) if coverage(k) >= CONFIDENCE), default=1)
    return Ratio(
        statistics.median(ratios), ratios[rank - 1], ratios[count - rank], max(0.0, coverage(rank))
    )
