"""Plans from scores by every selection."""

from __future__ import annotations

import itertools

import pytest

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.planning.block_costs import BLOCK_CRITERIA, block_costs
from simdiff.planning.criteria import importance
from simdiff.planning.make_plan import make_plan
from simdiff.scoring.scores import LayerScores


def test_plans_by_every_selection(llama_scores: LayerScores) -> None:
    costs = block_costs(llama_scores).raised(5 / 6)
    plan = make_plan(llama_scores, 3, protect=(1,))
    free = [p for p in itertools.combinations(range(6), 3) if 1 not in p]
    assert costs.plan_cost(plan.removed) == pytest.approx(min(map(costs.plan_cost, free)))
    assert plan.selection == "optimal blocks, p = 0.833"
    block = make_plan(llama_scores, 3, selection="contiguous")
    assert len(layer_runs(block.removed)) == 1
    lowest = make_plan(llama_scores, 3, selection="lowest")
    assert list(lowest.removed) == importance(llama_scores, "simdiff").ranking()[:3]
    influence = make_plan(llama_scores, 3, criterion="block-influence", selection="blocks")
    cosine = block_costs(llama_scores, "cosine-distance")
    assert cosine.plan_cost(influence.removed) == pytest.approx(
        min(cosine.plan_cost(p) for p in itertools.combinations(range(6), 3))
    )
    for wrong, wanted in (
        ({"criterion": "simdiff-mssd", "selection": "blocks"}, "criterion simdiff-mssd does not"),
        ({"selection": "best"}, "lowest, contiguous, blocks, got 'best'"),
        ({"max_blocks": 0}, "at least 1"),
        ({"selection": "lowest", "max_blocks": 2}, "go with selection 'blocks'"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            make_plan(llama_scores, 3, **wrong)
    with pytest.raises(SimdiffError, match="must be one of simdiff, cosine-distance"):
        block_costs(llama_scores, "cosine")
    assert set(BLOCK_CRITERIA) >= {"simdiff", "cosine-distance", "norm-change"}
