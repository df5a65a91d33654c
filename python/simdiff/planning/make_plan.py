"""Make a plan from scores: apply a criterion and a selection, and choose by perplexity."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError, number_of
from simdiff.io.progress import step
from simdiff.planning.block_costs import block_costs
from simdiff.planning.blocks import best_contiguous_block, optimal_blocks
from simdiff.planning.criteria import criterion_named, importance
from simdiff.planning.entry_points import foreign_criteria, known_selections, selected
from simdiff.planning.names import (
    DEFAULT_ALPHA,
    DEFAULT_CRITERION,
    DEFAULT_EFFORT,
    EFFORTS,
    NUM_RESAMPLES,
    SELECTIONS,
    STREAMED_EFFORT,
)
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import check_selection, select
from simdiff.planning.shortlist import EXPONENT, Candidate, shortlist
from simdiff.scoring.scores import LayerScores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Criteria of single layers, and the block costs that correspond to them.
BLOCK_CRITERION_OF = {
    "simdiff": "simdiff",
    "block-influence": "cosine-distance",
    "cosine-block": "cosine-distance",
    "angular-block": "angular-distance",
    "angular-block-last": "last-token-angle",
}

# Criteria whose sources cut one block.
ONE_BLOCK = ("cosine-block", "angular-block", "angular-block-last")


def default_selection(criterion: str) -> str:
    """The selection that a criterion is used with: disjoint blocks, one block, or the K lowest."""
    if criterion == "simdiff":
        return "blocks"
    if criterion in foreign_criteria():
        return criterion_named(criterion).selection
    return "contiguous" if criterion in ONE_BLOCK else "lowest"


def check_planning(criterion: str, selection: str | None, max_blocks: int | None) -> None:
    """Refuse a criterion or a selection that `make_plan` would refuse, before scores exist."""
    chosen = selection or default_selection(criterion)
    if chosen not in known_selections():
        raise SimdiffError(
            f"selection must be one of {', '.join(known_selections())}, got {chosen!r}"
        )
    if chosen in ("contiguous", "blocks") and criterion not in BLOCK_CRITERION_OF:
        raise SimdiffError(
            f"selection {chosen!r} needs the costs of blocks, which criterion {criterion} does not "
            f"define: take one of {', '.join(BLOCK_CRITERION_OF)}, or selection 'lowest'"
        )
    if max_blocks is not None and (chosen != "blocks" or max_blocks < 1):
        raise SimdiffError(
            f"max_blocks must be at least 1 and go with selection 'blocks', got {max_blocks} with "
            f"{chosen!r}"
        )


def check_effort(effort: str | None) -> None:
    """Refuse an effort that `make_plan` would refuse, before scores exist."""
    if effort is not None and effort not in EFFORTS:
        raise SimdiffError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")


def make_plan(
    scores: LayerScores,
    num_remove: int,
    *,
    criterion: str = DEFAULT_CRITERION,
    alpha: float = DEFAULT_ALPHA,
    selection: str | None = None,
    protect: Collection[int] = (),
    max_blocks: int | None = None,
    random_seed: int = 0,
    model: PreTrainedModel | None = None,
    windows: Tensor | None = None,
    effort: str | None = None,
    evaluation_windows: int | None = None,
    journal: Path | None = None,
) -> PruningPlan:
    """Choose the layers to remove.

    The default, `simdiff` with selection "blocks", removes the disjoint blocks of least total cost
    (to the power 5/6, see `simdiff.planning.shortlist`). Given the model and calibration windows,
    it searches for the layers of least loss and divergence from the dense model, at a fifth of the
    cost of greedy search or, effort "thorough", at its cost (`simdiff.planning.effort_search`).
    Effort "quick" reads 1/50 of the windows that greedy search would: that plan and the layers of
    lowest block influence, and exchanges of layers of the better one while that lowers its
    perplexity (`simdiff.planning.exchange`).

    Args:
        scores: scores of all layers, and of blocks if the selection needs them.
        num_remove: exact number of layers to remove.
        criterion: a name in `simdiff.planning.criteria.CRITERIA`.
        alpha: weight of the difference, for the paper's criteria.
        selection: one of `SELECTIONS`, or of another package; None takes `default_selection`.
        protect: layers that stay, whatever their cost.
        max_blocks: upper limit of the number of separate blocks, for selection "blocks".
        random_seed: seed of the criterion random.
        model, windows: the dense model and token ids `(num_windows, window_length)` of calibration
            text, both or neither; only `simdiff` with selection "blocks" uses them.
        effort: a name in `simdiff.planning.names.EFFORTS`, for `simdiff` with selection "blocks";
            None takes "normal", and "quick" where the model is streamed.
        evaluation_windows: the first windows are those of effort "quick", and of the greedy search
            of whose cost the others take a share; None takes all.
        journal: file in which the other efforts keep what they read, see `search_with_effort`.

    Raises:
        SimdiffError: a name is unknown, the number of layers or the selection is impossible, or
            the scores lack blocks.
    """
    check_planning(criterion, selection, max_blocks)
    check_effort(effort)
    check_selection(scores.num_layers, num_remove, protect)
    chosen = selection or default_selection(criterion)
    ranked = importance(scores, criterion, alpha, seed=random_seed)
    base = select(scores, ranked, num_remove, protect)
    candidates: Sequence[Candidate] = ()
    agreement: float | None = None
    search: dict[str, Any] = {}
    read = 0
    removed, label = base.removed, chosen
    if chosen not in SELECTIONS:
        removed = selected(chosen, scores, ranked.values, num_remove, protect)
    elif chosen != "lowest":
        costs = block_costs(scores, BLOCK_CRITERION_OF[criterion])
        if chosen == "contiguous":
            removed = best_contiguous_block(costs, num_remove, protect)
        elif criterion == "simdiff" and effort != "none" and model is not None:
            assert windows is not None
            effort = effort or default_effort(model)
            read = min(evaluation_windows or len(windows), len(windows))
            given = (scores, num_remove, model, windows, read, protect, max_blocks)
            if effort == "quick":
                best, candidates, agreement = _quick(*given)
            else:
                best, candidates, agreement, search = _searched(effort, journal, *given)
            removed, label = best.removed, best.origin
        else:
            power = EXPONENT if criterion == "simdiff" else 1.0
            removed = optimal_blocks(costs.raised(power), num_remove, protect, max_blocks)
            label = f"optimal blocks, p = {power:.3g}"
    options: dict[str, Any] = {
        "selection": selection,
        "max-blocks": max_blocks,
        "random-seed": random_seed if criterion == "random" else None,
        "evaluation-windows": read if candidates else None,
        "effort": effort if candidates else None,
    }
    options = {name: value for name, value in options.items() if value not in (None, False)}
    return _plan_with(base, removed, label, protect, candidates, agreement, search, options)


def default_effort(model: PreTrainedModel) -> str:
    """What `make_plan` spends where nothing was asked for."""
    from simdiff.models.streamed import stream_of  # without a model nothing needs torch

    return DEFAULT_EFFORT if stream_of(model) is None else STREAMED_EFFORT


def _quick(
    scores: LayerScores,
    num_remove: int,
    model: PreTrainedModel,
    windows: Tensor,
    num_windows: int,
    protect: Collection[int],
    max_blocks: int | None,
) -> tuple[Candidate, list[Candidate], float]:
    """The exchange search; imports here: without a model nothing needs torch."""
    from simdiff.planning import exchange
    from simdiff.planning.streamed_search import with_starts

    windows = windows[:num_windows]
    starts = shortlist(scores, num_remove, protect, max_blocks=max_blocks)
    losses = exchange.CutLosses(model, windows)
    reads = exchange.affordable_reads(scores.num_layers, num_remove, len(windows))
    costs = block_costs(scores, BLOCK_CRITERION_OF["simdiff"]).raised(EXPONENT)
    read = number_of(max(reads, len(starts)), "read")
    with step(f"choose by perplexity, {read} of a window"):
        return with_starts(
            model,
            [start.removed for start in starts],
            lambda: exchange.exchange_search(
                losses,
                starts,
                costs,
                max_reads=reads,
                num_windows=len(windows),
                protect=protect,
                max_blocks=max_blocks,
                ahead=losses.ahead,
            ),
        )


def _searched(
    effort: str,
    journal: Path | None,
    scores: LayerScores,
    num_remove: int,
    model: PreTrainedModel,
    windows: Tensor,
    num_windows: int,
    protect: Collection[int],
    max_blocks: int | None,
) -> tuple[Candidate, list[Candidate], float | None, dict[str, Any]]:
    """The search of effort normal or thorough."""
    from simdiff.planning.effort import search_with_effort

    with step(f"choose by divergence and loss, effort {effort}"):
        found = search_with_effort(
            model,
            scores,
            windows,
            num_remove,
            effort,
            evaluation_windows=num_windows,
            protect=protect,
            max_blocks=max_blocks,
            journal=journal,
        )
    return found.best, found.candidates, found.agreement, found.record


def search_notes(
    record: dict[str, Any], agreement: float | None, units: str = "layers"
) -> list[str]:
    """What a search cost, and how sure its last choice is."""
    if not record:
        return []
    sure = f"confidence of this choice: on {agreement or 0:.0%} of {NUM_RESAMPLES} draws of the "
    sure += "text that was read no other plan of the last choice is better"
    return [
        *([] if agreement is None else [sure]),
        f"effort {record['effort']}: {number_of(record['windows_read'], 'window')} read, "
        f"{record['layers_run']} {units} and {record['heads_run']} heads run on one; with the "
        f"calibration pass {record['share_of_greedy']:.0%} of what greedy search by perplexity "
        f"runs on {number_of(record['greedy_windows'], 'window')}",
    ]


def _plan_with(
    base: PruningPlan,
    removed: Collection[int],
    selection: str,
    protect: Collection[int],
    candidates: Sequence[Candidate],
    agreement: float | None,
    search: dict[str, Any],
    options: dict[str, Any],
) -> PruningPlan:
    fields: dict[str, Any] = {**vars(base)}
    quick = [] if search else _candidate_notes(candidates, agreement)
    return PruningPlan(
        **fields
        | {
            "removed": tuple(sorted(removed, key=base.ranking.index)),
            "protected": tuple(sorted(protect)),
            "notes": (*base.notes, *(search_notes(search, agreement) or quick)),
            "selection": selection,
            "candidates": tuple(candidate.to_dict() for candidate in candidates),
            "choice_agreement": agreement,
            "options": options,
            "search": search,
        }
    )


def _candidate_notes(candidates: Sequence[Candidate], agreement: float | None) -> list[str]:
    if not candidates or agreement is None:
        return []
    num_windows = max(candidate.num_windows for candidate in candidates)
    losses = ", ".join(
        f"{candidate.origin}: {math.exp(candidate.nll):.4g}"
        for candidate in candidates
        if candidate.nll is not None and candidate.num_windows == num_windows
    )
    out = sum(candidate.nll is None for candidate in candidates)
    notes = [
        f"chosen among {number_of(len(candidates), 'plan')} by perplexity on calibration text "
        f"(on {number_of(num_windows, 'window')}, {losses})"
        + (f"; {out} were out, with NaN or Inf or a cut the model cannot express" if out else "")
    ]
    if len(candidates) - out < 2:
        return notes
    return [
        *notes,
        f"confidence of this choice: on {agreement:.0%} of {NUM_RESAMPLES} draws of the text that "
        "was read the same rules choose this plan among those",
    ]
