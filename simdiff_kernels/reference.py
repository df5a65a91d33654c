"""The specification: all operators in plain PyTorch, in float64. Every backend is held to it.

Hidden states are `(outer, inner, hidden_size)`; `simdiff_kernels.ops` brings any shape into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simdiff_kernels.metrics import BLOCK_METRICS, METRICS, angular_distance, result_dtype


def _metrics(before: Tensor, after: Tensor) -> Tensor:
    """All metrics of every token, float64, shape `(num_metrics, outer, inner)`.

    The cosine distance is never one minus a rounded cosine. With a = ||x||, b = ||y||, d = y - x

        1 - cos(x, y) = (||d||^2 - (b - a)^2) / (2 a b),   b - a = (b^2 - a^2) / (a + b)

    and float64 sums, in which products of float32 values are exact.
    """
    x, y = before.double(), after.double()
    d = y - x
    a_squared, b_squared, d_squared = x.square().sum(-1), y.square().sum(-1), d.square().sum(-1)
    a, b = a_squared.sqrt(), b_squared.sqrt()

    norm_gap = (b_squared - a_squared) / (a + b)
    cosine = ((d_squared - norm_gap.square()) / (2 * a * b)).clamp(0, 2)
    cosine = torch.where(a * b == 0, (a != b).double(), cosine)
    relative = torch.where(a == 0, (d_squared != 0).double(), d_squared.sqrt() / a)
    return torch.stack([cosine, d_squared, d.abs().mean(-1), relative, a, b])


def _block_metrics(before: Tensor, after: Tensor) -> Tensor:
    """`BLOCK_METRICS` of every token, float64, shape `(num_block_metrics, outer, inner)`."""
    values = _metrics(before, after)[: len(BLOCK_METRICS) - 1]
    return torch.cat([values, angular_distance(values[METRICS.index("cosine_distance")])[None]])


def token_metrics(before: Tensor, after: Tensor) -> Tensor:
    """The metrics of `simdiff_kernels.metrics.TokenMetrics`, stacked along a new first axis."""
    return _metrics(before, after).to(result_dtype(before.dtype))


def accumulate(
    moments: Tensor,
    tallies: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor | None = None,
    per_token: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Fold all unmasked finite tokens into the running state of one layer, in place.

    Args:
        moments: float64 `(3, num_metrics)`: sums, sums of squares, maxima.
        tallies: int64 `(num_metrics + 3,)`: for each metric the index of the token that attained
            the maximum (the earliest; -1 before the first), then the number of tokens averaged,
            left out as not finite, and seen in all.
        before, after: hidden states `(outer, inner, hidden_size)`.
        mask: bool `(outer, inner)`, True where a token counts; None counts all.
        per_token: receives the metrics of every token, `(num_metrics, outer, inner)`.
        scratch: not used here; a GPU keeps the partial states of one update in it, int64, zero
            before its first use, see `simdiff_kernels.backends.scratch_words`.
    """
    if before.numel() == 0:
        return
    values = _metrics(before, after).flatten(1)
    if per_token is not None:
        per_token.copy_(values.view(per_token.shape))
    # A NaN or Inf anywhere in a token reaches its norms.
    finite = values[METRICS.index("norm_before")] + values[METRICS.index("norm_after")]
    finite = finite.isfinite()
    counted = torch.ones_like(finite) if mask is None else mask.flatten()
    used = finite & counted

    kept = torch.where(used, values, 0.0)
    peaks, positions = torch.where(used, values, -torch.inf).max(dim=1)
    sums, squares, maxima = moments.unbind(0)
    num_metrics = len(METRICS)
    argmax, num_seen = tallies[:num_metrics], tallies[num_metrics + 2]
    argmax.copy_(torch.where(peaks > maxima, positions + num_seen, argmax))
    maxima.copy_(torch.maximum(maxima, peaks))
    sums += kept.sum(1)
    squares += kept.square().sum(1)
    tallies[num_metrics] += used.sum()
    tallies[num_metrics + 1] += (counted & ~finite).sum()
    num_seen += used.numel()


def accumulate_blocks(
    moments: Tensor,
    tallies: Tensor,
    states: Sequence[Tensor],
    mask: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Fold all unmasked finite tokens into the running state of every block of layers, in place.

    States h_0 ... h_L are the hidden states between L layers. The block of layers i ... j - 1 turns
    h_i into h_j: its metrics are those of a layer with these before and after, and the angular
    distance arccos(cos) / pi = 2 atan2(sqrt(v), sqrt(2 - v)) / pi of each token, v its cosine
    distance. One pair at a time, so that no more than a few copies of one state are kept.

    Args:
        moments: float64 `(2 * num_block_metrics + 1, L + 1, L + 1)`: sums in the order of
            `BLOCK_METRICS`, sums of squares in the same order, and the maximum of the squared
            difference; entry [i, j] is of h_i and h_j. Entries with i >= j are never written; all
            are zero before the first token.
        tallies: int64 `(3,)`: tokens averaged, left out as not finite in any state, seen in all.
        states: L + 1 tensors `(outer, inner, hidden_size)` of one dtype, strides of their own.
        mask: bool `(outer, inner)`, True where a token counts; None counts all.
        scratch: not used here.
    """
    if states[0].numel() == 0:
        return
    finite = torch.ones(states[0].shape[:2], dtype=torch.bool, device=states[0].device)
    for state in states:  # a NaN or Inf anywhere in a token reaches its norm
        finite = finite & state.double().square().sum(-1).sqrt().isfinite()
    counted = torch.ones_like(finite) if mask is None else mask
    used = finite & counted

    num_metrics = len(BLOCK_METRICS)
    squared = BLOCK_METRICS.index("squared_difference")
    for j in range(1, len(states)):
        for i in range(j):
            kept = torch.where(used, _block_metrics(states[i], states[j]), 0.0).flatten(1)
            moments[:num_metrics, i, j] += kept.sum(1)
            moments[num_metrics:-1, i, j] += kept.square().sum(1)
            moments[-1, i, j] = torch.maximum(moments[-1, i, j], kept[squared].max())
    tallies[0] += used.sum()
    tallies[1] += (counted & ~finite).sum()
    tallies[2] += used.numel()
