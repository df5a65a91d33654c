"""SublayerPlan: which attention and MLP sub-layers are removed, chosen from their scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import as_object, header, read_json, write_json
from simdiff.models.layer_indices import check_layers
from simdiff.planning.criteria import Importance, importance
from simdiff.planning.make_plan import search_notes
from simdiff.planning.names import DEFAULT_ALPHA, DEFAULT_CRITERION, DEFAULT_EFFORT, EFFORTS
from simdiff.planning.plan import SUBLAYER_SCHEMA
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.scores import SublayerScores
from simdiff.sublayers.structure import KINDS, SublayerName, check_unit, unit_includes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Criteria that do not apply: the cost of a run of layers, or their order, has no meaning for
# sub-layers.
NOT_OF_SUBLAYERS = ("cosine-block", "angular-block", "angular-block-last")


@dataclass(frozen=True)
class SublayerPlan:
    """The sub-layers to remove and how they were chosen; layers count from 0, not renumbered."""

    unit: str
    """Kinds of sub-layers that could be removed: one of `simdiff.sublayers.structure.UNITS`."""
    removed: tuple[SublayerName, ...]
    """Sub-layers to remove, in the order of removal, the least important first."""
    ranking: tuple[SublayerName, ...]
    """All sub-layers of the unit, the least important first, ties resolved."""
    importance: tuple[float, ...]
    """Importance of each entry of `ranking`."""
    num_layers: int
    protected: tuple[int, ...]
    """Layers of which both sub-layers stay."""
    criterion: str
    formula: str
    alpha: float | None
    notes: tuple[str, ...]
    model: dict[str, Any]
    calibration: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `simdiff plan` with which the plan was made, by their names there."""
    search: dict[str, Any] = field(default_factory=dict)
    """What a search read and what that cost, see `simdiff.planning.effort`."""

    def reason(self, name: SublayerName) -> str:
        """Why a sub-layer is removed or kept, in a few words."""
        rank = f"rank {self.ranking.index(name) + 1} of {len(self.ranking)}"
        if name.layer in self.protected:
            return f"{rank}, protected"
        return rank

    def to_dict(self) -> dict[str, Any]:
        """The content of the plan's file."""
        return {
            **header(SUBLAYER_SCHEMA),
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
            "search": self.search,
        }

    def save(self, path: Path) -> None:
        """Write the plan to a file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> SublayerPlan:
        """Read a plan from a file.

        Raises:
            SimdiffError: the file is missing, damaged, inconsistent, or of a newer version.
        """
        content = read_json(path, SUBLAYER_SCHEMA)
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
                model=as_object(content["model"]),
                calibration=as_object(content["calibration"]),
                options=as_object(content["options"]),
                search=as_object(content.get("search", {})),
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
    model: PreTrainedModel | None = None,
    windows: Tensor | None = None,
    effort: str | None = None,
    evaluation_windows: int = 4,
    journal: Path | None = None,
) -> SublayerPlan:
    """Choose the sub-layers of lowest importance, or search for those of least loss.

    A criterion treats the sub-layers of the unit as the layers of a model. The default criterion is
    the cost of cutting one sub-layer, mean ||y - x||^2 / (2 ||x|| ||y||). Given the model and
    calibration windows, it begins a search for the sub-layers of least loss and divergence from the
    dense model (`simdiff.sublayers.effort`).

    Args:
        scores: scores that include sub-layers.
        unit: "attention", "mlp" or "sublayer" (both kinds compared with each other).
        num_remove: number of sub-layers to remove.
        criterion, alpha, random_seed: see `simdiff.planning.criteria.importance`.
        protect: layers of which both sub-layers stay.
        model, windows: the dense model and token ids `(num_windows, window_length)` of calibration
            text, both or neither; only the default criterion uses them.
        effort: "none", "normal" or "thorough"; None is "normal".
        evaluation_windows: that the greedy search reads of whose cost the search takes a share; 0
            runs no search.
        journal: file that keeps what a search read, with which it resumes.

    Raises:
        SimdiffError: a name is unknown, the number is impossible, the scores lack sub-layers, or a
            search finds no finite loss.

    Source: LLM-Drop, arXiv 2406.15786, for attention and MLP by 1 - cos; SimDiff for the criteria.
    """
    check_unit(unit)
    if criterion in NOT_OF_SUBLAYERS:
        raise SimdiffError(
            f"criterion {criterion} is of blocks of layers and not defined for sub-layers: take "
            "simdiff, block-influence or another criterion of single units"
        )
    if effort not in (None, "none", *(name for name, chosen in EFFORTS.items() if chosen)):
        raise SimdiffError(
            f"effort must be none, normal or thorough for sub-layers, got {effort!r}"
        )
    check_layers(protect, scores.num_layers, "protected layers")
    table = SublayerScores.from_scores(scores)
    rows = [row for row, name in enumerate(table.names) if unit_includes(unit, name)]

    def ranked_by(name: str) -> tuple[Importance, list[int]]:
        found = importance(table.as_layers(scores, rows), name, alpha, seed=random_seed)
        return found, [rows[index] for index in found.ranking()]

    ranked, order = ranked_by(criterion)
    free = [row for row in order if table.names[row].layer not in protect]
    if not 1 <= num_remove <= len(free) or num_remove >= len(table.names):
        raise SimdiffError(
            f"the number of sub-layers to remove must be 1 to the {len(free)} free ones of "
            f"{len(order)} ({unit}; {len(protect)} layers are protected), got {num_remove}"
        )
    gone, options, notes, search = free[:num_remove], {}, [], {}
    if model is not None and windows is not None and evaluation_windows and effort != "none":
        from simdiff.sublayers.effort import search_with_effort  # without a model needs no torch

        _, other = ranked_by("block-influence")
        lowest = [row for row in other if row in free][:num_remove]
        costs = dict(zip(rows, ranked.values, strict=True))
        found = search_with_effort(
            model,
            scores,
            windows,
            free,
            [costs.get(row, math.inf) for row in range(len(table.names))],
            list(dict.fromkeys((tuple(sorted(gone)), tuple(sorted(lowest))))),
            effort or DEFAULT_EFFORT,
            evaluation_windows=min(evaluation_windows, len(windows)),
            held=[row for row in range(len(table.names)) if row not in free],
            journal=journal,
        )
        gone = sorted(found.best.removed, key=order.index)
        options = {
            "evaluation-windows": min(evaluation_windows, len(windows)),
            "effort": effort or DEFAULT_EFFORT,
        }
        search, notes = found.record, search_notes(found.record, found.agreement, "sub-layers")
    removed = tuple(table.names[row] for row in gone)
    return SublayerPlan(
        unit=unit,
        removed=removed,
        ranking=tuple(table.names[row] for row in order),
        importance=tuple(ranked.values[index] for index in ranked.ranking()),
        num_layers=scores.num_layers,
        protected=tuple(sorted(protect)),
        criterion=criterion,
        formula=ranked.formula,
        alpha=ranked.alpha,
        notes=(*notes, *_notes(ranked, [table.names[row] for row in rows], removed)),
        model=scores.model,
        calibration=scores.calibration,
        options=options,
        search=search,
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
