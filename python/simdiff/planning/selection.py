"""Selection: make a PruningPlan from the layers of lowest importance."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import check_layers
from simdiff.planning.criteria import Importance
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.scores import LayerScores


def check_selection(num_layers: int, num_remove: int, protect: Collection[int]) -> None:
    """Refuse numbers and protected layers that `select` would refuse, before scores exist."""
    check_layers(protect, num_layers, "protected layers")
    if not isinstance(num_remove, Integral) or not 1 <= num_remove < num_layers:
        raise SimdiffError(
            f"the number of layers to remove must be 1 to {num_layers - 1} of {num_layers}, "
            f"got {num_remove!r}"
        )
    if num_layers - len(protect) < num_remove:
        raise SimdiffError(
            f"{num_remove} layers must be free to remove, got {num_layers - len(protect)}: "
            f"{len(protect)} of {num_layers} are protected"
        )


def select(
    scores: LayerScores,
    ranked: Importance,
    num_remove: int,
    protect: Collection[int] = (),
) -> PruningPlan:
    """Choose the layers of lowest importance, in one shot and anywhere in the depth.

    Args:
        scores: scores from which `ranked` was computed; the plan stores their provenance.
        ranked: importance of every layer.
        num_remove: number of layers to remove, 1 to num_layers - 1.
        protect: layers that stay, whatever their importance.

    Raises:
        SimdiffError: `num_remove` is out of range, or too few layers are not protected.

    Source: SimDiff, arXiv 2604.19520, Section 3 (the K lowest).
    """
    num_layers = len(ranked.values)
    check_selection(num_layers, num_remove, protect)
    ranking = ranked.ranking()
    candidates = [layer for layer in ranking if layer not in protect]
    return PruningPlan(
        removed=tuple(candidates[:num_remove]),
        num_layers=num_layers,
        protected=tuple(sorted(protect)),
        criterion=ranked.criterion,
        formula=ranked.formula,
        alpha=ranked.alpha,
        importance=ranked.values,
        ranking=tuple(ranking),
        notes=tuple(ranked.notes()),
        model=scores.model,
        calibration=scores.calibration,
    )
