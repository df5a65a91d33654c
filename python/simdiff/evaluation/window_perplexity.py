"""Perplexity of windows of equal length that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.intervals import mean_loss
from simdiff.evaluation.losses import window_losses


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over all predicted tokens."""

    perplexity: float
    nll: float
    """Mean loss in nats per token."""
    standard_error: float | None
    """Of `nll`, over windows; None for a single one, as are the limits."""
    low: float | None
    """Of `perplexity`, 95% by Student's t over windows."""
    high: float | None
    num_tokens: int
    """Number of predicted tokens: one less than the window length for each window."""


def perplexity(
    model: PreTrainedModel, windows: Tensor, *, description: str = "perplexity"
) -> Perplexity:
    """Token-weighted perplexity on windows that do not overlap, each with its own context.

    Args:
        model: causal language model.
        windows: token ids `(num_windows, window_length)`; the first token of each is given, all
            others are predicted.

    Raises:
        SimdiffError: the loss of some window is NaN or Inf.
    """
    return perplexity_of(window_losses(model, windows, description=description), windows)


def perplexity_of(losses: Sequence[float], windows: Tensor) -> Perplexity:
    """The perplexity of windows from the mean loss of each.

    Raises:
        SimdiffError: the loss of some window is NaN or Inf.
    """
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise SimdiffError(
            f"perplexity: the loss must be finite, got NaN or Inf in {len(bad)} of "
            f"{len(losses)} windows, first in window {bad[0]}"
        )
    mean = mean_loss([(loss, 1) for loss in losses])  # all windows predict equally many tokens
    return Perplexity(mean.perplexity, **asdict(mean), num_tokens=windows[:, 1:].numel())
