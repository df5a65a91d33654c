"""The names of what is measured for each token, in the order in which every backend stores it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenMetrics(NamedTuple):
    """What a layer did to each token; every field has the leading shape of the hidden states.

    With x the hidden state that enters, y the one that leaves and d = y - x; last the name of
    its mean over tokens:

        cosine_distance       1 - x.y / (||x|| ||y||), in [0, 2]       block influence (ShortGPT)
        squared_difference    sum of d^2 over the hidden dimension     MSSD (SimDiff, Eq. 4)
        absolute_difference   sum of |d| divided by hidden_size        MASD (SimDiff, Eq. 5)
        relative_difference   ||d|| / ||x||                            relative magnitude
        norm_before           ||x||
        norm_after            ||y||

    A zero vector has cosine distance 0 to another zero vector and 1 to anything else, and a
    relative difference of 0 and 1 likewise. A NaN or Inf in x or y makes the metrics that depend
    on it NaN or Inf.
    """

    cosine_distance: Tensor
    squared_difference: Tensor
    absolute_difference: Tensor
    relative_difference: Tensor
    norm_before: Tensor
    norm_after: Tensor


METRICS: tuple[str, ...] = TokenMetrics._fields
"""The names of the metrics of a token, in the order in which every backend stores them."""

BLOCK_METRICS: tuple[str, ...] = (*METRICS[:4], "angular_distance")
"""What is averaged for every block of layers: the first of `METRICS`, in their order, and
`angular_distance` of the cosine distance of each token."""

ROW_SUMS = ("before_squared", "after_squared", "difference_squared", "difference_absolute")
"""What one read of a token's two rows yields, in this order; all metrics follow from these."""

# Kinds of tokens, uint8: a bool mask is a tensor of the first two.
LEFT_OUT = 0
"""The kind of a token that is neither read nor counted."""
COUNTED = 1
"""The kind of a token that counts."""
APART = 2
"""The kind of a token that the last running state counts, apart from all others."""

# Tokens for each running state where one takes all.
ALL_TOKENS = 1 << 62

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 states give float64 metrics, narrower ones float32; sums are float64 for all."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def angular_distance(cosine_distance: Tensor) -> Tensor:
    """Angle between two vectors as a share of pi, from their cosine distance v.

    arccos(1 - v) / pi, computed as 2 atan2(sqrt(v), sqrt(2 - v)) / pi: arccos near 1 loses half
    of the digits and returns NaN when rounding carries its argument past 1.

    Args:
        cosine_distance: any shape, floating point, values in [0, 2].

    Returns:
        Values in [0, 1], same shape and dtype.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", Eq. 7.
    """
    half_angle = torch.atan2(cosine_distance.sqrt(), (2 - cosine_distance).sqrt())
    return half_angle * (2 / torch.pi)
