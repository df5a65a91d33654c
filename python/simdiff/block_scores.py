"""BlockScores: what every run of consecutive layers did to the calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simdiff.running_mean import RunningMatrixMean
from simdiff_kernels import BLOCK_METRICS, RunningBlockScores

BLOCK_SCORES = (*BLOCK_METRICS, "squared_difference_maximum", "norm_change")
OPTIONAL_SCORES = ("absolute_difference", "angular_distance")
"""Scores of blocks may lack these: no criterion takes the first, and files up to schema version 2
lack the second."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class BlockScores:
    """One matrix for each name in `BLOCK_SCORES`: `metrics[name][start][stop]`.

    Some of `OPTIONAL_SCORES` may be lacking.

    Entry [start][stop] is the block of layers start ... stop - 1, counted from 0: what taking it
    out would undo. Entries with start >= stop are 0. All but the maximum are means over tokens.
    """

    metrics: dict[str, Matrix]

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.metrics[BLOCK_SCORES[0]]) - 1

    def to_dict(self) -> dict[str, Any]:
        """Row `start` holds the values of stop = start + 1 ... num_layers; None what is lacking."""
        return {
            name: matrix_to_rows(self.metrics[name]) if name in self.metrics else None
            for name in BLOCK_SCORES
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], num_layers: int) -> BlockScores:
        """The inverse of `to_dict`; of `OPTIONAL_SCORES` None stands for what is lacking.

        Raises:
            KeyError, TypeError, ValueError: a matrix is missing, has another shape, or holds
                something that is not a finite number.
        """
        names = [n for n in BLOCK_SCORES if n not in OPTIONAL_SCORES or content[n] is not None]
        return cls({name: matrix_from_rows(name, content[name], num_layers) for name in names})


def matrix_to_rows(matrix: Matrix) -> list[list[float]]:
    """What lies above the diagonal."""
    return [list(row[start + 1 :]) for start, row in enumerate(matrix[:-1])]


def matrix_from_rows(name: str, rows: Any, num_layers: int) -> Matrix:
    """The inverse of `matrix_to_rows`.

    Raises:
        TypeError, ValueError: another shape, or something that is not a finite number.
    """
    if not isinstance(rows, list) or [len(row) for row in rows] != list(range(num_layers, 0, -1)):
        raise ValueError(f"{name} of blocks must have {num_layers} rows, each one shorter")
    if not all(math.isfinite(float(value)) for row in rows for value in row):
        raise ValueError(f"{name} of a block is not finite")
    upper = [(0.0,) * (start + 1) + tuple(map(float, row)) for start, row in enumerate(rows)]
    return (*upper, (0.0,) * (num_layers + 1))


class RunningBlocks:
    """All block scores of a calibration pass: the kernels' metrics and the change of norm.

    Args:
        num_layers: L; an update takes the L + 1 hidden states of one batch.
        backend: of simdiff_kernels; None takes the fastest one for the device.
        absolute_difference: also measure the absolute difference, which no criterion takes.
    """

    def __init__(
        self, num_layers: int, *, backend: str | None = None, absolute_difference: bool = False
    ) -> None:
        """Start with no tokens seen."""
        self.num_layers = num_layers
        self._metrics = RunningBlockScores(
            num_layers, backend=backend, absolute_difference=absolute_difference
        )
        self._norm_change = RunningNormChange(num_layers)

    def empty_like(self) -> RunningBlocks:
        """Another one of the same kind, empty; see `RunningBlockScores.empty_like`."""
        other = RunningBlocks(self.num_layers)
        other._metrics = self._metrics.empty_like()
        return other

    def update(
        self,
        states: Sequence[Tensor],
        mask: Tensor | None = None,
        changes: NormChanges | None = None,
    ) -> None:
        """Add the tokens of one batch; arguments as in `RunningBlockScores.update`.

        Args:
            states, mask: see there.
            changes: of the norms of these tokens, where they are known already.
        """
        self._metrics.update(states, mask)
        self._norm_change.add(norm_changes(states, mask) if changes is None else changes)

    def merge(self, other: RunningBlocks) -> None:
        """Add the tokens that `other` saw, as if they had come after those seen here."""
        self._metrics.merge(other._metrics)
        self._norm_change.merge(other._norm_change)

    def finish(self) -> BlockScores:
        """Bring the scores to the host.

        Raises:
            NonFiniteError: some token held NaN or Inf.
            ValueError: no token to average.
        """
        summary = self._metrics.finish()
        matrices = {
            name: getattr(summary, name) for name in BLOCK_SCORES if name != "norm_change"
        } | {"norm_change": self._norm_change.finish()}
        return BlockScores(
            {
                name: tuple(map(tuple, matrix.tolist()))
                for name, matrix in matrices.items()
                if matrix is not None
            }
        )


class NormChanges(NamedTuple):
    """What every block changes the norm by, summed over the tokens of each part of a batch."""

    sums: Tensor
    """`(parts, L + 1, L + 1)`, float64; zero for start >= stop."""
    counts: Tensor
    """`(parts,)`, int64: tokens summed."""


def norm_changes(
    states: Sequence[Tensor], mask: Tensor | None = None, parts: int = 1
) -> NormChanges:
    """The changes of one batch, see `RunningNormChange`; tokens of a non-finite norm are left out.

    Args:
        states: L + 1 tensors of one shape `(..., hidden_size)`.
        mask: `(...)`, zero leaves a token out.
        parts: so many equal parts, in order, are summed apart.
    """
    norms = torch.stack([_norms(state).flatten() for state in states]).double()
    used = norms.isfinite().all(0)
    if mask is not None:
        used = used & (mask.flatten() != 0)
    norms = torch.where(used, norms, 1.0)  # a token left out changes by nothing
    zero = norms == 0
    inverse = torch.where(zero, 0.0, 1 / norms)
    num_states, length = len(states), norms.shape[1] // parts
    sums = torch.zeros(parts, num_states, num_states, dtype=torch.float64, device=norms.device)
    for i in range(num_states - 1):
        gap = norms[i + 1 :] - norms[i]
        change = gap.square() * inverse[i + 1 :] * (inverse[i] / 2)
        change = torch.where(zero[i + 1 :] != zero[i], 1.0, change)
        sums[:, i, i + 1 :] = change.view(-1, parts, length).sum(2).T
    return NormChanges(sums, used.view(parts, length).sum(1))


class RunningNormChange:
    """Mean over tokens of how much every block changes the norm, as a ratio.

    With a = ||h_i|| and b = ||h_j||

        norm_change[i, j] = (b - a)^2 / (2 a b) = cosh(ln(b / a)) - 1

    It is 0 for equal norms, the same for growth and shrinkage by one factor, without upper limit,
    and does not depend on the unit of the hidden states. The norms are computed once per state
    (float32, sums of squares of float64 states in float64); pairs cost three products per token.
    A zero vector has norm change 0 to another zero vector and 1 to anything else, like its cosine
    distance.
    """

    def __init__(self, num_layers: int) -> None:
        """Start with no tokens seen."""
        self._mean = RunningMatrixMean(num_layers + 1)

    def update(self, states: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Add the tokens of one batch; those with a non-finite norm are left out.

        Args:
            states: L + 1 tensors of one shape `(..., hidden_size)`.
            mask: `(...)`, zero leaves a token out.
        """
        self.add(norm_changes(states, mask))

    def add(self, changes: NormChanges) -> None:
        """Add tokens whose changes are known, of any number of sequences."""
        self._mean.add(changes.sums, changes.counts)

    def merge(self, other: RunningNormChange) -> None:
        """Add the tokens that `other` saw."""
        self._mean.merge(other._mean)

    def finish(self) -> Tensor:
        """The means, `(L + 1, L + 1)`, float64 on the host; zero for i >= j.

        Raises:
            ValueError: no token to average.
        """
        return self._mean.mean("RunningNormChange.finish", "token")


def _norms(state: Tensor) -> Tensor:
    wide = torch.float64 if state.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(state, dim=-1, dtype=wide)
