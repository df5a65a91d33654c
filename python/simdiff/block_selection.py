"""Selection over blocks: the disjoint runs of layers whose removal costs least together."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from simdiff.block_scores import Matrix
from simdiff.errors import SimdiffError


@dataclass(frozen=True)
class BlockCosts:
    """What cutting each run of consecutive layers costs: `values[start][stop]`, from 0 up."""

    criterion: str
    formula: str
    values: Matrix

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.values) - 1

    def of(self, removed: Collection[int]) -> float:
        """The cost of a plan: the sum over its blocks, the longest runs of removed layers."""
        return math.fsum(self.values[start][stop] for start, stop in blocks_of(removed))

    def raised(self, exponent: float) -> BlockCosts:
        """Every cost to a power, which sets how the costs of separate blocks add up."""
        values = tuple(tuple(value**exponent for value in row) for row in self.values)
        return BlockCosts(self.criterion, f"({self.formula}) ^ {exponent:.4g}", values)


def blocks_of(layers: Collection[int]) -> list[tuple[int, int]]:
    """The longest runs of consecutive layers, as (start, stop), in order."""
    blocks: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if blocks and blocks[-1][1] == layer:
            blocks[-1] = (blocks[-1][0], layer + 1)
        else:
            blocks.append((layer, layer + 1))
    return blocks


def best_contiguous_block(
    costs: BlockCosts, num_remove: int, protect: Collection[int] = ()
) -> tuple[int, ...]:
    """The one block of `num_remove` consecutive layers of lowest cost; the first of equal ones.

    Raises:
        SimdiffError: no block is free of protected layers.

    Source: Gromov et al., arXiv 2403.17887, Section 3.1 (there with the angular distance).
    """
    return optimal_blocks(costs, num_remove, protect, max_blocks=1)


def optimal_blocks(
    costs: BlockCosts,
    num_remove: int,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
) -> tuple[int, ...]:
    """The `num_remove` layers of least total cost, the cost of a plan being `BlockCosts.of` it.

    Exact, by dynamic programming from the first layer to the last. With F(j, k, b) the least cost
    of deciding layers 0 ... j - 1 so that layer j is kept, k of them go and they form b blocks:

        F(j, k, b) = min over w >= 0 of F(j - 1 - w, k - w, b - [w > 0]) + cost(j - w, j)

    where w layers before j go and layer j - 1 - w stays. O(L K^2 max_blocks) additions (O(L K^2)
    without a limit on blocks): below 0.1 s for L = 80.

    Args:
        costs: finite and not negative, of every block.
        num_remove: exactly so many layers go.
        protect: layers that stay.
        max_blocks: at most so many separate runs; None sets no limit.

    Raises:
        SimdiffError: a cost is not finite, or no choice satisfies all of this.
    """
    num_layers, protect = costs.num_layers, frozenset(protect)
    _check(costs, num_remove, max_blocks)
    limit = num_remove if max_blocks is None else max_blocks
    counted = max_blocks is not None  # without a limit, all numbers of blocks share one entry
    # best[j][k, b]: least cost, and the length of the block that ends before layer j.
    best: list[dict[tuple[int, int], tuple[float, int]]] = [{} for _ in range(num_layers + 1)]
    for j in range(num_layers + 1):
        for w in range(min(num_remove, j) + 1):
            start = j - w
            if w > 0 and start in protect:
                break
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
