"""The bootstrap over calibration sequences: the share of draws that give each layer, or the plan.

A plan is a function of the scores of all tokens. From the scores of every sequence it can be
computed for any draw of sequences. Of G sequences (or groups of a few), G are drawn with
replacement, sequence g w_g times. With n_g tokens of mean m_g in sequence g, the draw has

    mean = sum_g w_g n_g m_g / sum_g w_g n_g,    maximum = max over g with w_g > 0

Criterion and selection make a plan from these scores as from any others. The share of B draws whose
plan contains a layer estimates how often another text of this length would give it. Sequences are
drawn, not tokens, since neighbouring tokens are not independent. The maximum of a draw is one that
was seen, so the bootstrap understates the uncertainty of criteria that use it (simdiff-max).

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), Chapter 6; Section 13.3 for
percentile intervals; Section 7.4 for why it fails with maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simdiff.errors import SimdiffError
from simdiff.planning.confidence import AmountOfText, PlanConfidence
from simdiff.planning.names import NUM_RESAMPLES
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.block_scores import BlockScores, Matrix
from simdiff.scoring.group_scores import Array, SequenceScores, is_maximum, to_matrix
from simdiff.scoring.metric_tables import MetricTable
from simdiff.scoring.scores import LayerScores

# Number of draws for each smaller amount of text: the standard error of a share of 0.95 is 0.03.
NUM_DRAWS_OF_AMOUNT = 60
CONFIDENCE = 0.95

PlanOf = Callable[[LayerScores], PruningPlan]


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
    drawn = _Draws(sequences, weights.astype(np.float64), scores.num_layers)
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
    scores: LayerScores, tables: dict[str, MetricTable], drawn: _Draws, draw: int
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
class _Draws:
    """The statistics of all draws; matrices of blocks are made when a criterion reads them."""

    sequences: SequenceScores
    weights: Array
    num_layers: int

    def __post_init__(self) -> None:
        self.num_tokens = (self.weights * _column(self.sequences.num_tokens)).sum(1)
        self.means = {name: self._mean(rows) for name, rows in self.sequences.means.items()}
        self.maxima = {name: self._maximum(rows) for name, rows in self.sequences.maxima.items()}
        self.blocks: dict[str, Array] = {}

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
        if name not in self.blocks:
            self.blocks[name] = self._mean(self.sequences.blocks[name])
        return to_matrix(self.blocks[name][draw], self.num_layers)

    def _mean(self, rows: Array, counts: tuple[int, ...] | None = None) -> Array:
        shares = self.weights * _column(self.sequences.num_tokens if counts is None else counts)
        means: Array = (shares / shares.sum(1, keepdims=True)) @ rows
        return means

    def _maximum(self, rows: Array) -> Array:
        return np.stack([rows[weights > 0].max(0) for weights in self.weights])


class _Matrices(dict[str, Matrix]):
    """The matrices of one draw, each made when it is read: most criteria read one or two."""

    def __init__(self, drawn: _Draws, draw: int) -> None:
        super().__init__()
        self._drawn, self._draw = drawn, draw

    def __contains__(self, name: object) -> bool:
        return name in self._drawn.sequences.blocks

    def __missing__(self, name: str) -> Matrix:
        self[name] = self._drawn.block(name, self._draw)
        return self[name]


def _column(counts: tuple[int, ...]) -> Array:
    return np.array(counts, np.float64)


def bootstrap_plan(
    scores: LayerScores,
    plan_of: PlanOf,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PlanConfidence | None:
    """The confidence of the plan that scores alone give; None with fewer than two groups.

    Args:
        scores: scores that include `sequences`; the result is None without them.
        plan_of: makes a plan from scores, such as `make_plan` without a model.
        num_resamples: number of draws, B.
        seed: seed of the draws.

    Raises:
        SimdiffError: the scores themselves or all draws give no plan, or `num_resamples` < 1.
    """
    if num_resamples < 1:
        raise SimdiffError(f"bootstrap_plan: num_resamples must be at least 1, got {num_resamples}")
    sequences = scores.sequences
    if sequences is None or sequences.num_groups < 2:
        return None
    whole = plan_of(scores)
    removed = tuple(sorted(whole.removed))
    groups = sequences.num_groups
    found = list(_plans(scores, plan_of, draws(groups, num_resamples, seed=seed)))
    plans = [plan for plan in found if not isinstance(plan, SimdiffError)]
    if not plans:  # the scores gave a plan, so the draws lack a score that the criterion needs
        raise SimdiffError(
            f"bootstrap: some of {num_resamples} draws of the calibration text must give a plan, "
            f"got none (the last: {found[-1]}); --bootstrap 0 makes the plan without"
        )
    times = [sum(layer in plan.removed for plan in plans) for layer in range(scores.num_layers)]
    low, high = _limits([plan.importance for plan in plans])
    return PlanConfidence(
        removed=removed,
        plan_frequency=tuple(count / num_resamples for count in times),
        agreement=sum(set(plan.removed) == {*removed} for plan in plans) / num_resamples,
        importance_low=low,
        importance_high=high,
        num_resamples=num_resamples,
        num_failed=num_resamples - len(plans),
        num_groups=groups,
        num_sequences=sum(sequences.num_sequences),
        seed=seed,
    )


def amounts_of_text(
    scores: LayerScores, plan_of: PlanOf, *, seed: int = 0
) -> tuple[AmountOfText, ...]:
    """Compare the plans of 1, 2, 4, ... groups of sequences with the plan of all groups.

    Args:
        scores, plan_of: see `bootstrap_plan`; the result is empty with fewer than two groups.
        seed: seed of the draws, which are with replacement.

    Raises:
        SimdiffError: the scores themselves give no plan.
    """
    groups = 0 if scores.sequences is None else scores.sequences.num_groups
    if groups < 2:
        return ()
    removed = tuple(plan_of(scores).removed)
    sizes = [2**power for power in range(groups.bit_length()) if 2**power <= groups]
    return tuple(_amount(scores, plan_of, removed, size, seed) for size in sizes)


def _plans(
    scores: LayerScores, plan_of: PlanOf, weights: NDArray[np.int64]
) -> Iterator[PruningPlan | SimdiffError]:
    """Yield the plan of each draw, or the error that says why there is none."""
    for draw in resampled(scores, weights):
        try:
            yield plan_of(draw)
        except SimdiffError as error:
            yield error


def _amount(
    scores: LayerScores, plan_of: PlanOf, removed: tuple[int, ...], size: int, seed: int
) -> AmountOfText:
    assert scores.sequences is not None
    weights = draws(scores.sequences.num_groups, NUM_DRAWS_OF_AMOUNT, seed=seed, size=size)
    common = [
        0 if isinstance(plan, SimdiffError) else len({*plan.removed} & {*removed})
        for plan in _plans(scores, plan_of, weights)
    ]
    whole = len(removed)
    return AmountOfText(
        num_groups=size,
        agreement=sum(count == whole for count in common) / len(common),
        overlap=sum(common) / (len(common) * whole),
    )


def _limits(
    importances: list[tuple[float, ...]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    levels = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(np.array(importances), levels, axis=0).tolist()
    return tuple(low), tuple(high)
