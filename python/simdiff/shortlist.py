"""The plans that scores alone give, to choose from by perplexity.

Costs of separate blocks are squared relative errors. How they add up to the error of the whole
plan is what hidden states of the dense model cannot tell: errors that are orthogonal add in their
squares, errors that point one way add in their lengths, the square roots. In between, for the cost
c of a block, the plan minimises

    sum over blocks of c^p,   p = 1 (orthogonal) ... 1/2 (aligned)

With p = 1/2 one long block is cheapest, since lengths obey the triangle inequality; the larger p,
the more scattered the plan. p = 5/6 it is, a third of the way. On the development texts (three
models, two kinds of text, 10% and 25% of the layers, one seed) p = 1 gives a perplexity after the
exchanges that is 11% higher in one case of twelve and the same plan in eleven; with p = 1, 2/3, 1/2
and 7/6 beside it the plan after the exchanges was the same in all twelve, so they are not read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from simdiff.block_costs import block_costs
from simdiff.block_selection import optimal_blocks
from simdiff.criteria import importance
from simdiff.scores import LayerScores

EXPONENT = 5 / 6


@dataclass(frozen=True)
class Candidate:
    """A plan on the shortlist, and what it turned out to be worth."""

    removed: tuple[int, ...]
    """In order of depth."""
    origin: str
    nll: float | None = None
    """In nats per token on the calibration windows of the choice; None before it was evaluated, or
    where it was NaN or Inf."""
    num_windows: int = 0
    """On how many of them."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"removed": list(self.removed)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Candidate:
        """The inverse of `to_dict`."""
        return cls(tuple(content["removed"]), str(content["origin"]), content["nll"],
                   int(content.get("num_windows", 0)))  # fmt: skip


def shortlist(
    scores: LayerScores,
    num_remove: int,
    protect: Collection[int] = (),
    *,
    max_blocks: int | None = None,
) -> list[Candidate]:
    """Distinct plans to choose from, at most two; the first is the one to take unevaluated.

    The optimal blocks of `simdiff` for p = 5/6, then the K layers of lowest block influence
    (ShortGPT, arXiv 2403.03853), so that the search starts no worse on its text.

    Args:
        scores: with blocks.
        num_remove: how many layers go.
        protect: layers that stay, in all candidates.
        max_blocks: at most so many separate blocks; the K lowest are then left out.

    Raises:
        SimdiffError: scores without blocks, or a number of layers that cannot be met.
    """
    costs = block_costs(scores).raised(EXPONENT)
    blocks = tuple(sorted(optimal_blocks(costs, num_remove, protect, max_blocks)))
    plans = {blocks: f"optimal blocks, p = {EXPONENT:.3g}"}
    if max_blocks is None:
        ranking = importance(scores, "block-influence").ranking()
        lowest = [layer for layer in ranking if layer not in protect][:num_remove]
        plans.setdefault(tuple(sorted(lowest)), "lowest block influence")
    return [Candidate(removed, origin) for removed, origin in plans.items()]
