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

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simdiff.errors import SimdiffError
from simdiff.planning.confidence import AmountOfText, PlanConfidence
from simdiff.planning.draws import DrawnPlan, draws, resampled
from simdiff.planning.names import NUM_RESAMPLES
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.scores import LayerScores

# Number of draws for each smaller amount of text: the standard error of a share of 0.95 is 0.03.
NUM_DRAWS_OF_AMOUNT = 60
CONFIDENCE = 0.95


class PlanOf(Protocol):
    """Makes a plan from scores, such as `make_plan` without a model.

    Where it has a method `of_draws`, as `simdiff.planning.drawn_plans.PlanOfScores`, that makes the
    plans of all draws at once.
    """

    def __call__(self, scores: LayerScores, /) -> PruningPlan:
        """The plan."""


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
    found = _plans(scores, plan_of, draws(groups, num_resamples, seed=seed))
    plans = [plan for plan in found if not isinstance(plan, SimdiffError)]
    if not plans:  # the scores gave a plan, so the draws lack a score that the criterion needs
        raise SimdiffError(
            f"bootstrap: some of {num_resamples} draws of the calibration text must give a plan, "
            f"got none (the last: {found[-1]}); bootstrap=0 makes the plan without"
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
) -> list[DrawnPlan | SimdiffError]:
    """The plan of each draw, or the error that says why there is none."""
    of_draws = getattr(plan_of, "of_draws", None)
    if of_draws is not None:
        at_once: list[DrawnPlan | SimdiffError] | None = of_draws(scores, weights)
        if at_once is not None:
            return at_once
    found: list[DrawnPlan | SimdiffError] = []
    for draw in resampled(scores, weights):
        try:
            plan = plan_of(draw)
            found.append(DrawnPlan(plan.removed, plan.importance))
        except SimdiffError as error:
            found.append(error)
    return found


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
