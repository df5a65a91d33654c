"""Selection of blocks: find the disjoint runs of layers whose removal has the least total cost."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import layer_runs
from simdiff.scoring.block_scores import Matrix
from simdiff.scoring.group_scores import Array


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
    _check(costs, num_remove, max_blocks)
    every = np.array(costs.values, np.float64)[None]
    (removed,) = optimal_blocks_of(every, num_remove, protect, max_blocks).tolist()
    return tuple(removed)


def optimal_blocks_of(
    costs: Array,
    num_remove: int,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
) -> NDArray[np.int64]:
    """`optimal_blocks` for many costs at once.

    Args:
        costs: `(many, num_layers + 1, num_layers + 1)`, finite and not negative, [start][stop].
        num_remove, protect, max_blocks: see `optimal_blocks`.

    Returns:
        The layers, in order of depth, `(many, num_remove)`.

    Raises:
        SimdiffError: no set of layers satisfies all conditions.
    """
    many, num_layers = costs.shape[0], costs.shape[1] - 1
    counted = max_blocks is not None  # without a limit, all numbers of blocks share b = 0
    limit = min(max_blocks or 0, num_remove)
    shape = (num_remove + 1, limit + 1, many)
    # best[j + 1][k, b] is F(j, k, b), and by[j][k, b] the w that attains it; best[0] is before the
    # first layer. Layer num_layers does not exist; it is the kept layer after the last one, so that
    # best[num_layers + 1] covers the whole model.
    best = np.full((num_layers + 2, *shape), np.inf)
    best[0, 0, 0] = 0
    by = np.zeros((num_layers + 1, *shape), np.int16)
    for j in range(num_layers + 1):
        # best[0 ... j] are complete. Each w ends one block, layers start ... j - 1 (none for
        # w = 0), after the kept layer start - 1, or at the first layer.
        for w in range(min(num_remove, j) + 1):
            start, more = j - w, int(counted and w > 0)
            if w > 0 and start in protect:
                break  # every longer block contains this layer too
            cost = costs[:, start, j] if w > 0 else 0.0
            total = best[start, : num_remove + 1 - w, : limit + 1 - more] + cost
            known, choice = best[j + 1, w:, more:], by[j, w:, more:]
            better = total < known
            np.copyto(known, total, where=better)
            np.copyto(choice, w, where=better)
    blocks = best[-1, num_remove].argmin(0)
    if not np.isfinite(best[-1, num_remove, blocks, np.arange(many)]).all():
        raise SimdiffError(
            f"{num_remove} of {num_layers} layers must be free to remove in at most "
            f"{num_remove if max_blocks is None else max_blocks} blocks, but protected layers "
            f"{sorted(protect)} leave no such choice"
        )
    found = [_trace(by[..., one], num_remove, int(blocks[one]), counted) for one in range(many)]
    return np.array(found, np.int64)


def _trace(by: NDArray[np.int16], k: int, b: int, counted: bool) -> list[int]:
    removed: list[int] = []
    j = len(by) - 1
    while j >= 0:
        w = int(by[j, k, b])
        removed += range(j - w, j)
        k, b, j = k - w, b - int(counted and w > 0), j - w - 1
    return sorted(removed)


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
