"""Searches by perplexity: choose layers by evaluating the model without them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.io.progress import track
from simdiff.planning.criteria import Importance
from simdiff.planning.names import GREEDY, ONE_SHOT
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import check_selection

if TYPE_CHECKING:
    from simdiff.evaluation.journal import Evaluation

FORMULAS = {
    ONE_SHOT: "nll of the model without the layer alone",
    GREEDY: "nll of the model without the layer and those removed before it",
}

Evaluate = Callable[[frozenset[int]], "Evaluation"]
Ahead = Callable[[Sequence[frozenset[int]]], None]
"""Is told which sets of layers will be evaluated next, see `EvaluationJournal.ahead`."""


@dataclass(frozen=True)
class SearchStep:
    """One step of a search: the layer that was chosen, and the losses of all candidates."""

    layer: int
    candidates: dict[int, float]
    """Mean negative log-likelihood without each candidate and the layers of earlier steps."""
    excluded: tuple[int, ...]
    """Candidates without a finite perplexity, which are never chosen."""
    seconds: float
    """Time of all evaluations of this step, including those read from a journal."""


def one_shot_search(
    evaluate: Evaluate,
    num_layers: int,
    num_remove: int,
    protect: Collection[int] = (),
    ahead: Ahead | None = None,
) -> SearchStep:
    """Evaluate the model without each single layer.

    Args:
        evaluate: evaluates the model without a set of layers.
        num_layers: number of layers of the whole model.
        num_remove: number of layers to remove.
        protect: layers that stay and are not tried.
        ahead: is told the candidates before they are evaluated.

    Raises:
        SimdiffError: the selection is impossible, or too few layers have a finite perplexity.

    Source: Shortened LLaMA, arXiv 2402.02834, Section 3.1 (PPL criterion).
    """
    check_selection(num_layers, num_remove, protect)
    steps: list[SearchStep] = []
    total = num_layers - len(protect)
    search = _steps(evaluate, num_layers, 1, protect, steps, ahead=ahead)
    for _ in track(search, ONE_SHOT.replace("-", " "), total=total):
        pass
    finite = total - len(steps[0].excluded)
    if finite < num_remove:
        raise SimdiffError(
            f"{ONE_SHOT}: {num_remove} layers must have a finite perplexity without them, got "
            f"{finite} of {total}"
        )
    return steps[0]


def greedy_search(
    evaluate: Evaluate,
    num_layers: int,
    num_remove: int,
    protect: Collection[int] = (),
    rebase: Callable[[frozenset[int]], None] | None = None,
    ahead: Ahead | None = None,
) -> tuple[SearchStep, ...]:
    """Remove one layer at a time, each time the one without which the perplexity is lowest.

    The first k steps are the search for k layers. Of equal candidates the first in depth is taken.

    Args:
        evaluate: evaluates the model without a set of layers.
        num_layers: number of layers of the whole model.
        num_remove: number of steps.
        protect: layers that stay and are not tried.
        rebase: called before every step with the layers removed so far, see
            `BypassEvaluator.rebase`.
        ahead: is told the candidates of every step before they are evaluated.

    Raises:
        SimdiffError: the selection is impossible, or no candidate of a step has a finite
            perplexity.

    Source: SLEB, arXiv 2402.09025, Algorithm 1.
    """
    check_selection(num_layers, num_remove, protect)
    steps: list[SearchStep] = []
    free = num_layers - len(protect)
    search = _steps(evaluate, num_layers, num_remove, protect, steps, rebase, ahead)
    total = num_remove * free - num_remove * (num_remove - 1) // 2
    for _ in track(search, GREEDY.replace("-", " "), total=total):
        pass
    return tuple(steps)


def _steps(
    evaluate: Evaluate,
    num_layers: int,
    num_remove: int,
    protect: Collection[int],
    steps: list[SearchStep],
    rebase: Callable[[frozenset[int]], None] | None = None,
    ahead: Ahead | None = None,
) -> Iterator[None]:
    """Fill `steps` with the steps of a greedy search; yield after every evaluation."""
    gone: frozenset[int] = frozenset()
    while len(steps) < num_remove:
        if rebase is not None:
            rebase(gone)
        found: dict[int, Evaluation] = {}
        tried = [layer for layer in range(num_layers) if layer not in {*protect, *gone}]
        if ahead is not None:
            ahead([gone | {layer} for layer in tried])
        for layer in tried:
            found[layer] = evaluate(gone | {layer})
            yield
        candidates = {
            layer: entry.nll for layer, entry in found.items() if math.isfinite(entry.perplexity)
        }
        if not candidates:
            raise SimdiffError(
                f"perplexity must be finite without some layer besides {sorted(gone)}, got NaN "
                f"or Inf for all {len(found)} candidates"
            )
        layer = min(candidates, key=lambda layer: (candidates[layer], layer))
        excluded = tuple(sorted(set(found) - set(candidates)))
        seconds = math.fsum(entry.seconds for entry in found.values())
        steps.append(SearchStep(layer, candidates, excluded, seconds))
        gone |= {layer}


def one_shot_importance(step: SearchStep, num_layers: int) -> Importance:
    """The importance of a layer as the mean negative log-likelihood without it.

    Layers that were not tried or have no finite loss get the largest float: they are never chosen.
    """
    values = tuple(step.candidates.get(layer, sys.float_info.max) for layer in range(num_layers))
    return Importance(ONE_SHOT, FORMULAS[ONE_SHOT], None, values, values, (), ())


def with_exclusions(plan: PruningPlan, steps: Sequence[SearchStep]) -> PruningPlan:
    """Add a note to a plan for every step that had to exclude candidates."""
    notes = [
        f"step {number}: without layer {', '.join(map(str, step.excluded))} the perplexity is NaN "
        "or Inf, so that it was not chosen"
        for number, step in enumerate(steps, 1)
        if step.excluded
    ]
    return replace(plan, notes=(*plan.notes, *notes))


def greedy_plan(
    steps: Sequence[SearchStep],
    num_remove: int,
    *,
    num_layers: int,
    protect: Collection[int] = (),
    model: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> PruningPlan:
    """Make a plan from the first steps of a greedy search.

    The importance of a removed layer is its loss in the step that removed it; the importance of a
    kept layer is its loss in the last step.

    Raises:
        SimdiffError: `num_remove` is larger than the number of steps.
    """
    if not 1 <= num_remove <= len(steps):
        raise SimdiffError(
            f"greedy_plan: num_remove must be 1 to the {len(steps)} steps made, got {num_remove}"
        )
    steps = steps[:num_remove]
    removed = tuple(step.layer for step in steps)
    last = steps[-1].candidates
    values = [last.get(layer, sys.float_info.max) for layer in range(num_layers)]
    for step in steps:
        values[step.layer] = step.candidates[step.layer]
    kept = [layer for layer in range(num_layers) if layer not in removed]
    plan = PruningPlan(
        removed=removed,
        num_layers=num_layers,
        protected=tuple(sorted(protect)),
        criterion=GREEDY,
        formula=FORMULAS[GREEDY],
        alpha=None,
        importance=tuple(values),
        ranking=(*removed, *sorted(kept, key=lambda layer: (values[layer], layer))),
        notes=(),
        model=dict(model),
        calibration=dict(calibration),
        selection="greedy",
    )
    return with_exclusions(plan, steps)
