"""Intervals of perplexity by the bootstrap over windows, dense and pruned on the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from simdiff.errors import SimdiffError
from simdiff.evaluation import exponential

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PerplexityInterval:
    """A perplexity and its ratio to the dense model's, each with an interval."""

    perplexity: float
    low: float | None
    """None with a single window, as are the other limits."""
    high: float | None
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


def perplexity_interval(
    losses: Sequence[float], dense: Sequence[float], *, seed: int = 0
) -> PerplexityInterval:
    """Percentile intervals of exp(mean loss) and of its ratio to the dense model's.

    Windows are drawn with replacement, the same ones for both models: how hard a text is moves both
    perplexities and cancels in their ratio. Windows, not tokens, for the losses of neighbouring
    tokens are not independent.

    Args:
        losses: finite mean negative log-likelihood of each window.
        dense: of the dense model on the same windows.
        seed: of the draws.

    Raises:
        SimdiffError: not as many losses of one model as of the other.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), Section 13.3; paired.
    """
    if len(losses) != len(dense) or not losses:
        raise SimdiffError(
            f"perplexity_interval: losses must be of the dense model's {len(dense)} windows, got "
            f"{len(losses)}"
        )
    pruned, whole = (torch.tensor(values, dtype=torch.float64) for values in (losses, dense))
    perplexity, ratio = float(pruned.mean().exp()), float((pruned - whole).mean().exp())
    if len(losses) == 1:
        return PerplexityInterval(perplexity, None, None, ratio, None, None)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(losses), (NUM_RESAMPLES, len(losses)), generator=generator)
    limits = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = (exponential(x) for x in pruned[drawn].mean(1).quantile(limits).tolist())
    gaps = (pruned - whole)[drawn].mean(1).quantile(limits).tolist()
    return PerplexityInterval(perplexity, low, high, ratio, *map(exponential, gaps))
