"""Draws of calibration sequences with replacement, and the scores of each draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simdiff.errors import SimdiffError
from simdiff.scoring.block_scores import BlockScores, Matrix
from simdiff.scoring.group_scores import Array, SequenceScores, is_maximum, to_matrix
from simdiff.scoring.metric_tables import MetricTable
from simdiff.scoring.scores import LayerScores


class DrawnPlan(NamedTuple):
    """What the bootstrap keeps of the plan of one draw."""

    removed: tuple[int, ...]
    importance: tuple[float, ...]


def draws(
    num_groups: int, num_resamples: int, *, seed: int = 0, size: int | None = None
) -> NDArray[np.int64]:
    """Draw groups with replacement; return how often each is drawn.

    Args:
        num_groups: number of groups, G.
        num_resamples: number of draws, B.
        seed: seed of the draws.
        size: number of groups in a draw; None takes G.

    Returns:
        Counts, int64 `(num_resamples, num_groups)`.
    """
    generator = np.random.default_rng(seed)
    shape = num_resamples, num_groups if size is None else size
    drawn = generator.integers(num_groups, size=shape)
    counts = np.zeros((num_resamples, num_groups), np.int64)
    np.add.at(counts, (np.arange(num_resamples)[:, None], drawn), 1)
    return counts


def resampled(scores: LayerScores, weights: NDArray[np.int64]) -> Iterator[LayerScores]:
    """Yield the scores of each draw of sequences, without the standard errors.

    Args:
        scores: scores that include `sequences`.
        weights: how often each group is drawn, `(draws, groups)`; no draw is empty.

    Raises:
        SimdiffError: the scores have no sequences.
    """
    sequences = scores.sequences
    if sequences is None:
        raise SimdiffError(
            "resampled: scores must hold the statistics of single sequences, which these lack: "
            "score the model again with `simdiff score`"
        )
    drawn = Draws(sequences, weights.astype(np.float64), scores.num_layers)
    for draw in range(len(weights)):
        tables = {
            name: replace(
                scores.metrics[name],
                mean=tuple(drawn.means[name][draw].tolist()),
                maximum=tuple(drawn.maxima[name][draw].tolist()),
                standard_error=(None,) * scores.num_layers,
                cluster_standard_error=(),
            )
            for name in sequences.means
        }
        yield _with_tables(scores, tables, drawn, draw)


def _with_tables(
    scores: LayerScores, tables: dict[str, MetricTable], drawn: Draws, draw: int
) -> LayerScores:
    angles = drawn.last_token_angles
    return replace(
        scores,
        metrics=tables,
        num_tokens=int(drawn.num_tokens[draw]),
        blocks=BlockScores(_Matrices(drawn, draw)) if drawn.sequences.blocks else None,
        last_token_angles=None if angles is None else to_matrix(angles[draw], drawn.num_layers),
        sequences=None,
        leading=None,
    )


@dataclass
class Draws:
    """The statistics of all draws; matrices of blocks are made when a criterion reads them."""

    sequences: SequenceScores
    weights: Array
    num_layers: int

    def __post_init__(self) -> None:
        """Count the tokens of each draw."""
        self.num_tokens = (self.weights * _column(self.sequences.num_tokens)).sum(1)
        self.blocks: dict[str, Array] = {}

    @cached_property
    def means(self) -> dict[str, Array]:
        """The mean of each metric in every draw, `(draws, num_layers)`."""
        return {name: self._mean(rows) for name, rows in self.sequences.means.items()}

    @cached_property
    def maxima(self) -> dict[str, Array]:
        """The maximum of each metric in every draw."""
        return {name: self._maximum(rows) for name, rows in self.sequences.maxima.items()}

    @cached_property
    def last_token_angles(self) -> Array | None:
        """The last-token angles of each draw; every sequence has one last token."""
        angles = self.sequences.last_token_angles
        return None if angles is None else self._mean(angles, self.sequences.num_sequences)

    def block(self, name: str, draw: int) -> Matrix:
        """One score of all blocks, for one draw."""
        if is_maximum(name):
            upper = self.sequences.blocks[name][self.weights[draw] > 0].max(0)
            return to_matrix(upper, self.num_layers)
        return to_matrix(self.block_means(name)[draw], self.num_layers)

    def block_means(self, name: str) -> Array:
        """The mean over tokens of one score of all blocks, in every draw, `(draws, blocks)`."""
        if name not in self.blocks:
            self.blocks[name] = self._mean(self.sequences.blocks[name])
        return self.blocks[name]

    def _mean(self, rows: Array, counts: tuple[int, ...] | None = None) -> Array:
        shares = self.weights * _column(self.sequences.num_tokens if counts is None else counts)
        means: Array = (shares / shares.sum(1, keepdims=True)) @ rows
        return means

    def _maximum(self, rows: Array) -> Array:
        return np.stack([rows[weights > 0].max(0) for weights in self.weights])


class _Matrices(dict[str, Matrix]):
    """The matrices of one draw, each made when it is read: most criteria read one or two."""

    def __init__(self, drawn: Draws, draw: int) -> None:
        super().__init__()
        self._drawn, self._draw = drawn, draw

    def __contains__(self, name: object) -> bool:
        return name in self._drawn.sequences.blocks

    def __missing__(self, name: str) -> Matrix:
        self[name] = self._drawn.block(name, self._draw)
        return self[name]


def _column(counts: tuple[int, ...]) -> Array:
    return np.array(counts, np.float64)
