"""Angles of every block at the last token of each sequence, as Gromov et al. take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from simdiff.running_mean import RunningMatrixMean
from simdiff_kernels import angular_distance, token_metrics


class LastTokenAngles(NamedTuple):
    """Of every block at the last real token of each sequence of a batch."""

    angles: Tensor
    """`(rows, L + 1, L + 1)`, float64; zero for start >= stop and for padding alone."""
    used: Tensor
    """`(rows,)`, bool: sequences with any real token."""


def last_token_angles(states: Sequence[Tensor], mask: Tensor | None = None) -> LastTokenAngles:
    """The angles of one batch; arguments as in `RunningLastTokenAngles.update`."""
    shape = states[0].shape
    length = shape[-2]
    rows = states[0].numel() // (length * shape[-1])
    device = states[0].device
    real = torch.ones(rows, length, device=device) if mask is None else mask.reshape(rows, -1)
    # The last position that is not padding, for padding on the right and on the left.
    positions = torch.arange(1, length + 1, device=device)
    last = ((real != 0) * positions).argmax(1)
    used = (real != 0).any(1)
    row = torch.arange(rows, device=device)
    tokens = torch.stack([s.reshape(rows, length, -1)[row, last] for s in states])
    result = torch.zeros(rows, len(states), len(states), dtype=torch.float64, device=device)
    for i in range(len(states) - 1):
        after = tokens[i + 1 :].contiguous()
        before = tokens[i].expand_as(after).contiguous()
        angles = angular_distance(token_metrics(before, after).cosine_distance.double())
        result[:, i, i + 1 :] = torch.where(used, angles, 0.0).T
    return LastTokenAngles(result, used)


class RunningLastTokenAngles:
    """Mean over sequences of the angle that every block turns the last token by.

    angle[i, j] = mean arccos(cos(h_i, h_j)) / pi, over the last real token of each sequence: a few
    rows per batch, whatever its length. Never waits for the device before `finish`.

    Args:
        num_layers: L; an update takes the L + 1 hidden states of one batch.

    Source: Gromov et al., arXiv 2403.17887, Eq. 7.
    """

    def __init__(self, num_layers: int) -> None:
        """Start with no sequences seen."""
        self._mean = RunningMatrixMean(num_layers + 1)

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Add the sequences of one batch.

        Args:
            states: L + 1 tensors `(batch, sequence, hidden_size)`; a state without a batch axis is
                one sequence.
            mask: `(batch, sequence)`, zero for padding on either side; a sequence of nothing but
                padding is left out.
        """
        self.add(last_token_angles(states, mask))

    def add(self, sequences: LastTokenAngles) -> None:
        """Add sequences whose angles are known."""
        self._mean.add(sequences.angles, sequences.used)

    def merge(self, other: RunningLastTokenAngles) -> None:
        """Add the sequences that `other` saw."""
        self._mean.merge(other._mean)

    @property
    def num_sequences(self) -> int:
        """That were averaged; waits for the device."""
        return self._mean.count

    def finish(self) -> tuple[tuple[float, ...], ...]:
        """The means, [start][stop]; zero for start >= stop.

        Raises:
            ValueError: no sequence to average.
        """
        means = self._mean.mean("RunningLastTokenAngles.finish", "sequence")
        return tuple(map(tuple, means.tolist()))
