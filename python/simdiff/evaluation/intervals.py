"""Confidence intervals of perplexities and their ratios, by Student's t over runs of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import exponential

CONFIDENCE = 0.95


Sums = Sequence[tuple[float, int]]
"""Summed loss in nats and number of tokens of each run; runs are treated as independent."""


@dataclass(frozen=True)
class MeanLoss:
    """A mean loss per token, and its exponential, a perplexity or a ratio, with a 95% interval."""

    nll: float
    """Mean loss in nats per token."""
    standard_error: float | None
    """Standard error of `nll`; like the limits, None with a single run of tokens."""
    low: float | None
    """Lower limit of the perplexity."""
    high: float | None

    @property
    def perplexity(self) -> float:
        """exp of `nll`."""
        return exponential(self.nll)


def mean_loss(sums: Sums) -> MeanLoss:
    """The mean loss per token over n runs of tokens, with a 95% interval.

    With sums l_i over c_i tokens, the mean is m = Σ l_i / Σ c_i and its standard error
    s = sqrt(Σ (l_i - m c_i)² / (n (n - 1))) n / Σ c_i, which is that of a mean if all c_i are
    equal. The interval is exp(m ± t s), where t is the quantile of Student's distribution with
    n - 1 degrees of freedom. The unit is a run of tokens, since losses of neighbouring tokens are
    not independent. (A percentile bootstrap of 16 windows covers 92%.)

    Source: Cochran, "Sampling Techniques" (1977), Section 6.4, for the error of a ratio.
    """
    tokens = sum(count for _, count in sums)
    mean = math.fsum(loss for loss, _ in sums) / tokens
    if len(sums) == 1:
        return MeanLoss(mean, None, None, None)
    squares = math.fsum((loss - mean * count) ** 2 for loss, count in sums)
    error = math.sqrt(squares * len(sums) / (len(sums) - 1)) / tokens
    reach = student_quantile(len(sums) - 1) * error
    return MeanLoss(mean, error, exponential(mean - reach), exponential(mean + reach))


def paired_mean_loss(sums: Sums, dense: Sums) -> MeanLoss:
    """The mean difference of two models' losses; its exponential is the ratio of perplexities.

    The difficulty of a run of tokens affects both losses and cancels in the difference. The
    interval is that of `mean_loss`.

    Raises:
        SimdiffError: the sums are not of the same runs of tokens.
    """
    if not sums or [count for _, count in sums] != [count for _, count in dense]:
        raise SimdiffError(
            f"paired_mean_loss: both models must have read the same runs of tokens, got "
            f"{[count for _, count in sums]} and {[count for _, count in dense]} tokens"
        )
    return mean_loss([(a - b, count) for (a, count), (b, _) in zip(sums, dense, strict=True)])


@dataclass(frozen=True)
class PerplexityInterval:
    """A perplexity and its ratio to the dense model's, each with an interval."""

    perplexity: float
    low: float | None
    """Lower limit of the perplexity; like the other limits, None with a single window."""
    high: float | None
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


def perplexity_interval(losses: Sequence[float], dense: Sequence[float]) -> PerplexityInterval:
    """A perplexity and its ratio to the dense model's, with 95% intervals as of `mean_loss`.

    Args:
        losses: finite mean negative log-likelihood of each window; the windows have equal length.
        dense: losses of the dense model on the same windows.

    Raises:
        SimdiffError: the numbers of losses differ.
    """
    own, theirs = ([(loss, 1) for loss in values] for values in (losses, dense))
    ratio, mean = paired_mean_loss(own, theirs), mean_loss(own)
    return PerplexityInterval(
        mean.perplexity, mean.low, mean.high, ratio.perplexity, ratio.low, ratio.high
    )


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence for Student's distribution.

    Args:
        degrees: degrees of freedom, 1 or more.
        confidence: a probability between 0 and 1.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3 and 26.7.4,
    for the probability, a finite sum in the angle arctan(t / sqrt(degrees)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _probability(angle, degrees) < confidence else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _probability(angle: float, degrees: int) -> float:
    odd = degrees % 2
    term, total = math.cos(angle) ** odd, 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
