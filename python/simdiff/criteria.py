"""Criteria: from the scores of all layers to their importance, high for what must stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from simdiff.block_costs import BLOCK_CRITERIA, block_costs
from simdiff.errors import SimdiffError
from simdiff.scores import LayerScores

# exp(-37) is below half of the spacing of float64 at 1: from about here sigmoid(x) is 1.
SATURATION_POINT = 36.7


@dataclass(frozen=True)
class Criterion:
    """How a criterion is defined, and what it takes from the scores."""

    name: str
    formula: str
    source: str
    difference: Callable[[LayerScores], tuple[float, ...]] | None
    """L_diff of every layer; None for a criterion without one."""
    own: Callable[[LayerScores], tuple[float, ...]] | None = None
    """The importance itself, for a criterion that is not the paper's sum."""


@dataclass(frozen=True)
class Importance:
    """The importance of every layer, and whether its ranking means what it seems to mean."""

    criterion: str
    formula: str
    alpha: float | None
    values: tuple[float, ...]
    tie_breakers: tuple[float, ...]
    """L_diff (the importance itself where the criterion has none): orders equal importances."""
    saturated: tuple[int, ...]
    """Layers whose sigmoid(L_diff) is exactly 1 in float64."""
    ties: tuple[tuple[int, ...], ...]
    """Groups of layers with exactly equal importance."""

    def ranking(self) -> list[int]:
        """Layers from the least to the most important; ties by L_diff, then by depth."""
        keys = zip(self.values, self.tie_breakers, range(len(self.values)), strict=True)
        return [layer for _, _, layer in sorted(keys)]

    def notes(self) -> list[str]:
        """What a user has to know about this ranking; empty if there is nothing."""
        notes = []
        count, total = len(self.saturated), len(self.values)
        if count:
            lowest = min(self.tie_breakers[layer] for layer in self.saturated)
            consequence = (
                "the difference no longer tells any layers apart: the ranking is that of block "
                "influence, whatever alpha"
                if count == total
                else "the difference no longer tells these layers apart"
            )
            notes.append(
                f"saturation: sigmoid(L_diff) is exactly 1 for {count} of {total} layers (L_diff "
                f"there is {lowest:.4g} or more, and the sigmoid is 1 from about "
                f"{SATURATION_POINT}); {consequence}"
            )
        for group in self.ties:
            layers = ", ".join(map(str, group))
            notes.append(f"tie: layers {layers} have equal importance, ordered by L_diff")
        return notes


def _cost_of_each_layer(scores: LayerScores) -> tuple[float, ...]:
    costs = block_costs(scores, "simdiff")
    return tuple(costs.values[layer][layer + 1] for layer in range(costs.num_layers))


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "simdiff",
            BLOCK_CRITERIA["simdiff"].formula,
            BLOCK_CRITERIA["simdiff"].source,
            None,
            _cost_of_each_layer,
        ),
        Criterion(
            "simdiff-mssd",
            "alpha * sigmoid(mean ||y - x||^2) + (1 - alpha) * mean(1 - cos) / 2",
            "SimDiff, arXiv 2604.19520, Eq. 1-9, MSSD variant",
            lambda scores: scores.metrics["squared_difference"].mean,
        ),
        Criterion(
            "simdiff-masd",
            "alpha * sigmoid(mean |y - x|) + (1 - alpha) * mean(1 - cos) / 2",
            "SimDiff, arXiv 2604.19520, Eq. 1-9, MASD variant",
            lambda scores: scores.metrics["absolute_difference"].mean,
        ),
        Criterion(
            "simdiff-max",
            "alpha * sigmoid(max ||y - x||^2) + (1 - alpha) * mean(1 - cos) / 2",
            "the maximum over tokens in place of SimDiff's mean (MSSD)",
            lambda scores: scores.metrics["squared_difference"].maximum,
        ),
        Criterion(
            "block-influence",
            "mean(1 - cos)",
            "ShortGPT, arXiv 2403.03853, Eq. 1",
            None,
            lambda scores: scores.metrics["cosine_distance"].mean,
        ),
    )
}
DEFAULT_CRITERION = "simdiff"
DEFAULT_ALPHA = 0.5


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow for x below 0."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def check_criterion(criterion: str, alpha: float) -> None:
    """Refuse what `importance` would refuse, before scores exist."""
    if criterion not in CRITERIA:
        raise SimdiffError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if not 0 <= alpha <= 1:
        raise SimdiffError(f"alpha must be in [0, 1], got {alpha}")


def importance(
    scores: LayerScores, criterion: str = DEFAULT_CRITERION, alpha: float = DEFAULT_ALPHA
) -> Importance:
    """The importance of every layer.

    The paper's: I = alpha * I_diff + (1 - alpha) * I_sim with I_diff = sigmoid(L_diff) and I_sim
    half of the mean cosine distance. block-influence is the mean cosine distance itself, simdiff
    the cost of cutting the layer alone (`simdiff.block_costs`).

    Args:
        scores: of all layers; simdiff needs those of blocks too.
        criterion: a name in `CRITERIA`.
        alpha: weight of the difference, in [0, 1]; block-influence and simdiff do not use it.

    Raises:
        SimdiffError: unknown criterion, alpha outside [0, 1], scores that lack what it needs.

    Source: SimDiff, arXiv 2604.19520, Eq. 1-9.
    """
    check_criterion(criterion, alpha)
    chosen = CRITERIA[criterion]
    saturated: tuple[int, ...] = ()
    if chosen.difference is None:
        assert chosen.own is not None
        values = tie_breakers = chosen.own(scores)
    else:
        cosine = scores.metrics["cosine_distance"].mean
        tie_breakers = chosen.difference(scores)
        squashed = [sigmoid(value) for value in tie_breakers]
        values = tuple(
            alpha * difference + (1 - alpha) * distance / 2
            for difference, distance in zip(squashed, cosine, strict=True)
        )
        saturated = tuple(layer for layer, value in enumerate(squashed) if value == 1)
    return Importance(
        criterion=criterion,
        formula=chosen.formula,
        alpha=None if chosen.difference is None else alpha,
        values=tuple(values),
        tie_breakers=tuple(tie_breakers),
        saturated=saturated,
        ties=_ties(values),
    )


def _ties(values: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    groups: dict[float, list[int]] = {}
    for layer, value in enumerate(values):
        groups.setdefault(value, []).append(layer)
    return tuple(tuple(layers) for layers in groups.values() if len(layers) > 1)
