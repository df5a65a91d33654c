"""What is measured for each token: the names, the dtypes, and the angle of a cosine distance."""

from __future__ import annotations

import torch
from torch import Tensor

from .names import (
    ALL_TOKENS,
    APART,
    BLOCK_METRICS,
    COUNTED,
    LEFT_OUT,
    METRICS,
    ROW_SUMS,
    TokenMetrics,
)

__all__ = [
    "ALL_TOKENS",
    "APART",
    "BLOCK_METRICS",
    "COUNTED",
    "LEFT_OUT",
    "METRICS",
    "ROW_SUMS",
    "SUPPORTED_DTYPES",
    "TokenMetrics",
    "angular_distance",
    "result_dtype",
]

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
