"""The specification: all operators in plain PyTorch, in float64. Every backend is held to it.

For a layer, x is a token's hidden state before it, y the one after it and d = y - x; for a block of
layers i ... j - 1, x = h_i and y = h_j. The signatures are those of the registered operators.
Hidden states are `(outer, inner, hidden_size)`; `simdiff_kernels.ops` brings any shape into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .metrics import (
    ALL_TOKENS,
    APART,
    BLOCK_METRICS,
    COUNTED,
    LEFT_OUT,
    METRICS,
    angular_distance,
    result_dtype,
)
from .trust import LARGEST_SHORT, MOST_CANCELLED, SHORTEST_AFTER, SMALLEST_SHORT


def row_sums(sums: Tensor, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
    """Write sum x^2, sum y^2, sum d^2 and sum |d| of every token, d = y - x, in that order.

    In float64 products of float32 values are exact.

    Args:
        sums: float64 `(outer, inner, 4)`, written.
        before, after: hidden states x and y, `(outer, inner, hidden_size)`.
        mask: bool `(outer, inner)`; where it is False nothing is read and zeros are written.
    """
    x, y = before.double(), after.double()
    d = y - x
    found = torch.stack(
        [x.square().sum(-1), y.square().sum(-1), d.square().sum(-1), d.abs().sum(-1)], dim=-1
    )
    sums.copy_(found if mask is None else torch.where(mask.unsqueeze(-1), found, 0.0))


def metrics_of_sums(sums: Tensor, hidden_size: int) -> Tensor:
    """All metrics of every token from its row sums `(..., 4)`: float64 `(num_metrics, ...)`.

    The cosine distance is never one minus a rounded cosine. With a = ||x||, b = ||y||

        1 - cos(x, y) = (||d||^2 - (b - a)^2) / (2 a b),   b - a = (b^2 - a^2) / (a + b)
    """
    a_squared, b_squared, d_squared, d_absolute = sums.unbind(-1)
    a, b = a_squared.sqrt(), b_squared.sqrt()
    norm_gap = (b_squared - a_squared) / (a + b)
    cosine = ((d_squared - norm_gap.square()) / (2 * a * b)).clamp(0, 2)
    cosine = torch.where(a * b == 0, (a != b).double(), cosine)
    relative = torch.where(a == 0, (d_squared != 0).double(), d_squared.sqrt() / a)
    return torch.stack([cosine, d_squared, d_absolute / hidden_size, relative, a, b])


def float32_is_enough(sums: Tensor) -> Tensor:
    """Whether a token's row sums may be formed in float32, else they are formed in float64.

    This backend never does the former. `simdiff_kernels.trust` has the condition.

    Args:
        sums: `(..., 4)`, what `row_sums` writes.

    Returns:
        bool `(...)`; False where a sum is NaN or Inf.
    """
    x, y, d, absolute = sums.unbind(-1)
    below = (sums[..., :3] < LARGEST_SHORT).all(-1)
    in_range = below & (x > SMALLEST_SHORT) & (y > SHORTEST_AFTER * x)
    turned = (d >= SMALLEST_SHORT) & ((y - x).square() <= MOST_CANCELLED * d * (x + y))
    return in_range & (((d == 0) & (absolute == 0)) | turned)


def _metrics(before: Tensor, after: Tensor) -> Tensor:
    """All metrics of every token, float64, shape `(num_metrics, outer, inner)`."""
    sums = before.new_empty((*before.shape[:2], 4), dtype=torch.float64)
    row_sums(sums, before, after)
    return metrics_of_sums(sums, before.shape[-1])


def fold(
    moments: Tensor,
    counts: Tensor,
    sums: Tensor,
    hidden_size: int,
    kinds: Tensor | None = None,
    first_state: int = 0,
    offset: int = 0,
    tokens_per_state: int = ALL_TOKENS,
    apart: bool = False,
    per_token: Tensor | None = None,
) -> None:
    """Turn row sums into metrics and fold them into running states, all layers at once, in place.

    Token t of a layer, counted in row-major order, belongs to state
    `first_state + (offset + t) // tokens_per_state`: a group of sequences, or a part of the batch.
    Tokens of kind `APART` belong to the last state instead, which `apart` reserves for them.
    Every state counts all tokens of a call as seen, its own or not, so that an index of a maximum
    means the same in each of them.

    Args:
        moments: float64 `(states, layers, 3, num_metrics)`: sums, sums of squares, maxima.
        counts: int64 `(states, layers, num_metrics + 3)`: for each metric the index of the token
            that attained the maximum (the earliest; -1 before the first), then the number of
            tokens averaged, left out as not finite, and seen in all.
        sums: float64 `(layers, outer, inner, 4)`, what `row_sums` wrote.
        hidden_size: of the hidden states that were summed.
        kinds: uint8 `(outer, inner)`: `LEFT_OUT`, `COUNTED` or `APART`; None counts all.
        per_token: receives the metrics of every token, `(layers, num_metrics, outer, inner)`.
    """
    num_states = moments.shape[0]
    tokens = sums.flatten(1, 2)
    values = metrics_of_sums(tokens, hidden_size)  # (num_metrics, layers, tokens)
    if per_token is not None:
        per_token.copy_(values.transpose(0, 1).reshape(per_token.shape))
    num_tokens, num_metrics = tokens.shape[1], len(METRICS)
    # A NaN or Inf anywhere in a token reaches its norms.
    finite = (tokens[..., 0] + tokens[..., 1]).isfinite()
    counted = torch.full((num_tokens,), COUNTED, dtype=torch.uint8, device=sums.device)
    kind = counted if kinds is None else kinds.flatten()
    own = (offset + torch.arange(num_tokens, device=sums.device)) // tokens_per_state + first_state
    for state in range(num_states):
        if apart and state == num_states - 1:
            belongs = kind == APART
        else:
            belongs = (own == state) & (kind == COUNTED)
        used = finite & belongs
        kept = torch.where(used, values, 0.0)
        peaks, positions = torch.where(used, values, -torch.inf).max(dim=2)
        totals, squares, maxima = moments[state].unbind(1)
        argmax, num_seen = counts[state, :, :num_metrics], counts[state, :, num_metrics + 2]
        higher = maxima < peaks.T
        argmax.copy_(torch.where(higher, positions.T + num_seen[:, None], argmax))
        maxima.copy_(torch.maximum(maxima, peaks.T))
        totals += kept.sum(2).T
        squares += kept.square().sum(2).T
        counts[state, :, num_metrics] += used.sum(1)
        counts[state, :, num_metrics + 1] += (belongs & ~finite).sum(1)
        num_seen += num_tokens


def _block_metrics(before: Tensor, after: Tensor) -> Tensor:
    """`BLOCK_METRICS` of every token, float64, shape `(num_block_metrics, outer, inner)`."""
    values = _metrics(before, after)[: len(BLOCK_METRICS) - 1]
    return torch.cat([values, angular_distance(values[METRICS.index("cosine_distance")])[None]])


def token_metrics(before: Tensor, after: Tensor) -> Tensor:
    """The metrics of `simdiff_kernels.metrics.TokenMetrics`, stacked along a new first axis."""
    return _metrics(before, after).to(result_dtype(before.dtype))


def accumulate(
    moments: Tensor,
    counts: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor | None = None,
    per_token: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Fold all unmasked finite tokens into the running state of one layer, in place.

    `row_sums` and `fold` in one call. The state is one or several parts, among which a backend may
    deal out the tokens of an update as it likes; together they are the state.

    Args:
        moments: float64 `(parts, 3, num_metrics)`: sums, sums of squares and maxima of the metrics;
            here the first part takes all tokens.
        counts: int64 `(parts, num_metrics + 3)`: for each metric the index of the token with the
            maximum, then the tokens averaged, left out as not finite, and seen.
        before, after: hidden states `(outer, inner, hidden_size)`.
        mask: bool `(outer, inner)`, True where a token counts; None counts all.
        per_token: receives the metrics of every token, `(num_metrics, outer, inner)`.
        scratch: not used here; a GPU leaves the row sums in it, float64, 4 for each token.
    """
    if before.numel() == 0:
        return
    sums = before.new_empty((*before.shape[:2], 4), dtype=torch.float64)
    row_sums(sums, before, after)
    kinds = None if mask is None else mask.view(torch.uint8)
    out = None if per_token is None else per_token[None]
    one = moments[:1, None], counts[:1, None]
    fold(*one, sums[None], before.shape[-1], kinds, per_token=out)
    counts[1:, len(METRICS) + 2] += before.shape[0] * before.shape[1]


def accumulate_blocks(
    moments: Tensor,
    counts: Tensor,
    states: Sequence[Tensor],
    kinds: Tensor | None = None,
    first_state: int = 0,
    offset: int = 0,
    tokens_per_state: int = ALL_TOKENS,
    absolute: bool = False,
    sums: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Fold all counted finite tokens into running states of every block of layers, in place.

    States h_0 ... h_L are the hidden states between L layers. The block of layers i ... j - 1 turns
    h_i into h_j: its metrics are those of a layer with these before and after, and the angular
    distance arccos(cos) / pi = 2 atan2(sqrt(v), sqrt(2 - v)) / pi of each token, v its cosine
    distance. One pair at a time, so that no more than a few copies of one state are kept.

    Args:
        moments: float64 `(running states, 2 * num_block_metrics + 1, L + 1, L + 1)`: sums in the
            order of `BLOCK_METRICS`, sums of squares in the same order, and the maximum of the
            squared difference; entry [i, j] is of h_i and h_j. Entries with i >= j are never
            written; all are zero before the first token.
        counts: int64 `(running states, 3)`: tokens averaged, left out as not finite in any state,
            seen in all.
        states: L + 1 tensors `(outer, inner, hidden_size)` of one dtype, strides of their own.
        kinds, first_state, offset, tokens_per_state: which token belongs to which running state,
            see `fold`; tokens of kind `APART` are left out here.
        absolute: also measure the absolute difference, whose moments else stay as they are.
        sums: receives the `row_sums` of every layer i, h_i before and h_(i+1) after: float64
            `(L, outer, inner, 4)`; zeros for tokens that are `LEFT_OUT`.
        scratch: not used here.
    """
    if states[0].numel() == 0:
        return
    if sums is not None:
        mask = None if kinds is None else kinds != LEFT_OUT
        for layer, out in enumerate(sums):
            row_sums(out, states[layer], states[layer + 1], mask)
    finite = torch.ones(states[0].shape[:2], dtype=torch.bool, device=states[0].device)
    for state in states:  # a NaN or Inf anywhere in a token reaches its norm
        finite = finite & state.double().square().sum(-1).sqrt().isfinite()
    counted = torch.ones_like(finite) if kinds is None else kinds == COUNTED
    own = offset + torch.arange(finite.numel(), device=finite.device)
    own = (own // tokens_per_state + first_state).view(finite.shape)

    num_metrics = len(BLOCK_METRICS)
    squared = BLOCK_METRICS.index("squared_difference")
    wanted = [
        m for m, name in enumerate(BLOCK_METRICS) if absolute or name != "absolute_difference"
    ]
    for j in range(1, len(states)):
        for i in range(j):
            values = _block_metrics(states[i], states[j])
            for running, moment in enumerate(moments):
                used = finite & counted & (own == running)
                kept = torch.where(used, values, 0.0).flatten(1)
                for m in wanted:
                    moment[m, i, j] += kept[m].sum()
                    moment[num_metrics + m, i, j] += kept[m].square().sum()
                moment[-1, i, j] = torch.maximum(moment[-1, i, j], kept[squared].max())
    for running, own_counts in enumerate(counts):
        belongs = counted & (own == running)
        own_counts[0] += (belongs & finite).sum()
        own_counts[1] += (belongs & ~finite).sum()
        own_counts[2] += finite.numel()
