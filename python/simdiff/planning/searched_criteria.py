"""Plans that need evaluations: searches by perplexity and the exact sweep over alpha."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import number_of
from simdiff.evaluation.journal import EvaluationJournal, evaluation_key
from simdiff.models.identity import check_same_model
from simdiff.models.streamed import stream_of
from simdiff.planning.alpha_sweep import sweep_alpha, sweep_plan
from simdiff.planning.names import GREEDY, ONE_SHOT, SWEPT
from simdiff.planning.perplexity_search import (
    Ahead,
    Evaluate,
    greedy_plan,
    greedy_search,
    one_shot_importance,
    one_shot_search,
    with_exclusions,
)
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import select
from simdiff.planning.streamed_search import evaluator_of
from simdiff.scoring.scores import LayerScores


def searched_plan(
    scores: LayerScores,
    criterion: str,
    num_remove: int,
    evaluate: Evaluate,
    rebase: Callable[[frozenset[int]], None],
    protect: Collection[int] = (),
    ahead: Ahead | None = None,
) -> tuple[PruningPlan, dict[str, Any] | None]:
    """Make the plan of a search or a sweep; return it and the sweep's curve over alpha, or None.

    Args:
        scores: scores of all layers; a search takes only the identity of model and text from them.
        criterion: a name in `simdiff.planning.names.SEARCHED`.
        num_remove: number of layers to remove.
        evaluate: evaluates the model without a set of layers.
        rebase: called before every step with the layers removed so far, see
            `BypassEvaluator.rebase`.
        protect: layers that stay.
        ahead: is told what will be evaluated, many sets of layers at once.

    Raises:
        SimdiffError: the selection is impossible, or there is no finite perplexity.
    """
    if criterion == GREEDY:
        steps = greedy_search(evaluate, scores.num_layers, num_remove, protect, rebase, ahead)
        plan = greedy_plan(
            steps,
            num_remove,
            num_layers=scores.num_layers,
            protect=protect,
            model=scores.model,
            calibration=scores.calibration,
        )
        return plan, None
    rebase(frozenset())
    if criterion == ONE_SHOT:
        step = one_shot_search(evaluate, scores.num_layers, num_remove, protect, ahead)
        ranked = one_shot_importance(step, scores.num_layers)
        return with_exclusions(select(scores, ranked, num_remove, protect), [step]), None
    sweep = sweep_alpha(
        scores,
        SWEPT[criterion],
        num_remove,
        lambda gone: evaluate(frozenset(gone)).perplexity,
        protect,
        ahead,
    )
    return sweep_plan(scores, sweep, protect), sweep.to_dict()


def search_plan(
    model: PreTrainedModel,
    scores: LayerScores,
    windows: Tensor,
    criterion: str,
    num_remove: int,
    *,
    protect: Collection[int] = (),
    journal: Path | None = None,
) -> PruningPlan:
    """Search by perplexity on calibration windows; resume where an earlier call stopped.

    Args:
        model: the dense model for which the scores were made.
        scores: scores of all layers.
        windows: token ids `(num_windows, window_length)` of calibration text.
        criterion: a name in `simdiff.planning.names.SEARCHED`.
        num_remove: number of layers to remove.
        protect: layers that stay.
        journal: file that stores finished evaluations; None stores none. It is not removed at the
            end: the caller removes it once the plan is saved.

    Raises:
        SimdiffError: the selection is impossible, there is no finite perplexity, the scores are of
            another model, or the journal of another input.
    """
    check_same_model(model, scores.model, "file of scores")
    evaluator = evaluator_of(model, windows)
    key = evaluation_key(model, windows, scores.calibration)
    with EvaluationJournal(key, journal, evaluator.losses) as evaluate:
        ahead = None if stream_of(model) is not None else evaluate.ahead
        plan, _ = searched_plan(
            scores, criterion, num_remove, evaluate, evaluator.rebase, protect, ahead
        )
    note = f"evaluated on the first {number_of(len(windows), 'window')} of the calibration text"
    options = {} if criterion in SWEPT else {"evaluation-windows": len(windows)}
    return replace(plan, notes=(*plan.notes, note), options={**plan.options, **options})
