"""A handful of candidate plans from one pass, to choose from by perplexity.

Costs of separate blocks are squared relative errors. How they add up to the error of the whole
plan is what hidden states of the dense model cannot tell: errors that are orthogonal add in their
squares, errors that point one way add in their lengths, the square roots. In between, for the cost
c of a block, the plan minimises

    sum over blocks of c^p,   p = 1 (orthogonal) ... 1/2 (aligned)

With p = 1/2 one long block is cheapest, since lengths obey the triangle inequality; the larger p,
the more scattered the plan. Each p gives one plan by dynamic programming; together with the K
lowest single layers they make a shortlist of a few distinct plans, from the best of which
`simdiff.exchange` starts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from simdiff.block_costs import block_costs
from simdiff.block_selection import optimal_blocks
from simdiff.criteria import importance
from simdiff.scores import LayerScores

# A third of the way from orthogonal to aligned errors comes first, and is taken unevaluated: of the
# numbers of layers 2 ... 12 on SmolLM2-135M it beats p = 1 at seven, loses at two and is equal at
# two; on Gemma 3 270M it is better at 2 layers, equal at 4 and worse at 6. Then p = 1, more
# aligned errors, and partly cancelling ones.
EXPONENTS = (5 / 6, 1.0, 2 / 3, 1 / 2, 7 / 6)


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


def lowest_influence(
    scores: LayerScores, num_remove: int, protect: Collection[int] = ()
) -> tuple[int, ...]:
    """The layers of lowest block influence, in order of depth (ShortGPT, arXiv 2403.03853)."""
    ranking = importance(scores, "block-influence").ranking()
    return tuple(sorted([layer for layer in ranking if layer not in protect][:num_remove]))


def shortlist(
    scores: LayerScores,
    num_remove: int,
    protect: Collection[int] = (),
    *,
    criterion: str = "simdiff",
    max_blocks: int | None = None,
) -> list[Candidate]:
    """Distinct plans to choose from, at most seven; the first is the one to take unevaluated.

    In this order: optimal blocks for p = 5/6, the K layers of lowest block influence (so that the
    choice is never worse on its text), the K layers of lowest cost, then the other p.

    Args:
        scores: with blocks.
        num_remove: how many layers go.
        protect: layers that stay, in all candidates.
        criterion: of the blocks, a name in `simdiff.block_costs.BLOCK_CRITERIA`.
        max_blocks: at most so many separate blocks; the K lowest are then left out.

    Raises:
        SimdiffError: scores without blocks, or a number of layers that cannot be met.
    """
    costs = block_costs(scores, criterion)
    plans: dict[tuple[int, ...], str] = {}

    def add(removed: Collection[int], origin: str) -> None:
        plans.setdefault(tuple(sorted(removed)), origin)

    def add_blocks(exponent: float) -> None:
        removed = optimal_blocks(costs.raised(exponent), num_remove, protect, max_blocks)
        add(removed, f"optimal blocks, p = {exponent:.3g}")

    add_blocks(EXPONENTS[0])
    if max_blocks is None:
        add(lowest_influence(scores, num_remove, protect), "lowest block influence")
        single = [costs.values[layer][layer + 1] for layer in range(costs.num_layers)]
        free = sorted((value, layer) for layer, value in enumerate(single) if layer not in protect)
        add([layer for _, layer in free[:num_remove]], f"lowest {criterion}")
    for exponent in EXPONENTS[1:]:
        add_blocks(exponent)
    return [Candidate(removed, origin) for removed, origin in plans.items()]
