"""BlockScores: how every run of consecutive layers changed the calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simdiff_kernels import BLOCK_METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from simdiff_kernels import BlockSummary

BLOCK_SCORES = (*BLOCK_METRICS, "squared_difference_maximum", "norm_change")
OPTIONAL_SCORES = ("absolute_difference", "angular_distance")
"""Scores of blocks that may be absent: no criterion uses the first, and files up to schema version
2 do not have the second."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class BlockScores:
    """One matrix for each name in `BLOCK_SCORES`: `metrics[name][start][stop]`.

    Entry [start][stop] compares the states before and after the block of layers start ... stop - 1,
    counted from 0; entries with start >= stop are 0. All metrics but the maximum are means over
    tokens. Metrics in `OPTIONAL_SCORES` may be absent.
    """

    metrics: dict[str, Matrix]

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.metrics[BLOCK_SCORES[0]]) - 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: row `start` holds stop = start + 1 ... num_layers; None if absent."""
        return {
            name: matrix_to_rows(self.metrics[name]) if name in self.metrics else None
            for name in BLOCK_SCORES
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], num_layers: int) -> BlockScores:
        """The inverse of `to_dict`; None stands for an absent one of `OPTIONAL_SCORES`.

        Raises:
            KeyError, TypeError, ValueError: a matrix is missing, has another shape, or holds
                something that is not a finite number.
        """
        names = [n for n in BLOCK_SCORES if n not in OPTIONAL_SCORES or content[n] is not None]
        return cls({name: matrix_from_rows(name, content[name], num_layers) for name in names})


def matrix_to_rows(matrix: Matrix) -> list[list[float]]:
    """The entries above the diagonal, row by row."""
    return [list(row[start + 1 :]) for start, row in enumerate(matrix[:-1])]


def matrix_from_rows(name: str, rows: Any, num_layers: int) -> Matrix:
    """The inverse of `matrix_to_rows`.

    Raises:
        TypeError, ValueError: the shape is wrong, or a value is not a finite number.
    """
    if not isinstance(rows, list) or [len(row) for row in rows] != list(range(num_layers, 0, -1)):
        raise ValueError(f"{name} of blocks must have {num_layers} rows, each one shorter")
    if not all(math.isfinite(float(value)) for row in rows for value in row):
        raise ValueError(f"{name} of a block is not finite")
    upper = [(0.0,) * (start + 1) + tuple(map(float, row)) for start, row in enumerate(rows)]
    return (*upper, (0.0,) * (num_layers + 1))


def block_scores_of(summary: BlockSummary, norm_change: Tensor) -> BlockScores:
    """Make BlockScores from the kernels' metrics and the mean norm change `(L + 1, L + 1)`."""
    matrices = {
        name: norm_change if name == "norm_change" else getattr(summary, name)
        for name in BLOCK_SCORES
    }
    return BlockScores(
        {
            name: tuple(map(tuple, matrix.tolist()))
            for name, matrix in matrices.items()
            if matrix is not None
        }
    )
