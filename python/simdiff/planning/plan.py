"""PruningPlan, the content of plan.json: which layers are removed, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import header, read_json, write_json
from simdiff.models.layer_indices import check_layers, layer_runs
from simdiff.planning.confidence import PlanConfidence

SCHEMA = "simdiff.plan"
SUBLAYER_SCHEMA = "simdiff.sublayer_plan"

NO_CHECKPOINT = (
    "stock classes build both sub-layers of every layer, so no config of a checkpoint says that "
    "one is missing: without its weights it would be loaded with random ones. Apply the plan in "
    "memory (simdiff.sublayers.surgery.remove_sublayers, `simdiff eval --plan`), or remove whole "
    "layers (`simdiff plan --unit layer`)"
)
"""Message that says why plans of sub-layers give no checkpoint, and what can be done instead."""


def is_sublayer_plan(path: Path) -> bool:
    """Whether a file is a plan of sub-layers by its schema; False if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("schema") == SUBLAYER_SCHEMA


def refuse_sublayers(path: Path) -> None:
    """Refuse a plan of sub-layers in commands that cut whole layers from files.

    Raises:
        SimdiffError: says why stock loaders could not read the result, and what to do instead.
    """
    if is_sublayer_plan(path):
        raise SimdiffError(
            f"{path}: must be a plan of whole layers, but is one of sub-layers, and {NO_CHECKPOINT}"
        )


@dataclass(frozen=True)
class PruningPlan:
    """The layers to remove and how they were chosen; indices count from 0 before pruning."""

    removed: tuple[int, ...]
    """Layers to remove, in the order of removal, the least important first."""
    num_layers: int
    """Number of layers before pruning."""
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
    """The plans among which perplexity chose, with their losses; empty if nothing was run."""
    choice_agreement: float | None = None
    """Share of draws of the evaluated text in which the same plan is chosen among the candidates
    (`simdiff.planning.choice`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `simdiff plan` with which the plan was made, by their names there."""
    confidence: PlanConfidence | None = None
    """Result of the bootstrap over sequences for the plan that scores alone give, from which this
    plan may differ; None if scores have no sequences."""

    @property
    def kept(self) -> tuple[int, ...]:
        """The kept layers, in order."""
        gone = set(self.removed)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    @property
    def loader(self) -> str:
        """The name in transformers by which a model of this class is loaded."""
        name = str(self.model.get("architecture", ""))
        return name if name.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"

    def reason(self, layer: int) -> str:
        """Why a layer is removed or kept, in a few words."""
        rank = _ordinal(self.ranking.index(layer) + 1)
        if layer in self.protected:
            return f"{rank} lowest, protected"
        if layer in self.removed and self.selection != "lowest":
            start, stop = next(b for b in layer_runs(self.removed) if b[0] <= layer < b[1])
            return f"{rank} lowest, " + (
                "alone" if stop == start + 1 else f"in block {start}-{stop - 1}"
            )
        return f"{rank} lowest"

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            **header(SCHEMA),
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
            SimdiffError: the file is missing, damaged, inconsistent, or of a newer version.
        """
        refuse_sublayers(Path(path))
        content = read_json(path, SCHEMA)
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
