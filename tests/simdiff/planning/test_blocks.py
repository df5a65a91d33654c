"""Selection over blocks against brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.planning.blocks import BlockCosts, best_contiguous_block, optimal_blocks


def random_costs(num_layers: int, seed: int) -> BlockCosts:
    """Some costs repeat, so that ties happen."""
    choose = random.Random(seed)
    size = range(num_layers + 1)
    values = tuple(tuple(choose.randint(1, 9) / 2 if i < j else 0.0 for j in size) for i in size)
    return BlockCosts("random", "", values)


@pytest.mark.parametrize("num_layers", [2, 5, 8])
@pytest.mark.parametrize("max_blocks", [None, 1, 2, 3])
def test_optimal_blocks_are_those_of_brute_force(num_layers: int, max_blocks: int | None) -> None:
    for seed in range(12):
        costs = random_costs(num_layers, seed)
        protect = set(random.Random(seed).sample(range(num_layers), seed % 3))
        for count in range(1, num_layers):
            plans = [
                plan
                for plan in itertools.combinations(range(num_layers), count)
                if not protect & set(plan)
                and (max_blocks is None or len(layer_runs(plan)) <= max_blocks)
            ]
            if not plans:
                with pytest.raises(SimdiffError, match="leave no such choice"):
                    optimal_blocks(costs, count, protect, max_blocks)
                continue
            found = optimal_blocks(costs, count, protect, max_blocks)
            assert found in plans
            assert costs.plan_cost(found) == min(map(costs.plan_cost, plans))
            if max_blocks == 1:
                assert best_contiguous_block(costs, count, protect) == found


def test_bad_block_selections() -> None:
    costs = random_costs(4, 0)
    for arguments, wanted in (
        ((0,), "1 to 3, got 0"),
        ((4,), "1 to 3, got 4"),
        ((2, (), 0), "at least 1, got 0"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            optimal_blocks(costs, *arguments)
    broken = BlockCosts("", "", ((0, math.nan, 1), (0, 0, 1), (0, 0, 0)))
    with pytest.raises(SimdiffError, match="finite and not negative, got nan for layers 0 to 0"):
        optimal_blocks(broken, 1)


def test_of_equal_plans_the_first_layers_go() -> None:
    """Where every block costs the same, and where it costs as much as its layers do."""
    for each in (lambda length: 1.0, float):
        rows = [[each(max(0, stop - start)) for stop in range(7)] for start in range(7)]
        costs = BlockCosts("c", "c", tuple(map(tuple, rows)))
        for count, max_blocks in ((1, None), (2, None), (3, 2), (2, 1)):
            assert optimal_blocks(costs, count, (), max_blocks) == tuple(range(count))
