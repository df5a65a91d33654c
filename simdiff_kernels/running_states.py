"""The running states as tensors: empty ones, and how several become one.

Of layers, `moments` `(..., 3, num_metrics)` and `counts` `(..., num_metrics + 3)` are what
`simdiff_kernels.reference.fold` describes; of blocks of layers, `(..., 2 * num_block_metrics + 1,
L + 1, L + 1)` and `(..., 3)`, what `simdiff_kernels.reference.accumulate_blocks` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .metrics import BLOCK_METRICS, METRICS

NUM_METRICS = len(METRICS)
NUM_COUNTS = NUM_METRICS + 3
NUM_BLOCK_MOMENTS = 2 * len(BLOCK_METRICS) + 1
NUM_BLOCK_COUNTS = 3


def empty_state(
    num_states: int, parts: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """`moments` and `counts` of running states that have seen no token.

    Args:
        num_states: the first axis. For `fold` the groups of tokens.
        parts: the second axis. For `fold` the layers; for one layer's state in `RunningScores` the
            parts among which a GPU deals out the tokens of an update.
        device: of the row sums or hidden states that will be folded.

    Returns:
        `moments`, float64 `(num_states, parts, 3, num_metrics)`: sums and sums of squares 0, maxima
        -inf. `counts`, int64 `(num_states, parts, num_metrics + 3)`: for each metric the index of
        the token with the maximum, -1; tokens averaged, left out as not finite, and seen, 0.
    """
    moments = torch.zeros(num_states, parts, 3, NUM_METRICS, dtype=torch.float64, device=device)
    moments[..., 2, :].fill_(-torch.inf)
    counts = torch.zeros(num_states, parts, NUM_COUNTS, dtype=torch.int64, device=device)
    counts[..., :NUM_METRICS].fill_(-1)
    return moments, counts


def join_states(moments: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Join the parts of a running state of layers into one.

    Sums and counts are added in the order of the parts; of equal maxima the one with the earliest
    token counts, whichever part it is in.

    Args:
        moments: float64 `(parts, ..., 3, num_metrics)`.
        counts: int64 `(parts, ..., num_metrics + 3)`; all parts have seen the same tokens, of which
            each averaged its own.

    Returns:
        New tensors without the first axis.
    """
    joined, joined_counts = moments[0].clone(), counts[0].clone()
    for theirs, their_counts in zip(moments[1:], counts[1:], strict=True):
        joined[..., :2, :] += theirs[..., :2, :]
        ours, argmax = joined[..., 2, :], joined_counts[..., :NUM_METRICS]
        others = their_counts[..., :NUM_METRICS]
        wins = (theirs[..., 2, :] > ours) | ((theirs[..., 2, :] == ours) & (others < argmax))
        wins &= others >= 0
        argmax.copy_(torch.where(wins, others, argmax))
        ours.copy_(torch.maximum(ours, theirs[..., 2, :]))
        joined_counts[..., NUM_METRICS : NUM_METRICS + 2] += their_counts[
            ..., NUM_METRICS : NUM_METRICS + 2
        ]
    return joined, joined_counts


def append_state(moments: Tensor, counts: Tensor, theirs: Tensor, their_counts: Tensor) -> None:
    """Let a state of several parts, the first axis, see the tokens of a joined one after its own.

    The first part takes them; all count them as seen.
    """
    num_seen = counts[0, NUM_METRICS + 2]
    ours, argmax = moments[0], counts[0, :NUM_METRICS]
    # The tokens of an equal maximum in another part came before: `join_states` finds the earliest.
    higher = theirs[2] > ours[2]
    argmax.copy_(torch.where(higher, their_counts[:NUM_METRICS] + num_seen, argmax))
    ours[:2] += theirs[:2]
    ours[2] = torch.maximum(ours[2], theirs[2])
    counts[0, NUM_METRICS : NUM_METRICS + 2] += their_counts[NUM_METRICS : NUM_METRICS + 2]
    counts[:, NUM_METRICS + 2] += their_counts[NUM_METRICS + 2]


def empty_block_state(
    num_layers: int, device: torch.device, num_running: int = 1
) -> tuple[Tensor, Tensor]:
    """`moments` and `counts` of running states of all blocks of layers before the first token.

    Args:
        num_layers: L, the layers of the model.
        device: of the hidden states that will come.
        num_running: how many running states: groups of tokens, or parts of one state.

    Returns:
        Zeros: float64 `(num_running, 2 * num_block_metrics + 1, L + 1, L + 1)` and int64
        `(num_running, 3)`. `simdiff_kernels.reference.accumulate_blocks` says what they hold.
    """
    shape = (num_running, NUM_BLOCK_MOMENTS, num_layers + 1, num_layers + 1)
    moments = torch.zeros(shape, dtype=torch.float64, device=device)
    return moments, torch.zeros(num_running, NUM_BLOCK_COUNTS, dtype=torch.int64, device=device)


def join_block_states(moments: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Join running states of all blocks of layers, which have seen the same tokens, into one.

    Args:
        moments: float64 `(num_running, 2 * num_block_metrics + 1, L + 1, L + 1)`; sums are added in
            the order of the first axis, of maxima the largest is taken.
        counts: int64 `(num_running, 3)`: tokens averaged and left out are added; those seen are the
            same in all.

    Returns:
        New tensors without the first axis.
    """
    joined, joined_counts = moments[0].clone(), counts[0].clone()
    for theirs, their_counts in zip(moments[1:], counts[1:], strict=True):
        joined[:-1] += theirs[:-1]
        joined[-1] = torch.maximum(joined[-1], theirs[-1])
        joined_counts[:2] += their_counts[:2]
    return joined, joined_counts
