"""The exact sweep over alpha: evaluate once every set of layers that some alpha removes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.planning.criteria import CRITERIA, Importance, importance
from simdiff.planning.perplexity_search import Ahead
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import check_selection, select
from simdiff.scoring.scores import LayerScores


@dataclass(frozen=True)
class AlphaInterval:
    """An interval of alphas that remove the same layers; a single point has lower = upper."""

    lower: Fraction
    upper: Fraction
    lower_closed: bool
    upper_closed: bool
    removed: tuple[int, ...]
    """The layers that these alphas remove, in order of depth."""

    def __contains__(self, alpha: float | Fraction) -> bool:
        """Whether an alpha is in the interval."""
        return (self.lower < alpha or (self.lower_closed and alpha == self.lower)) and (
            alpha < self.upper or (self.upper_closed and alpha == self.upper)
        )

    @property
    def alpha(self) -> float:
        """An alpha in the interval with few decimals; the nearest if no float lies in it."""
        middle = (self.lower + self.upper) / 2
        for digits in range(1, 18):
            if (rounded := round(float(middle), digits)) in self:
                return rounded
        return float(middle)

    def __str__(self) -> str:
        """The interval in mathematical notation, such as `[0, 0.25)`."""
        left, right = "(["[self.lower_closed], ")]"[self.upper_closed]
        return f"{left}{float(self.lower):.6g}, {float(self.upper):.6g}{right}"


@dataclass(frozen=True)
class AlphaSweep:
    """The perplexity as a function of alpha, which is constant on each interval."""

    criterion: str
    intervals: tuple[AlphaInterval, ...]
    perplexity: dict[tuple[int, ...], float]
    """The perplexity of the model without each set of layers; may be NaN or Inf."""
    best: AlphaInterval
    """The interval of lowest perplexity; the widest of several."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; a perplexity that is not finite is null."""
        return {
            "criterion": self.criterion,
            "num_sets": len(self.perplexity),
            "curve": [
                {
                    "alpha": str(interval),
                    "lower": float(interval.lower),
                    "upper": float(interval.upper),
                    "removed": list(interval.removed),
                    "perplexity": _finite_or_none(self.perplexity[interval.removed]),
                }
                for interval in self.intervals
            ],
            "best": str(self.best),
        }

    def notes(self) -> list[str]:
        """Warnings about the sweep for users; empty if there are none."""
        notes = [
            f"alpha swept exactly: {len(self.intervals)} intervals remove {len(self.perplexity)} "
            f"distinct sets of layers; the best for alpha in {self.best}"
        ]
        notes += [
            f"the model without layers {', '.join(map(str, removed))} has perplexity {value}: "
            "out of the sweep"
            for removed, value in self.perplexity.items()
            if not math.isfinite(value)
        ]
        return notes


def alpha_intervals(
    scores: LayerScores, criterion: str, num_remove: int, protect: Collection[int] = ()
) -> tuple[AlphaInterval, ...]:
    """All sets of `num_remove` layers that some alpha in [0, 1] removes, with their alphas.

    The importance of a layer is linear in alpha, so the order of two layers changes only where
    their lines cross: at most L (L - 1) / 2 values. The set is found at each of these values and
    between adjacent ones. The arithmetic is in integers (the scores are float64 numbers, which are
    fractions), so that no crossing is missed and ties are exact. Ties are resolved as in
    `Importance.ranking`.

    Raises:
        SimdiffError: the criterion has no alpha, or the selection is impossible.

    Source: SimDiff, arXiv 2604.19520, Section 3, which searches alpha by ternary search. The
        perplexity is not unimodal in alpha, so ternary search can miss the best alpha.
    """
    ranked = _ranked(scores, criterion, 1.0)
    check_selection(len(ranked.values), num_remove, protect)
    difference = [Fraction(value) for value in ranked.values]  # I_diff: I at alpha = 1
    similarity = [Fraction(value) for value in _ranked(scores, criterion, 0.0).values]
    unit = math.lcm(*(value.denominator for value in (*difference, *similarity)))
    offset = [int(value * unit) for value in similarity]
    slope = [int((d - s) * unit) for d, s in zip(difference, similarity, strict=True)]
    free = [layer for layer in range(len(offset)) if layer not in protect]

    def lowest(alpha: Fraction) -> tuple[int, ...]:
        p, q = alpha.numerator, alpha.denominator
        keys = sorted(
            (q * offset[layer] + p * slope[layer], ranked.tie_breakers[layer], layer)
            for layer in free
        )
        return tuple(sorted(layer for _, _, layer in keys[:num_remove]))

    points = sorted({Fraction(0), Fraction(1), *_crossings(offset, slope, free)})
    pieces = [_point(points[0], lowest(points[0]))]
    for lower, upper in itertools.pairwise(points):
        inside = AlphaInterval(lower, upper, False, False, lowest((lower + upper) / 2))
        for piece in (inside, _point(upper, lowest(upper))):
            if piece.removed == pieces[-1].removed:
                pieces[-1] = replace(pieces[-1], upper=piece.upper, upper_closed=piece.upper_closed)
            else:
                pieces.append(piece)
    return tuple(pieces)


def sweep_alpha(
    scores: LayerScores,
    criterion: str,
    num_remove: int,
    evaluate: Callable[[tuple[int, ...]], float],
    protect: Collection[int] = (),
    ahead: Ahead | None = None,
) -> AlphaSweep:
    """Evaluate once every set of layers that some alpha removes, and find the best alphas.

    Args:
        scores: scores of all layers.
        criterion: a criterion that takes alpha, such as simdiff-masd.
        num_remove: number of layers to remove.
        evaluate: returns the perplexity of the model without the given layers.
        protect: layers that stay.
        ahead: is told all sets before they are evaluated.

    Raises:
        SimdiffError: see `alpha_intervals`; or no set has a finite perplexity.
    """
    intervals = alpha_intervals(scores, criterion, num_remove, protect)
    sets = dict.fromkeys(interval.removed for interval in intervals)
    if ahead is not None:
        ahead(list(map(frozenset, sets)))
    perplexity = {removed: evaluate(removed) for removed in sets}
    finite = [i for i in intervals if math.isfinite(perplexity[i.removed])]
    if not finite:
        raise SimdiffError(
            f"sweep_alpha: perplexity must be finite for some alpha, got none among "
            f"{len(perplexity)} sets of {num_remove} layers"
        )
    best = min(finite, key=lambda i: (perplexity[i.removed], i.lower - i.upper))
    return AlphaSweep(criterion, intervals, perplexity, best)


def sweep_plan(
    scores: LayerScores, sweep: AlphaSweep, protect: Collection[int] = ()
) -> PruningPlan:
    """Make the plan of the best alphas; its alpha is one of them."""
    alpha = sweep.best.alpha
    plan = select(
        scores, importance(scores, sweep.criterion, alpha), len(sweep.best.removed), protect
    )
    # Float importances may order two layers wrongly where their lines all but touch.
    removed = tuple(layer for layer in plan.ranking if layer in sweep.best.removed)
    return replace(plan, removed=removed, notes=(*plan.notes, *sweep.notes()))


def _ranked(scores: LayerScores, criterion: str, alpha: float) -> Importance:
    ranked = importance(scores, criterion, alpha)
    if ranked.alpha is None:
        swept = ", ".join(name for name, entry in CRITERIA.items() if entry.takes_alpha)
        raise SimdiffError(f"alpha can be swept for one of {swept}, got {criterion!r}")
    return ranked


def _crossings(offset: list[int], slope: list[int], layers: list[int]) -> set[Fraction]:
    found = set()
    for index, i in enumerate(layers):
        for j in layers[index + 1 :]:
            gap, closing = offset[j] - offset[i], slope[i] - slope[j]
            if closing < 0:
                gap, closing = -gap, -closing
            if 0 < gap < closing:
                found.add(Fraction(gap, closing))
    return found


def _point(alpha: Fraction, removed: tuple[int, ...]) -> AlphaInterval:
    return AlphaInterval(alpha, alpha, True, True, removed)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
