"""Selection of blocks: find the disjoint runs of layers whose removal has the least total cost."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.scoring.block_scores import Matrix


@dataclass(frozen=True)
class BlockCosts:
    """The cost of cutting each run of layers start ... stop - 1: `values[start][stop]` >= 0."""

    criterion: str
    formula: str
    values: Matrix

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.values) - 1

    def plan_cost(self, removed: Collection[int]) -> float:
        """The cost of a plan: the sum over its blocks, the longest runs of removed layers."""
        return math.fsum(self.values[start][stop] for start, stop in layer_runs(removed))

    def raised(self, exponent: float) -> BlockCosts:
        """All costs raised to a power, which determines how separate blocks add up."""
        values = tuple(tuple(value**exponent for value in row) for row in self.values)
        return BlockCosts(self.criterion, f"({self.formula}) ^ {exponent:.4g}", values)


def best_contiguous_block(
    costs: BlockCosts, num_remove: int, protect: Collection[int] = ()
) -> tuple[int, ...]:
    """Find the block of `num_remove` consecutive layers of lowest cost; the first of equal ones.

    Raises:
        SimdiffError: every such block contains a protected layer.

    Source: Gromov et al., arXiv 2403.17887, Section 3.1 (there with the angular distance).
    """
    return optimal_blocks(costs, num_remove, protect, max_blocks=1)


def optimal_blocks(
    costs: BlockCosts,
    num_remove: int,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
) -> tuple[int, ...]:
    """Find the `num_remove` layers with the least total cost, which is `BlockCosts.plan_cost`.

    The result is exact, by dynamic programming from the first layer to the last. Let F(j, k, b) be
    the least cost of deciding layers 0 ... j - 1 if layer j is kept, k of them are removed and
    these form b blocks:

        F(j, k, b) = min over w >= 0 of F(j - 1 - w, k - w, b - [w > 0]) + cost(j - w, j)

    where the w layers before j are removed and layer j - 1 - w is kept. This takes
    O(L K^2 max_blocks) additions (O(L K^2) without a limit on blocks), below 0.1 s for L = 80.

    Args:
        costs: cost of every block, finite and not negative.
        num_remove: exact number of layers to remove.
        protect: layers that stay.
        max_blocks: upper limit of the number of blocks; None sets no limit.

    Raises:
        SimdiffError: a cost is not finite, or no set of layers satisfies all conditions.
    """
    num_layers, protect = costs.num_layers, frozenset(protect)
    _check(costs, num_remove, max_blocks)
    limit = num_remove if max_blocks is None else max_blocks
    counted = max_blocks is not None  # without a limit, all numbers of blocks share b = 0
    # best[j][k, b] is F(j, k, b) with the w that attains it. Layer num_layers does not exist; it is
    # the kept layer after the last one, so that best[num_layers] covers the whole model.
    best: list[dict[tuple[int, int], tuple[float, int]]] = [{} for _ in range(num_layers + 1)]
    for j in range(num_layers + 1):
        # best[0 ... j - 1] are complete. Each w ends one block, layers start ... j - 1 (none for
        # w = 0), after the kept layer start - 1, or at the first layer.
        for w in range(min(num_remove, j) + 1):
            start = j - w
            if w > 0 and start in protect:
                break  # every longer block contains this layer too
            cost = costs.values[start][j] if w > 0 else 0.0
            before = best[start - 1] if start > 0 else {(0, 0): (0.0, 0)}
            for (k, b), (total, _) in before.items():
                key = (k + w, b + int(counted and w > 0))
                if key[0] > num_remove or key[1] > limit:
                    continue
                if key not in best[j] or total + cost < best[j][key][0]:
                    best[j][key] = (total + cost, w)
    ends = {key: entry for key, entry in best[num_layers].items() if key[0] == num_remove}
    if not ends:
        raise SimdiffError(
            f"{num_remove} of {num_layers} layers must be free to remove in at most {limit} "
            f"blocks, but protected layers {sorted(protect)} leave no such choice"
        )
    key = min(ends, key=lambda key: (ends[key][0], key))
    return _trace(best, key, counted)


def _trace(
    best: list[dict[tuple[int, int], tuple[float, int]]], key: tuple[int, int], counted: bool
) -> tuple[int, ...]:
    removed: list[int] = []
    j = len(best) - 1
    while j >= 0:
        w = best[j][key][1]
        removed += range(j - w, j)
        key = (key[0] - w, key[1] - int(counted and w > 0))
        j -= w + 1
    return tuple(sorted(removed))


def _check(costs: BlockCosts, num_remove: int, max_blocks: int | None) -> None:
    if not 1 <= num_remove < costs.num_layers:
        raise SimdiffError(
            f"optimal_blocks: num_remove must be 1 to {costs.num_layers - 1}, got {num_remove}"
        )
    if max_blocks is not None and max_blocks < 1:
        raise SimdiffError(f"optimal_blocks: max_blocks must be at least 1, got {max_blocks}")
    for start, row in enumerate(costs.values):
        for stop in range(start + 1, len(row)):
            if not 0 <= row[stop] < math.inf:
                raise SimdiffError(
                    f"optimal_blocks: the cost of a block must be finite and not negative, got "
                    f"{row[stop]} for layers {start} to {stop - 1}"
                )
