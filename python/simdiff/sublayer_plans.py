"""SublayerPlan: which attention and MLP sub-layers go; chosen from their scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simdiff.criteria import DEFAULT_ALPHA, DEFAULT_CRITERION, Importance, importance
from simdiff.errors import SimdiffError
from simdiff.files import header, read_json, write_json
from simdiff.layer_entries import check_layers
from simdiff.plan_kinds import SUBLAYER_SCHEMA
from simdiff.scores import LayerScores
from simdiff.sublayer_scores import SublayerScores
from simdiff.sublayers import KINDS, SublayerName, check_unit, is_of

SCHEMA_VERSION = 1

# Their cost of a run of layers, or their order, is not defined for sub-layers.
NOT_OF_SUBLAYERS = ("cosine-block", "angular-block", "angular-block-last")


@dataclass(frozen=True)
class SublayerPlan:
    """Which sub-layers go; layers count from 0 and keep their number."""

    unit: str
    """What could go: one of `simdiff.sublayers.UNITS`."""
    removed: tuple[SublayerName, ...]
    """In the order of removal, the least important first."""
    ranking: tuple[SublayerName, ...]
    """All sub-layers of the unit, the least important first, ties resolved."""
    importance: tuple[float, ...]
    """Of each entry of `ranking`."""
    num_layers: int
    protected: tuple[int, ...]
    """Layers of which both sub-layers stay."""
    """Kept because they write or erase a massive activation (`simdiff.block_costs`)."""
    criterion: str
    formula: str
    alpha: float | None
    notes: tuple[str, ...]
    model: dict[str, Any]
    calibration: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `simdiff plan` that it was made with, by their names there."""

    def reason(self, name: SublayerName) -> str:
        """Why a sub-layer goes or stays, in a few words."""
        rank = f"rank {self.ranking.index(name) + 1} of {len(self.ranking)}"
        if name.layer in self.protected:
            return f"{rank}, protected"
        return rank

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            **header(SUBLAYER_SCHEMA, SCHEMA_VERSION),
            "model": self.model,
            "calibration": self.calibration,
            "unit": self.unit,
            "criterion": self.criterion,
            "formula": self.formula,
            "alpha": self.alpha,
            "num_layers": self.num_layers,
            "removed": [list(name) for name in self.removed],
            "sublayers": [
                {
                    "layer": name.layer,
                    "kind": name.kind,
                    "importance": value,
                    "removed": name in self.removed,
                    "reason": self.reason(name),
                }
                for name, value in zip(self.ranking, self.importance, strict=True)
            ],
            "protected": list(self.protected),
            "notes": list(self.notes),
            "options": self.options,
        }

    def save(self, path: Path) -> None:
        """Write the file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> SublayerPlan:
        """Read the file.

        Raises:
            SimdiffError: missing, corrupt, inconsistent, or written by a newer version.
        """
        content = read_json(path, SUBLAYER_SCHEMA, SCHEMA_VERSION)
        try:
            num_layers = content["num_layers"]
            ranking = _names([(s["layer"], s["kind"]) for s in content["sublayers"]], num_layers)
            removed = _names(content["removed"], num_layers)
            if not removed or not set(removed) <= set(ranking):
                raise ValueError("removed must name some of the sub-layers")
            check_unit(content["unit"])
            return cls(
                unit=content["unit"],
                removed=removed,
                ranking=ranking,
                importance=tuple(float(entry["importance"]) for entry in content["sublayers"]),
                num_layers=num_layers,
                protected=tuple(content["protected"]),
                criterion=content["criterion"],
                formula=content["formula"],
                alpha=content["alpha"],
                notes=tuple(content["notes"]),
                model=dict(content["model"]),
                calibration=dict(content["calibration"]),
                options=dict(content["options"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must be a complete plan of sub-layers, but is damaged: "
                f"{type(error).__name__}: {error}"
            ) from None


def _names(entries: Sequence[Any], num_layers: int) -> tuple[SublayerName, ...]:
    names = tuple(SublayerName(layer, kind) for layer, kind in entries)
    check_layers({name.layer for name in names}, num_layers)
    if len(set(names)) != len(names) or not {name.kind for name in names} <= set(KINDS):
        raise ValueError(f"sub-layers must be named once each, their kinds {', '.join(KINDS)}")
    return names


def plan_sublayers(
    scores: LayerScores,
    unit: str,
    num_remove: int,
    *,
    criterion: str = DEFAULT_CRITERION,
    alpha: float = DEFAULT_ALPHA,
    protect: Collection[int] = (),
    random_seed: int = 0,
) -> SublayerPlan:
    """Remove the sub-layers of lowest importance, one shot.

    A criterion sees the sub-layers of the unit as the layers of a model. The default's cost is that
    of cutting the one sub-layer, mean ||y - x||^2 / (2 ||x|| ||y||).

    Args:
        scores: with sub-layers.
        unit: "attention", "mlp" or "sublayer" (both kinds against each other).
        num_remove: how many sub-layers go.
        criterion, alpha, random_seed: see `simdiff.criteria.importance`.
        protect: layers of which both sub-layers stay.

    Raises:
        SimdiffError: unknown names, a number that cannot be met, scores without sub-layers.

    Source: LLM-Drop, arXiv 2406.15786, for attention and MLP by 1 - cos; SimDiff for the criteria.
    """
    check_unit(unit)
    if criterion in NOT_OF_SUBLAYERS:
        raise SimdiffError(
            f"criterion {criterion} is of blocks of layers and not defined for sub-layers: take "
            "simdiff, block-influence or another criterion of single units"
        )
    check_layers(protect, scores.num_layers, "protected layers")
    table = SublayerScores.of(scores)
    rows = [row for row, name in enumerate(table.names) if is_of(unit, name)]
    ranked = importance(table.as_layers(scores, rows), criterion, alpha, seed=random_seed)
    ranking = [table.names[rows[index]] for index in ranked.ranking()]
    free = [n for n in ranking if n.layer not in protect]
    if not 1 <= num_remove <= len(free) or num_remove >= len(table.names):
        raise SimdiffError(
            f"the number of sub-layers to remove must be 1 to the {len(free)} free ones of "
            f"{len(ranking)} ({unit}; {len(protect)} layers are protected), got {num_remove}"
        )
    removed = tuple(free[:num_remove])
    return SublayerPlan(
        unit=unit,
        removed=removed,
        ranking=tuple(ranking),
        importance=tuple(ranked.values[index] for index in ranked.ranking()),
        num_layers=scores.num_layers,
        protected=tuple(sorted(protect)),
        criterion=criterion,
        formula=ranked.formula,
        alpha=ranked.alpha,
        notes=tuple(_notes(ranked, [table.names[row] for row in rows], removed)),
        model=scores.model,
        calibration=scores.calibration,
    )


def _notes(
    ranked: Importance,
    names: Sequence[SublayerName],
    removed: Sequence[SublayerName],
) -> list[str]:
    notes = []
    if ranked.saturated:
        notes.append(
            f"saturation: sigmoid(L_diff) is exactly 1 for {len(ranked.saturated)} of "
            f"{len(names)} sub-layers, whose difference no longer tells them apart"
        )
    for group in ranked.ties:
        tied = ", ".join(str(names[index]) for index in group)
        notes.append(f"tie: {tied} have equal importance")
    layers = [name.layer for name in removed]
    whole = sorted({layer for layer in layers if layers.count(layer) > 1})
    if whole:
        notes.append(
            f"layers {', '.join(map(str, whole))} lose both sub-layers: a plan of layers takes "
            "those from a checkpoint too"
        )
    return notes
