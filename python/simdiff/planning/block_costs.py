"""The costs of cutting blocks of layers, computed from their scores.

The default, `simdiff`, combines similarity and difference. For a token whose hidden state is h_i
before the block and h_j after it,

    ||h_j - h_i||^2 / (2 ||h_i|| ||h_j||) = (1 - cos(h_i, h_j)) + (cosh(ln(||h_j|| / ||h_i||)) - 1)

which is an identity (the law of cosines): the first term measures the change of direction, the
second the change of norm. The cost is the mean over tokens, cosine distance plus norm change.

- It is the squared error of passing on h_i in place of h_j, in units of their norms. Every later
  layer normalises its input, so the scale of the hidden states must not matter, and it does not.
- It is unbounded, so nothing saturates; the cosine distance ends at 2, a sigmoid at 1.
- A layer that writes a massive activation into one token of thousands, or erases it, changes the
  direction little and is cheap by the cosine. Here the ratio of the norms makes it expensive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simdiff.errors import SimdiffError
from simdiff.planning.blocks import BlockCosts
from simdiff.scoring.group_scores import Array
from simdiff.scoring.scores import LayerScores


@dataclass(frozen=True)
class BlockCriterion:
    """A criterion of blocks: the definition of its cost, and the scores that it needs."""

    name: str
    formula: str
    source: str
    parts: tuple[str, ...]
    """Scores of blocks whose sum is the cost; none of them takes the last-token angles."""

    def cost(self, score_of: Callable[[str], Array]) -> Array:
        """The costs, from the scores of blocks by name, in whatever shape these are."""
        first, *others = map(score_of, self.parts)
        for other in others:
            first = first + other
        return first


BLOCK_CRITERIA = {
    criterion.name: criterion
    for criterion in (
        BlockCriterion(
            "simdiff",
            "mean ||y - x||^2 / (2 ||x|| ||y||) = mean(1 - cos) + mean (||y|| - ||x||)^2 / "
            "(2 ||x|| ||y||)",
            "similarity and difference after SimDiff, arXiv 2604.19520, without its sigmoid",
            ("cosine_distance", "norm_change"),
        ),
        BlockCriterion(
            "cosine-distance",
            "mean(1 - cos)",
            "LLM-Streamline, arXiv 2403.19135, Eq. 2",
            ("cosine_distance",),
        ),
        BlockCriterion(
            "angular-distance",
            "mean arccos(cos) / pi",
            "Gromov et al., arXiv 2403.17887, Eq. 7, of all tokens",
            ("angular_distance",),
        ),
        BlockCriterion(
            "last-token-angle",
            "mean arccos(cos) / pi over the last token of each sequence",
            "Gromov et al., arXiv 2403.17887, Eq. 7",
            (),
        ),
        BlockCriterion(
            "norm-change",
            "mean (||y|| - ||x||)^2 / (2 ||x|| ||y||)",
            "the difference part of simdiff alone, for ablations",
            ("norm_change",),
        ),
    )
}


def block_costs(scores: LayerScores, criterion: str = "simdiff") -> BlockCosts:
    """The cost of cutting each block of layers.

    Args:
        scores: scores that include blocks.
        criterion: a name in `BLOCK_CRITERIA`.

    Raises:
        SimdiffError: the criterion is unknown, or the scores lack the blocks that it needs.
    """
    if criterion not in BLOCK_CRITERIA:
        raise SimdiffError(
            f"block_costs: criterion must be one of {', '.join(BLOCK_CRITERIA)}, got {criterion!r}"
        )
    chosen = BLOCK_CRITERIA[criterion]
    if not chosen.parts:
        return _last_token_costs(scores, chosen)
    if scores.blocks is None:
        raise SimdiffError(
            f"criterion {criterion} needs the scores of all blocks of layers, which these scores "
            "lack: score the model again with `simdiff score` (in Python, score(..., blocks=True))"
        )
    matrices = scores.blocks.metrics
    missing = [name for name in chosen.parts if name not in matrices]
    if missing:
        raise SimdiffError(
            f"criterion {criterion} needs the {', '.join(missing)} of all blocks of layers, which "
            "these scores of an older version lack: score the model again with `simdiff score` (in "
            "Python, score(..., blocks=True))"
        )
    costs = chosen.cost(lambda name: np.array(matrices[name], np.float64))
    return BlockCosts(chosen.name, chosen.formula, tuple(map(tuple, costs.tolist())))


def _last_token_costs(scores: LayerScores, chosen: BlockCriterion) -> BlockCosts:
    if scores.last_token_angles is None:
        raise SimdiffError(
            f"criterion {chosen.name} needs the angles of all blocks at the last token of each "
            "sequence, which these scores lack: score the model again with `simdiff score` (in "
            "Python, score(..., blocks=True))"
        )
    return BlockCosts(chosen.name, chosen.formula, scores.last_token_angles)
