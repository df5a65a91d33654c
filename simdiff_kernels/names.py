"""The names of what is measured, in the order in which every backend stores it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
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

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""The names of all backends."""
