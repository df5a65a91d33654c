"""Ratios of what ran interleaved, each with the interval that its rounds leave.

The median over rounds of the ratio within a round, and order statistics around it
(`simdiff.speed.paired_ratio.paired_ratio`): they hold the true median with probability `coverage`,
whatever the distribution; with 9 rounds the second smallest and the second largest, 0.961.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simdiff.speed.paired_ratio import paired_ratio

METHOD = "median of the rounds' ratios [order statistics that hold the true median]"


def of_rounds(
    above: Mapping[str, Sequence[float]], below: Sequence[float]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """By name, the ratio to `below`, and its interval: `low`, `high` and `coverage`."""
    found = {name: paired_ratio(times, below) for name, times in above.items()}
    return (
        {name: ratio.median for name, ratio in found.items()},
        {
            name: {"low": ratio.low, "high": ratio.high, "coverage": ratio.coverage}
            for name, ratio in found.items()
        },
    )


def shown(
    ratio: float | None, interval: Mapping[str, Any] | None, form: int | str = "digits"
) -> str:
    """With its interval, `2.34 [2.30, 2.41]`; without where none is known.

    `form` is "digits" (three of them), "percent" or a number of decimals.
    """
    if ratio is None:
        return ""

    def text(value: float) -> str:
        if form == "percent":
            return f"{100 * value:.2f}%"
        if form != "digits":
            return f"{value:.{form}f}"
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    if interval is None:
        return text(ratio)
    return f"{text(ratio)} [{text(interval['low'])}, {text(interval['high'])}]"
