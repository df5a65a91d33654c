"""What `finish` returns, and how a running state becomes it: means, standard errors, maxima."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .metrics import BLOCK_METRICS, METRICS

_ABSOLUTE = "absolute_difference"


class NonFiniteError(ValueError):
    """A hidden state held NaN or Inf; `tokens_by_layer` tells how many tokens of which layer."""

    def __init__(self, tokens_by_layer: dict[int, int], seen_by_layer: dict[int, int]) -> None:
        """Say which layers, and how many of their tokens."""
        self.tokens_by_layer = tokens_by_layer
        layers = ", ".join(
            f"layer {layer}: {count} of {seen_by_layer[layer]} tokens"
            for layer, count in tokens_by_layer.items()
        )
        super().__init__(f"hidden states must be finite, found NaN or Inf in {layers}")


class BlockNonFiniteError(NonFiniteError):
    """Some token held NaN or Inf in one of its hidden states; which layers is not kept."""

    def __init__(self, num_nonfinite: int, num_seen: int) -> None:
        """Say how many tokens."""
        self.tokens_by_layer = {}
        self.num_nonfinite = num_nonfinite
        ValueError.__init__(
            self,
            f"hidden states must be finite, found NaN or Inf in {num_nonfinite} of {num_seen} "
            "tokens",
        )


@dataclass(frozen=True)
class MetricSummary:
    """One metric over the tokens of every layer; float64 CPU tensors of shape `(num_layers,)`."""

    mean: Tensor
    """Over the tokens averaged, in the metric's own unit (`TokenMetrics`)."""
    standard_error: Tensor
    """Of the mean, tokens taken as independent; NaN for a single token."""
    maximum: Tensor
    """Over the tokens averaged."""
    argmax: Tensor
    """int64: which token attained the maximum (the first, if several), counted over all tokens
    given to `RunningScores.update` for the layer, masked ones too, in row-major order."""


@dataclass(frozen=True)
class RunningSummary(Mapping[str, MetricSummary]):
    """The result of `RunningScores.finish`: a `MetricSummary` for each name in `METRICS`."""

    num_tokens: Tensor
    """int64 `(num_layers,)`: tokens averaged."""
    num_nonfinite: Tensor
    """int64 `(num_layers,)`: tokens left out because of a NaN or Inf."""
    metrics: dict[str, MetricSummary]

    def __getitem__(self, name: str) -> MetricSummary:
        """The summary of the metric called `name`."""
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the metrics."""
        return iter(self.metrics)

    def __len__(self) -> int:
        """The number of metrics."""
        return len(self.metrics)


@dataclass(frozen=True)
class BlockSummary:
    """The metrics of every block of layers; float64 CPU tensors of shape `(L + 1, L + 1)`.

    Entry [i, j] with i < j is the block of layers i ... j - 1, which turns hidden state h_i into
    h_j; all other entries are zero. Formulas: `TokenMetrics`, with x = h_i and y = h_j, and
    `simdiff_kernels.angular_distance` of each token's cosine distance.
    """

    num_tokens: int
    """Tokens averaged."""
    num_nonfinite: int
    """Tokens left out of all blocks because of a NaN or Inf in any state."""
    cosine_distance: Tensor
    """Mean over tokens of 1 - cos(x, y), in [0, 2]."""
    squared_difference: Tensor
    """Mean over tokens of sum (y - x)^2 over the hidden dimension."""
    squared_difference_maximum: Tensor
    """Maximum over tokens of sum (y - x)^2 over the hidden dimension."""
    absolute_difference: Tensor | None
    """Mean over tokens of sum |y - x| / hidden_size; None where it was not asked for."""
    relative_difference: Tensor
    """Mean over tokens of ||y - x|| / ||x||."""
    angular_distance: Tensor
    """Mean over tokens of arccos(cos(x, y)) / pi; a zero vector is at 0 of another and at 1/2 of
    anything else."""
    standard_error: dict[str, Tensor]
    """Of each mean, by the name of its metric, tokens taken as independent; NaN for a single
    token."""


def _mean_and_error(sums: Tensor, squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of `count` values and its standard error, which is NaN for a single value."""
    mean = sums / count
    # Rounding may leave a variance of constant values just below zero.
    variance = (squares / count - mean.square()).clamp_min(0) / (count - 1)
    return mean, torch.where(count > 1, variance, torch.nan).sqrt()


def summary_of(moments: Tensor, counts: Tensor, *, allow_nonfinite: bool = False) -> RunningSummary:
    """Means, standard errors and maxima of every layer from its running state, on the host.

    Args:
        moments: float64 `(num_layers, 3, num_metrics)`: sums, sums of squares, maxima.
        counts: int64 `(num_layers, num_metrics + 3)`: the token of each maximum, then tokens
            averaged, left out as not finite, and seen. `join_states` makes one state of parts.
        allow_nonfinite: summarise the finite tokens even if others held NaN or Inf.

    Raises:
        NonFiniteError: some token held NaN or Inf, and that is not allowed.
        ValueError: a layer without a single token to average.
    """
    argmax = counts[:, : len(METRICS)]
    num_tokens, num_nonfinite, num_seen = counts[:, len(METRICS) :].unbind(1)
    if not allow_nonfinite and bool(num_nonfinite.any()):
        bad = num_nonfinite.nonzero().flatten().tolist()
        raise NonFiniteError(
            {layer: int(num_nonfinite[layer]) for layer in bad},
            {layer: int(num_seen[layer]) for layer in bad},
        )
    for layer in range(len(num_tokens)):
        if num_tokens[layer] == 0:
            raise ValueError(
                f"RunningScores.finish: layer {layer} must have at least one token to "
                f"average, got {int(num_seen[layer])} seen, of which "
                f"{int(num_nonfinite[layer])} not finite and all others masked"
            )
    sums, squares, maxima = moments.unbind(1)
    mean, error = _mean_and_error(sums, squares, num_tokens.double().unsqueeze(1))
    return RunningSummary(
        num_tokens=num_tokens,
        num_nonfinite=num_nonfinite,
        metrics={
            name: MetricSummary(mean[:, m], error[:, m], maxima[:, m], argmax[:, m])
            for m, name in enumerate(METRICS)
        },
    )


def block_summary_of(
    moments: Tensor,
    counts: Tensor,
    absolute_difference: bool = False,
    *,
    allow_nonfinite: bool = False,
) -> BlockSummary:
    """Means, standard errors and the maximum of every block of layers from its running state.

    Args:
        moments: float64 `(2 * num_block_metrics + 1, L + 1, L + 1)`, on the host: sums and sums of
            squares in the order of `BLOCK_METRICS`, and the maximum of the squared difference.
        counts: int64 `(3,)`: tokens averaged, left out as not finite, and seen.
        absolute_difference: whether the state measured it; else the result has None for it.
        allow_nonfinite: summarise the finite tokens even if others held NaN or Inf.

    Raises:
        NonFiniteError: some token held NaN or Inf, and that is not allowed.
        ValueError: no token to average.
    """
    num_tokens, num_nonfinite, num_seen = counts.tolist()
    if num_nonfinite and not allow_nonfinite:
        raise BlockNonFiniteError(num_nonfinite, num_seen)
    if num_tokens == 0:
        raise ValueError(
            f"RunningBlockScores.finish: there must be at least one token to average, got "
            f"{num_seen} seen, of which {num_nonfinite} not finite and all others masked"
        )
    sums, squares = moments[:-1].chunk(2)
    mean, error = _mean_and_error(sums, squares, counts[0].double())
    measured = {
        name: m for m, name in enumerate(BLOCK_METRICS) if name != _ABSOLUTE or absolute_difference
    }
    means: dict[str, Any] = {name: mean[m] for name, m in measured.items()}
    return BlockSummary(
        num_tokens=num_tokens,
        num_nonfinite=num_nonfinite,
        squared_difference_maximum=moments[-1],
        standard_error={name: error[m].triu(1) for name, m in measured.items()},
        **{_ABSOLUTE: None} | means,
    )
