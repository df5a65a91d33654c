"""The plans that scores alone give, among which perplexity chooses.

Costs of separate blocks are squared relative errors. The hidden states of the dense model do not
tell how they add up to the error of the whole plan: orthogonal errors add in their squares,
parallel errors in their lengths, the square roots. Between these extremes, with the cost c of a
block, the plan minimises

    sum over blocks of c^p,   p = 1 (orthogonal) ... 1/2 (aligned)

With p = 1/2 one long block is cheapest, since lengths obey the triangle inequality; the larger p,
the more scattered the plan. The toolkit uses p = 5/6, a third of the way from 1 to 1/2. On the
development texts (three models, two kinds of text, 10% and 25% of the layers, one seed) p = 1 gave
the same plan after the exchanges in eleven cases of twelve and an 11% higher perplexity in one.
Adding the plans for p = 1, 2/3, 1/2 and 7/6 changed no plan in the twelve cases, so they are left
out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from simdiff.planning.block_costs import block_costs
from simdiff.planning.blocks import optimal_blocks
from simdiff.planning.criteria import importance
from simdiff.scoring.scores import LayerScores

EXPONENT = 5 / 6


@dataclass(frozen=True)
class Candidate:
    """A plan on the shortlist, with its loss once it was evaluated."""

    removed: tuple[int, ...]
    """Layers that the plan removes, in order of depth."""
    origin: str
    nll: float | None = None
    """Mean loss in nats per token on the calibration windows of the choice, or divergence from the
    dense model where that is what chose; None if it was not evaluated, or was NaN or Inf."""
    num_windows: int = 0
    """Number of windows over which `nll` is the mean."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"removed": list(self.removed)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Candidate:
        """The inverse of `to_dict`."""
        return cls(
            tuple(content["removed"]),
            str(content["origin"]),
            content["nll"],
            int(content.get("num_windows", 0)),
        )


def shortlist(
    scores: LayerScores,
    num_remove: int,
    protect: Collection[int] = (),
    *,
    max_blocks: int | None = None,
) -> list[Candidate]:
    """One or two distinct plans to choose from; without evaluations the first one is taken.

    The first holds the optimal blocks of `simdiff` for p = 5/6. The second holds the K layers of
    lowest block influence (ShortGPT, arXiv 2403.03853), so that the search starts no worse than
    that on its text.

    Args:
        scores: scores that include blocks.
        num_remove: number of layers to remove.
        protect: layers that stay, in all candidates.
        max_blocks: upper limit of the number of separate blocks; with it the K lowest are left out.

    Raises:
        SimdiffError: the scores lack blocks, or the number of layers is impossible.
    """
    costs = block_costs(scores).raised(EXPONENT)
    blocks = tuple(sorted(optimal_blocks(costs, num_remove, protect, max_blocks)))
    plans = {blocks: f"optimal blocks, p = {EXPONENT:.3g}"}
    if max_blocks is None:
        ranking = importance(scores, "block-influence").ranking()
        lowest = [layer for layer in ranking if layer not in protect][:num_remove]
        plans.setdefault(tuple(sorted(lowest)), "lowest block influence")
    return [Candidate(removed, origin) for removed, origin in plans.items()]
