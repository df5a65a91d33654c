"""The plans of all draws at once are those of each draw by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.blocks import BlockCosts, optimal_blocks, optimal_blocks_of
from simdiff.planning.budget import Budget
from simdiff.planning.draws import draws, resampled
from simdiff.planning.make_plan import BLOCK_CRITERION_OF
from simdiff.planning.options import PlanOptions
from simdiff.scoring.group_scores import to_matrix
from support.scores import drawn_scores

SCORES = drawn_scores(9, 5)
WEIGHTS = draws(5, 150, seed=4)  # more than are made at a time


@pytest.mark.parametrize("criterion", [*BLOCK_CRITERION_OF, "simdiff-mssd"])
@pytest.mark.parametrize(
    ("selection", "max_blocks"),
    [(None, None), ("lowest", None), ("contiguous", None), ("blocks", None), ("blocks", 2)],
)
def test_as_one_by_one(criterion: str, selection: str | None, max_blocks: int | None) -> None:
    options = PlanOptions(criterion, budget=Budget(num_layers=3), protect=(4,), selection=selection)
    if selection is not None and criterion not in BLOCK_CRITERION_OF:
        return
    options = dataclasses.replace(options, max_blocks=max_blocks)
    found = options.of_scores.of_draws(SCORES, WEIGHTS)
    at_once = criterion not in ("block-influence", "simdiff-mssd")
    chosen = options.of_scores.selection
    assert (found is not None) == (at_once and chosen != "lowest")
    if found is None:
        return
    one_by_one = [options.first_plan(draw) for draw in resampled(SCORES, WEIGHTS)]
    assert len({frozenset(plan.removed) for plan in one_by_one}) > 2
    for one, plan in zip(found, one_by_one, strict=True):
        assert not isinstance(one, SimdiffError)
        assert sorted(one.removed) == sorted(plan.removed)
        assert one.importance == pytest.approx(plan.importance, rel=1e-14)


def test_scores_that_lack_what_a_criterion_needs() -> None:
    """What cannot be made at once is left to the plans of single draws, which say why."""
    options = PlanOptions("angular-block", budget=Budget(num_layers=3))
    assert SCORES.sequences is not None
    blocks = {k: v for k, v in SCORES.sequences.blocks.items() if k != "angular_distance"}
    lacking = dataclasses.replace(
        SCORES, sequences=dataclasses.replace(SCORES.sequences, blocks=blocks)
    )
    assert options.of_scores.of_draws(lacking, WEIGHTS) is None


def test_many_costs_at_once_are_each_by_itself() -> None:
    """Equal costs too: the same one of several best plans is taken."""
    random = np.random.default_rng(0)
    upper = random.integers(1, 4, (40, 36)).astype(float)
    matrices = [to_matrix(row, 8) for row in upper]
    for max_blocks in (None, 1, 2):
        found = optimal_blocks_of(np.array(matrices), 4, (2,), max_blocks).tolist()
        for layers, matrix in zip(found, matrices, strict=True):
            costs = BlockCosts("c", "c", matrix)
            assert tuple(layers) == optimal_blocks(costs, 4, (2,), max_blocks)
