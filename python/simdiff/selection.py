"""Selection: from importance to a PruningPlan, the list of layers that go."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simdiff.block_selection import blocks_of
from simdiff.criteria import Importance
from simdiff.errors import SimdiffError
from simdiff.files import header, read_json, write_json
from simdiff.layer_entries import check_layers
from simdiff.plan_confidence import PlanConfidence
from simdiff.plan_kinds import refuse_sublayers
from simdiff.scores import LayerScores

SCHEMA = "simdiff.plan"
SCHEMA_VERSION = 3  # 2 added selection and candidates; 3 choice_agreement, and no decisive


@dataclass(frozen=True)
class PruningPlan:
    """Which layers go; all indices count from 0 in the model before pruning."""

    removed: tuple[int, ...]
    """In the order of removal, the least important first."""
    num_layers: int
    """Before pruning."""
    protected: tuple[int, ...]
    criterion: str
    formula: str
    alpha: float | None
    importance: tuple[float, ...]
    ranking: tuple[int, ...]
    """All layers, the least important first, ties resolved."""
    notes: tuple[str, ...]
    model: dict[str, Any]
    calibration: dict[str, Any]
    selection: str = "lowest"
    """How the layers were chosen by importance or by the costs of blocks, in a few words."""
    candidates: tuple[dict[str, Any], ...] = ()
    """The plans among which perplexity chose, with their loss; empty where nothing was run."""
    choice_agreement: float | None = None
    """The share of draws of the text they read that choose it again (`simdiff.choice`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `simdiff plan` that it was made with, by their names there."""
    confidence: PlanConfidence | None = None
    """How often the bootstrap over sequences gives the plan of scores alone, which is another one
    where perplexity chose another; None where sequences are not known apart."""

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay, in order."""
        gone = set(self.removed)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    def reason(self, layer: int) -> str:
        """Why a layer goes or stays, in a few words."""
        rank = _ordinal(self.ranking.index(layer) + 1)
        if layer in self.protected:
            return f"{rank} lowest, protected"
        if layer in self.removed and self.selection != "lowest":
            start, stop = next(b for b in blocks_of(self.removed) if b[0] <= layer < b[1])
            return f"{rank} lowest, " + (
                "alone" if stop == start + 1 else f"in block {start}-{stop - 1}"
            )
        return f"{rank} lowest"

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            **header(SCHEMA, SCHEMA_VERSION),
            "model": self.model,
            "calibration": self.calibration,
            "criterion": self.criterion,
            "formula": self.formula,
            "alpha": self.alpha,
            "num_layers": self.num_layers,
            "removed": list(self.removed),
            "kept": list(self.kept),
            "protected": list(self.protected),
            "importance": list(self.importance),
            "ranking": list(self.ranking),
            "notes": list(self.notes),
            "selection": self.selection,
            "candidates": list(self.candidates),
            "choice_agreement": self.choice_agreement,
            "options": self.options,
            "confidence": None if self.confidence is None else self.confidence.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write plan.json."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read plan.json.

        Raises:
            SimdiffError: missing, corrupt, inconsistent, or written by a newer version.
        """
        refuse_sublayers(Path(path))
        content = read_json(path, SCHEMA, SCHEMA_VERSION)
        try:
            num_layers, confidence = content["num_layers"], content.get("confidence")
            removed = tuple(content["removed"])
            check_layers(removed, num_layers)
            if not 0 < len(removed) < num_layers:
                raise ValueError(f"removed must name 1 to {num_layers - 1} layers")
            if len(content["importance"]) != num_layers:
                raise ValueError(f"importance must have {num_layers} entries")
            if sorted(content["ranking"]) != list(range(num_layers)):
                raise ValueError("ranking must name every layer once")
            return cls(
                removed=removed,
                num_layers=num_layers,
                protected=tuple(content["protected"]),
                criterion=content["criterion"],
                formula=content["formula"],
                alpha=content["alpha"],
                importance=tuple(map(float, content["importance"])),
                ranking=tuple(content["ranking"]),
                notes=tuple(content["notes"]),
                model=dict(content["model"]),
                calibration=dict(content["calibration"]),
                selection=str(content.get("selection", "lowest")),
                candidates=tuple(map(dict, content.get("candidates", ()))),
                choice_agreement=content.get("choice_agreement"),
                options=dict(content.get("options", {})),
                confidence=None
                if confidence is None
                else PlanConfidence.from_dict(confidence, num_layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must be a complete plan, but is damaged: {type(error).__name__}: {error}"
            ) from None


def _ordinal(number: int) -> str:
    suffix = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{suffix}"


def layers_for_ratio(num_layers: int, ratio: float) -> int:
    """How many whole layers a share of the depth is, rounded down: 0.25 of 30 layers is 7.

    Raises:
        SimdiffError: ratio outside (0, 1), or less than one layer.
    """
    if not 0 < ratio < 1:
        raise SimdiffError(f"ratio must be above 0 and below 1, got {ratio}")
    # A ratio such as 0.3 of 10 layers must not lose a layer to the rounding of 0.3 * 10.
    count = math.floor(ratio * num_layers + 1e-9)
    if count == 0:
        raise SimdiffError(
            f"ratio must remove at least one of {num_layers} layers "
            f"({1 / num_layers:.4f} or more), got {ratio}"
        )
    return count


def check_selection(num_layers: int, num_remove: int, protect: Collection[int]) -> None:
    """Refuse what `select` would refuse, before scores exist."""
    check_layers(protect, num_layers, "protected layers")
    if not 1 <= num_remove < num_layers:
        raise SimdiffError(
            f"the number of layers to remove must be 1 to {num_layers - 1} of {num_layers}, "
            f"got {num_remove}"
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
    """Remove the layers of lowest importance, one shot, anywhere in the depth.

    Args:
        scores: what `ranked` was computed from; the plan remembers its provenance.
        ranked: importance of every layer.
        num_remove: how many layers go, 1 to num_layers - 1.
        protect: layers that stay, whatever their importance.

    Raises:
        SimdiffError: too few or too many layers to remove, protected layers that leave too few.

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
