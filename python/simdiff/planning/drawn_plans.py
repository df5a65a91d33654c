"""The plans of all draws of the bootstrap at once, where they are made from the costs of blocks.

A plan of one draw is a few hundred thousand steps of Python for a deep model; here each step is one
of numpy for all draws. The results are those of `make_plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simdiff.errors import SimdiffError
from simdiff.planning.block_costs import BLOCK_CRITERIA
from simdiff.planning.blocks import optimal_blocks_of
from simdiff.planning.draws import DrawnPlan, Draws
from simdiff.planning.plan import PruningPlan
from simdiff.planning.shortlist import EXPONENT
from simdiff.scoring.group_scores import Array, above_diagonal
from simdiff.scoring.scores import LayerScores

# Criteria whose importance of a layer is the cost of cutting it alone, and those costs.
_COSTS = {
    "simdiff": "simdiff",
    "cosine-block": "cosine-distance",
    "angular-block": "angular-distance",
    "angular-block-last": "last-token-angle",
}
# So many draws at a time: the states of a deep model with many blocks take 100 MB.
_AT_ONCE = 125


@dataclass(frozen=True)
class PlanOfScores:
    """Makes the plan of scores, and those of all draws of their sequences."""

    plan: Callable[[LayerScores], PruningPlan]
    criterion: str
    selection: str
    max_blocks: int | None

    def __call__(self, scores: LayerScores, /) -> PruningPlan:
        """The plan of scores."""
        return self.plan(scores)

    def of_draws(
        self, scores: LayerScores, weights: NDArray[np.int64]
    ) -> list[DrawnPlan | SimdiffError] | None:
        """The plans of all draws; None where they must be made one by one.

        Args:
            scores: scores that include `sequences`, of which a plan can be made.
            weights: how often each group is drawn, `(draws, groups)`.
        """
        whole = self.plan(scores)
        assert scores.sequences is not None
        if self.criterion not in _COSTS or self.selection not in ("contiguous", "blocks"):
            return None
        drawn = Draws(scores.sequences, weights.astype(np.float64), scores.num_layers)
        upper = self._upper(drawn)
        if upper is None or not bool((np.isfinite(upper) & (upper >= 0)).all()):
            return None
        costs = _full(upper, scores.num_layers)
        layers = np.arange(scores.num_layers)
        importance = costs[:, layers, layers + 1].tolist()
        if self.criterion == "simdiff" and self.selection == "blocks":
            costs = costs**EXPONENT
        most = 1 if self.selection == "contiguous" else self.max_blocks
        removed = [
            layers
            for first in range(0, len(costs), _AT_ONCE)
            for layers in optimal_blocks_of(
                costs[first : first + _AT_ONCE], len(whole.removed), whole.protected, most
            ).tolist()
        ]
        return [DrawnPlan(tuple(r), tuple(i)) for r, i in zip(removed, importance, strict=True)]

    def _upper(self, drawn: Draws) -> Array | None:
        """The costs of all blocks in every draw, `(draws, blocks)`; None without their scores."""
        chosen = BLOCK_CRITERIA[_COSTS[self.criterion]]
        if not chosen.parts:
            return drawn.last_token_angles
        if not set(chosen.parts) <= drawn.sequences.blocks.keys():
            return None
        return chosen.cost(drawn.block_means)


def _full(upper: Array, num_layers: int) -> Array:
    full = np.zeros((len(upper), num_layers + 1, num_layers + 1))
    full[:, above_diagonal(num_layers + 1)] = upper
    return full
