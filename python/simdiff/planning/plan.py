"""PruningPlan, the content of plan.json: which layers are removed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import (
    MAX_JSON_BYTES,
    as_object,
    header,
    load_json,
    parse_json,
    read_json,
    write_json,
)
from simdiff.models.layer_indices import check_layers, layer_runs
from simdiff.planning.confidence import PlanConfidence
from simdiff.planning.layer_lists import MOST_LAYERS, is_layer_list, parse_layers
from simdiff.planning.names import DEFAULT_CRITERION
from simdiff.planning.outcome import outcome

SCHEMA = "simdiff.plan"
SUBLAYER_SCHEMA = "simdiff.sublayer_plan"
BY_HAND = "by hand"
"""In place of a criterion and of a selection, where the layers were named."""

NO_CHECKPOINT = (
    "stock classes build both sub-layers of every layer, so no config of a checkpoint says that "
    "one is missing: without its weights it would be loaded with random ones. Apply the plan in "
    "memory (simdiff.sublayers.surgery.remove_sublayers, `simdiff eval --plan`), write a LLaMA "
    "model for vLLM (`simdiff export --format vllm`), or remove whole layers (`simdiff plan --unit "
    "layer`)"
)
"""Message that says why plans of sub-layers give no checkpoint, and what can be done instead."""


def is_sublayer_plan(path: Path) -> bool:
    """Whether a file is a plan of sub-layers by its schema; False if it cannot be read."""
    try:
        content = load_json(path)
    except SimdiffError:
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
    """The layers to remove and how they were chosen; indices count from 0 before pruning.

    `PruningPlan((2, 3))` is a plan too: of layers named by hand.
    """

    removed: tuple[int, ...]
    """Layers to remove, in the order of removal, the least important first."""
    num_layers: int = 0
    """Number of layers before pruning; 0 where layers were named and their model is not known."""
    protected: tuple[int, ...] = ()
    criterion: str = BY_HAND
    formula: str = ""
    alpha: float | None = None
    importance: tuple[float, ...] = ()
    """Of every layer; empty where layers were named by hand."""
    ranking: tuple[int, ...] = ()
    """All layers, the least important first, ties resolved; empty where they were named by hand."""
    notes: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    selection: str = "lowest"
    """How the layers were chosen by importance or by the costs of blocks, in a few words."""
    candidates: tuple[dict[str, Any], ...] = ()
    """The plans among which perplexity chose, with their losses; empty if nothing was run."""
    choice_agreement: float | None = None
    """Share of draws of the evaluated text in which the same plan is chosen among the candidates
    (`simdiff.planning.choice`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `simdiff plan` with which the plan was made, by their names there."""
    asked: dict[str, Any] = field(default_factory=dict)
    """The wish from which the number of layers follows, by the names of `Budget`."""
    search: dict[str, Any] = field(default_factory=dict)
    """What a search by effort read and what that cost, see `simdiff.planning.effort`."""
    confidence: PlanConfidence | None = None
    """Result of the bootstrap over sequences for the plan that scores alone give, from which this
    plan may differ; None if scores have no sequences."""

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What the plan reaches, see `simdiff.planning.outcome.outcome`."""
        return outcome(self.model, self.removed)

    @property
    def draws(self) -> PlanConfidence | None:
        """The confidence, where it is of these very layers: perplexity may have chosen others."""
        found = self.confidence
        return found if found and {*found.removed} == {*self.removed} else None

    @property
    def by_hand(self) -> bool:
        """Whether the layers were named, not chosen."""
        return not self.ranking

    @property
    def kept(self) -> tuple[int, ...]:
        """The kept layers, in order.

        Raises:
            SimdiffError: layers were named, and it is not known how many there are.
        """
        if not self.num_layers:
            raise SimdiffError(
                f"a list of layers to remove ({', '.join(map(str, self.removed))}) does not tell "
                'how many layers the model has: take a plan.json with "num_layers"'
            )
        gone = set(self.removed)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    def of_depth(self, num_layers: int, name: str) -> PruningPlan:
        """The same plan, where layers were named, for a model of so many layers.

        Args:
            num_layers: of the model.
            name: of the model, for the record.

        Raises:
            SimdiffError: the layers were named for another number of layers, the model has no
                layers of these numbers, or none would stay.
        """
        if not self.by_hand:
            return self
        if self.num_layers not in (0, num_layers):
            raise SimdiffError(
                f"the plan was made for another model: it is of {self.num_layers} layers, and "
                f"{name} has {num_layers}"
            )
        _check_removed(self.removed, num_layers)
        return replace(self, num_layers=num_layers, model={"name": name, **self.model})

    @property
    def loader(self) -> str:
        """The name in transformers by which a model of this class is loaded."""
        name = str(self.model.get("architecture", ""))
        return name if name.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"

    def reason(self, layer: int) -> str:
        """Why a layer is removed or kept, in a few words."""
        if self.by_hand:
            return "named by hand" if layer in self.removed else "not named"
        if layer not in self.ranking:
            raise SimdiffError(f"layer must be 0 to {self.num_layers - 1}, got {layer}")
        place = self.ranking.index(layer) + 1
        rank = _ordinal(place)
        if layer in self.protected:
            return f"{rank} lowest, protected"
        if layer not in self.removed and place <= len(self.removed):
            return f"{rank} lowest, worse {'by loss' if self.candidates else 'in blocks'}"
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
            "num_layers": self.num_layers or None,
            "removed": list(self.removed),
            "kept": list(self.kept) if self.num_layers else None,
            "protected": list(self.protected),
            "importance": list(self.importance),
            "ranking": list(self.ranking),
            "notes": list(self.notes),
            "selection": self.selection,
            "candidates": list(self.candidates),
            "choice_agreement": self.choice_agreement,
            "options": self.options,
            "asked": self.asked,
            "search": self.search,
            "outcome": self.outcome,
            "confidence": None if self.confidence is None else self.confidence.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write plan.json."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read plan.json, or a list of layers: `2,3,8-10`, a layer a line, a JSON array.

        A JSON object that holds "removed", and perhaps "num_layers", is a plan too.

        Raises:
            SimdiffError: the file is missing, damaged, inconsistent, or of a newer version.
        """
        refuse_sublayers(Path(path))
        content = _content(Path(path))
        try:
            num_layers = content.get("num_layers") or 0
            confidence, alpha = content.get("confidence"), content.get("alpha")
            options = as_object(content.get("options", {}))
            if content.get("candidates") and content.get("criterion") == DEFAULT_CRITERION:
                options.setdefault("effort", "quick")  # the only one once, and not written then
            removed, protected = tuple(content["removed"]), tuple(content.get("protected", ()))
            importance, ranking = content.get("importance", ()), content.get("ranking", ())
            _check_removed(removed, num_layers)
            check_layers(protected, num_layers, "protected layers")
            if len(importance) != (num_layers if ranking else 0):
                raise ValueError(f"importance must have {num_layers if ranking else 0} entries")
            if ranking and sorted(ranking) != list(range(num_layers)):
                raise ValueError("ranking must name every layer once")
            return cls(
                removed=removed,
                num_layers=num_layers,
                protected=protected,
                criterion=str(content.get("criterion", BY_HAND)),
                formula=str(content.get("formula", "")),
                alpha=None if alpha is None else float(alpha),
                importance=tuple(map(float, importance)),
                ranking=tuple(ranking),
                notes=tuple(map(str, content.get("notes", ()))),
                model=as_object(content.get("model", {})),
                calibration=as_object(content.get("calibration", {})),
                selection=str(content.get("selection", "lowest")),
                candidates=tuple(map(as_object, content.get("candidates", ()))),
                choice_agreement=content.get("choice_agreement"),
                options=options,
                asked=as_object(content.get("asked", {})),
                search=as_object(content.get("search", {})),
                confidence=None
                if confidence is None
                else PlanConfidence.from_dict(confidence, num_layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must be a complete plan, but is damaged: {type(error).__name__}: {error}"
            ) from None


def _content(path: Path) -> dict[str, Any]:
    """The content of a plan.json, or of a list as if it were one."""
    try:
        small = path.is_file() and path.stat().st_size <= MAX_JSON_BYTES
        text = path.read_text(encoding="utf-8-sig") if small else "{"
    except (OSError, UnicodeDecodeError):
        text = "{"  # read_json says what is wrong
    if is_layer_list(text):
        try:
            return {"removed": parse_layers(text)}
        except SimdiffError as error:
            raise SimdiffError(f"{path}: {error}") from None
    try:
        found = parse_json(text)
    except ValueError:
        if text.lstrip().startswith("{"):
            return read_json(path, SCHEMA)
        raise SimdiffError(
            f"{path}: must be a plan (the plan.json of `simdiff plan`, or layers such as 2,3,8-10 "
            "on one line or several, as `simdiff export` writes with --format list and llama.cpp)"
        ) from None
    if isinstance(found, list):
        return {"removed": found}
    if isinstance(found, dict) and "removed" in found and "schema" not in found:
        return found
    return read_json(path, SCHEMA)


def _check_removed(removed: Sequence[int], num_layers: int) -> None:
    """Refuse layers that are not there, or all; with `num_layers` 0 it is not known what is."""
    known = isinstance(num_layers, int) and not isinstance(num_layers, bool)
    if not known or not 0 <= num_layers <= MOST_LAYERS:
        raise SimdiffError(f"num_layers must be from 1 to {MOST_LAYERS}, got {num_layers!r}")
    check_layers(removed, num_layers or MOST_LAYERS, "layers to remove")
    if not removed or len(removed) == num_layers:
        raise SimdiffError(
            "removed must name 1 layer or more"
            if not num_layers
            else f"removed must name 1 to {num_layers - 1} layers of {num_layers}, "
            f"got {len(removed)}"
        )


def _ordinal(number: int) -> str:
    suffix = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{suffix}"
