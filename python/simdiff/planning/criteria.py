"""Criteria: compute the importance of every layer from the scores; low ones are removed first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simdiff.errors import SimdiffError
from simdiff.planning.block_costs import BLOCK_CRITERIA, block_costs
from simdiff.planning.entry_points import CRITERIA_GROUP, foreign_criteria, loaded
from simdiff.planning.names import DEFAULT_ALPHA, DEFAULT_CRITERION
from simdiff.scoring.scores import LayerScores

# exp(-37) is below half of the spacing of float64 at 1, so sigmoid(x) is 1 from about here on.
SATURATION_POINT = 36.7


@dataclass(frozen=True)
class Criterion:
    """A criterion of single layers: its definition, and the metrics that it needs."""

    name: str
    formula: str
    source: str
    l_diff: Callable[[LayerScores], tuple[float, ...]] | None = None
    """Computes L_diff of every layer, which alpha weighs against the cosine distance."""
    importance: Callable[[LayerScores, int], tuple[float, ...]] | None = None
    """Computes the importance from scores and a seed, for criteria other than the paper's sum."""
    metrics: tuple[str, ...] = ("cosine_distance",)
    """Names of the metrics that must be in the scores."""
    selection: str = "lowest"
    """The selection of a criterion of another package, where none is asked for."""

    @property
    def takes_alpha(self) -> bool:
        """Whether the criterion weighs similarity and difference by alpha."""
        return self.l_diff is not None


@dataclass(frozen=True)
class Importance:
    """The importance of every layer, with the saturation and ties that affect its ranking."""

    criterion: str
    formula: str
    alpha: float | None
    values: tuple[float, ...]
    tie_breakers: tuple[float, ...]
    """L_diff, or the cosine distance if the criterion has none; orders equal importances."""
    saturated: tuple[int, ...]
    """Layers whose sigmoid(L_diff) is exactly 1 in float64."""
    ties: tuple[tuple[int, ...], ...]
    """Groups of layers with exactly equal importance."""

    def ranking(self) -> list[int]:
        """Layers from the least to the most important; ties by L_diff, then by depth."""
        keys = zip(self.values, self.tie_breakers, range(len(self.values)), strict=True)
        return [layer for _, _, layer in sorted(keys)]

    def notes(self) -> list[str]:
        """Warnings about this ranking for users; empty if there are none."""
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
            order = "the cosine distance" if self.alpha is None else "L_diff"
            notes.append(f"tie: layers {layers} have equal importance, ordered by {order}")
        return notes


def _mean(name: str) -> Callable[[LayerScores], tuple[float, ...]]:
    return lambda scores: scores.metrics[name].mean


def _cost_of_each_layer(criterion: str) -> Callable[[LayerScores, int], tuple[float, ...]]:
    def costs(scores: LayerScores, seed: int) -> tuple[float, ...]:
        values = block_costs(scores, criterion).values
        return tuple(values[layer][layer + 1] for layer in range(scores.num_layers))

    return costs


def _block_criterion(name: str, criterion: str, source: str | None = None) -> Criterion:
    """Make a criterion of blocks; the importance of a layer is the cost of cutting it alone."""
    chosen = BLOCK_CRITERIA[criterion]
    return Criterion(
        name, chosen.formula, source or chosen.source, importance=_cost_of_each_layer(criterion)
    )


def _change_of_norm(scores: LayerScores, seed: int) -> tuple[float, ...]:
    before, after = scores.metrics["norm_before"].mean, scores.metrics["norm_after"].mean
    # A layer that makes every state zero, or zero states nonzero, has an infinite change of norm.
    return tuple(
        abs(math.log(y / x)) if x > 0 and y > 0 else (math.inf if x != y else 0.0)
        for x, y in zip(before, after, strict=True)
    )


def _random(scores: LayerScores, seed: int) -> tuple[float, ...]:
    generator = random.Random(seed)
    return tuple(generator.random() for _ in range(scores.num_layers))


_SIMDIFF = "alpha * sigmoid({}) + (1 - alpha) * mean(1 - cos) / 2"

CRITERIA = {
    criterion.name: criterion
    for criterion in (
        _block_criterion("simdiff", "simdiff"),
        Criterion(
            "simdiff-mssd",
            _SIMDIFF.format("mean ||y - x||^2"),
            "SimDiff, arXiv 2604.19520, Eq. 1-9, MSSD variant",
            l_diff=_mean("squared_difference"),
            metrics=("cosine_distance", "squared_difference"),
        ),
        Criterion(
            "simdiff-masd",
            _SIMDIFF.format("mean |y - x|"),
            "SimDiff, arXiv 2604.19520, Eq. 1-9, MASD variant",
            l_diff=_mean("absolute_difference"),
            metrics=("cosine_distance", "absolute_difference"),
        ),
        Criterion(
            "simdiff-max",
            _SIMDIFF.format("max ||y - x||^2"),
            "the maximum over tokens in place of SimDiff's mean (MSSD)",
            l_diff=lambda scores: scores.metrics["squared_difference"].maximum,
            metrics=("cosine_distance", "squared_difference"),
        ),
        Criterion(
            "block-influence",
            "mean(1 - cos)",
            "ShortGPT, arXiv 2403.03853, Eq. 1",
            importance=lambda scores, seed: scores.metrics["cosine_distance"].mean,
        ),
        Criterion(
            "relative-magnitude",
            "mean(||y - x|| / ||x||)",
            "after Samragh et al., arXiv 2312.09299, who divide by ||y||",
            importance=lambda scores, seed: scores.metrics["relative_difference"].mean,
            metrics=("cosine_distance", "relative_difference"),
        ),
        Criterion(
            "norm-ratio",
            "|log(mean ||y|| / mean ||x||)|",
            "the change of length alone, which the cosine does not see",
            importance=_change_of_norm,
            metrics=("cosine_distance", "norm_before", "norm_after"),
        ),
        Criterion(
            "last-n",
            "number of layers that follow",
            "reverse order: Lu et al., arXiv 2411.15558; the deepest layers go first",
            importance=lambda scores, seed: tuple(
                float(scores.num_layers - 1 - layer) for layer in range(scores.num_layers)
            ),
        ),
        Criterion(
            "random",
            "uniform random numbers",
            "the baseline that any criterion must beat",
            importance=_random,
        ),
        _block_criterion("cosine-block", "cosine-distance"),
        _block_criterion("angular-block", "angular-distance"),
        _block_criterion("angular-block-last", "last-token-angle"),
    )
}


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow for x below 0."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def criterion_named(name: str) -> Criterion:
    """The criterion of a name in `CRITERIA`, or of another package.

    Raises:
        SimdiffError: it is unknown, or the package cannot be imported or has something else there.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    if name not in foreign_criteria():
        known = (*CRITERIA, *foreign_criteria())
        raise SimdiffError(f"criterion must be one of {', '.join(known)}, got {name!r}")
    found: Criterion = loaded(CRITERIA_GROUP, name, Criterion)
    if found.name != name or (found.l_diff is None) == (found.importance is None):
        raise SimdiffError(
            f"criterion {name} of another package: must bear this name and have either l_diff or "
            f"importance, got {found.name!r}"
        )
    return found


def check_criterion(criterion: str, alpha: float) -> None:
    """Refuse a criterion or an alpha that `importance` would refuse, before scores exist."""
    criterion_named(criterion)
    if not 0 <= alpha <= 1:
        raise SimdiffError(f"alpha must be in [0, 1], got {alpha}")


def importance(
    scores: LayerScores,
    criterion: str = DEFAULT_CRITERION,
    alpha: float = DEFAULT_ALPHA,
    *,
    seed: int = 0,
) -> Importance:
    """The importance of every layer.

    The paper's criteria are I = alpha * I_diff + (1 - alpha) * I_sim, where I_diff is
    sigmoid(L_diff) and I_sim is half of the mean cosine distance. The formulas of the others are in
    `CRITERIA`; `simdiff` and other criteria of blocks give the cost of cutting the layer alone, see
    `simdiff.planning.block_costs`.

    Args:
        scores: scores of all layers.
        criterion: a name in `CRITERIA`, or of another package.
        alpha: weight of the difference, in [0, 1]; only the paper's criteria use it.
        seed: seed of the criterion random.

    Raises:
        SimdiffError: the criterion is unknown, alpha is outside [0, 1], or the scores lack a metric
            that the criterion needs.

    Source: SimDiff, arXiv 2604.19520, Eq. 1-9; for the others see `CRITERIA`.
    """
    check_criterion(criterion, alpha)
    chosen = criterion_named(criterion)
    _check_metrics(scores, chosen)
    cosine = scores.metrics["cosine_distance"].mean
    saturated: tuple[int, ...] = ()
    if chosen.l_diff is not None:
        tie_breakers = chosen.l_diff(scores)
        _check_length(chosen, tie_breakers, scores.num_layers)
        squashed = [sigmoid(value) for value in tie_breakers]
        values = tuple(
            alpha * difference + (1 - alpha) * distance / 2
            for difference, distance in zip(squashed, cosine, strict=True)
        )
        saturated = tuple(layer for layer, value in enumerate(squashed) if value == 1)
    else:
        assert chosen.importance is not None
        values, tie_breakers = tuple(chosen.importance(scores, seed)), cosine
        _check_length(chosen, values, scores.num_layers)
        _check_finite(chosen, values)
    return Importance(
        criterion=criterion,
        formula=f"{chosen.formula}, seed {seed}" if criterion == "random" else chosen.formula,
        alpha=alpha if chosen.takes_alpha else None,
        values=tuple(values),
        tie_breakers=tuple(tie_breakers),
        saturated=saturated,
        ties=_ties(values),
    )


def _check_metrics(scores: LayerScores, criterion: Criterion) -> None:
    missing = [name for name in criterion.metrics if name not in scores.metrics]
    if missing:
        raise SimdiffError(
            f"{criterion.name} needs {', '.join(missing)} of every layer, which these scores lack: "
            "run `simdiff score` again with this version"
        )


def _check_length(criterion: Criterion, values: Sequence[float], num_layers: int) -> None:
    if len(values) != num_layers:
        raise SimdiffError(
            f"{criterion.name}: must give a number for each of {num_layers} layers, got "
            f"{len(values)}"
        )


def _check_finite(criterion: Criterion, values: tuple[float, ...]) -> None:
    bad = [layer for layer, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise SimdiffError(
            f"{criterion.name}: importance must be finite, but {criterion.formula} is not for "
            f"layers {', '.join(map(str, bad))}"
        )


def _ties(values: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    groups: dict[float, list[int]] = {}
    for layer, value in enumerate(values):
        groups.setdefault(value, []).append(layer)
    return tuple(tuple(layers) for layers in groups.values() if len(layers) > 1)
