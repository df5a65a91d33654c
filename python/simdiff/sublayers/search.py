"""Greedy search by perplexity over attention and MLP sub-layers, as in BlockPruner."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import EvaluationJournal, evaluation_key
from simdiff.evaluation.losses import window_losses
from simdiff.models.identity import model_identity
from simdiff.planning.names import GREEDY
from simdiff.planning.perplexity_search import SearchStep, greedy_search
from simdiff.sublayers.plan import SublayerPlan
from simdiff.sublayers.structure import check_unit, find_sublayers, unit_includes
from simdiff.sublayers.surgery import sublayers_removed

FORMULA = "nll of the model without the sub-layer and those removed before it"


def search_sublayers(
    model: PreTrainedModel,
    windows: Tensor,
    unit: str,
    num_remove: int,
    *,
    text: Mapping[str, Any],
    name: str = "",
    protect: Collection[int] = (),
    journal: Path | None = None,
) -> SublayerPlan:
    """Remove one sub-layer at a time, each time the one without which the perplexity is lowest.

    Args:
        model: causal language model.
        windows: token ids `(num_windows, window_length)`, all read once for every candidate.
        unit: "attention", "mlp" or "sublayer".
        num_remove: number of sub-layers to remove.
        text: identity of the text, `TextIdentity.to_dict()`.
        name: name of the model, for the record.
        protect: layers of which both sub-layers stay.
        journal: file of finished evaluations, with which an interrupted search resumes.

    Raises:
        SimdiffError: the unit is unknown, the number is impossible, the journal is of another
            search, or no candidate has a finite perplexity (one without is never chosen).

    Source: BlockPruner, arXiv 2406.10594, Algorithm 1.
    """
    check_unit(unit)
    found = find_sublayers(model)
    names = found.names
    held = [
        row
        for row, unit_name in enumerate(names)
        if unit_name.layer in protect or not unit_includes(unit, unit_name)
    ]
    if not 1 <= num_remove <= min(len(names) - len(held), len(names) - 1):
        raise SimdiffError(
            f"search_sublayers: num_remove must be 1 to the {len(names) - len(held)} free "
            f"sub-layers ({unit}), got {num_remove}"
        )

    def losses(removed: frozenset[int]) -> list[float]:
        if not removed:
            return window_losses(model, windows, description=None)
        with sublayers_removed(model, [names[row] for row in removed], found):
            return window_losses(model, windows, description=None)

    # Journals of whole layers use indices too. The key tells the two kinds of files apart.
    key = evaluation_key(model, windows, text) | {"sublayers": [list(name) for name in names]}
    with EvaluationJournal(key, journal, losses) as evaluate:
        steps = greedy_search(evaluate, len(names), num_remove, held)
    rows = [step.layer for step in steps]
    last = steps[-1].candidates
    rest = sorted((row for row in last if row not in rows), key=last.__getitem__)
    lost = [row for row in range(len(names)) if row not in {*rows, *rest, *held}]
    ranking = [*rows, *rest, *lost]
    values = [step.candidates[step.layer] for step in steps] + [last[row] for row in rest]
    protected = [row for row in held if unit_includes(unit, names[row])]
    ceiling = max(values, default=math.inf)  # for sub-layers that were not tried or gave NaN
    return SublayerPlan(
        unit=unit,
        removed=tuple(names[row] for row in rows),
        ranking=tuple(names[row] for row in [*ranking, *protected]),
        importance=tuple(values + [ceiling] * (len(lost) + len(protected))),
        num_layers=len(found.layers),
        protected=tuple(sorted(protect)),
        criterion=GREEDY,
        formula=FORMULA,
        alpha=None,
        notes=tuple(_notes(steps, names)),
        model=model_identity(model, name),
        calibration=dict(text),
    )


def _notes(steps: Collection[SearchStep], names: Collection[Any]) -> list[str]:
    known = list(names)
    notes = []
    for number, step in enumerate(steps, 1):
        if step.excluded:
            out = ", ".join(str(known[row]) for row in step.excluded)
            notes.append(f"step {number}: without {out} the perplexity is NaN or Inf: never chosen")
    return notes
