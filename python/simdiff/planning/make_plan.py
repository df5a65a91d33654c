"""Make a plan from scores: apply a criterion and a selection, and choose by perplexity."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.io.progress import step
from simdiff.planning.block_costs import block_costs
from simdiff.planning.blocks import best_contiguous_block, optimal_blocks
from simdiff.planning.criteria import criterion_named, importance
from simdiff.planning.entry_points import foreign_criteria, known_selections, selected
from simdiff.planning.names import DEFAULT_ALPHA, DEFAULT_CRITERION, NUM_RESAMPLES, SELECTIONS
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
) -> PruningPlan:
    """Choose the layers to remove.

    The default, `simdiff` with selection "blocks", removes the disjoint blocks of least total cost
    (to the power 5/6, see `simdiff.planning.shortlist`). Given the model and calibration windows,
    it evaluates that plan and the layers of lowest block influence on one window, and exchanges
    layers of the better one while that lowers its perplexity (`simdiff.planning.exchange`). This
    reads 1/50 of the windows that greedy search would.

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

    Raises:
        SimdiffError: a name is unknown, the number of layers or the selection is impossible, or
            the scores lack blocks.
    """
    check_planning(criterion, selection, max_blocks)
    check_selection(scores.num_layers, num_remove, protect)
    chosen = selection or default_selection(criterion)
    ranked = importance(scores, criterion, alpha, seed=random_seed)
    base = select(scores, ranked, num_remove, protect)
    candidates: Sequence[Candidate] = ()
    agreement: float | None = None
    removed, label = base.removed, chosen
    if chosen not in SELECTIONS:
        removed = selected(chosen, scores, ranked.values, num_remove, protect)
    elif chosen != "lowest":
        costs = block_costs(scores, BLOCK_CRITERION_OF[criterion])
        if chosen == "contiguous":
            removed = best_contiguous_block(costs, num_remove, protect)
        elif criterion == "simdiff" and model is not None and windows is not None:
            # Imported here: without a model nothing needs torch.
            from simdiff.planning import exchange
            from simdiff.planning.streamed_search import with_starts

            starts = shortlist(scores, num_remove, protect, max_blocks=max_blocks)
            losses = exchange.CutLosses(model, windows)
            reads = exchange.affordable_reads(scores.num_layers, num_remove, len(windows))
            with step(
                f"choose by perplexity, {_number(max(reads, len(starts)), 'read')} of a window"
            ):
                best, candidates, agreement = with_starts(
                    model,
                    [start.removed for start in starts],
                    lambda: exchange.exchange_search(
                        losses,
                        starts,
                        costs.raised(EXPONENT),
                        max_reads=reads,
                        num_windows=len(windows),
                        protect=protect,
                        max_blocks=max_blocks,
                        ahead=losses.ahead,
                    ),
                )
            removed, label = best.removed, best.origin
        else:
            power = EXPONENT if criterion == "simdiff" else 1.0
            removed = optimal_blocks(costs.raised(power), num_remove, protect, max_blocks)
            label = f"optimal blocks, p = {power:.3g}"
    options: dict[str, Any] = {
        "selection": selection,
        "max-blocks": max_blocks,
        "random-seed": random_seed if criterion == "random" else None,
        "evaluation-windows": len(windows) if candidates and windows is not None else None,
    }
    options = {name: value for name, value in options.items() if value not in (None, False)}
    return _plan_with(base, removed, label, protect, candidates, agreement, options)


def _plan_with(
    base: PruningPlan,
    removed: Collection[int],
    selection: str,
    protect: Collection[int],
    candidates: Sequence[Candidate],
    agreement: float | None,
    options: dict[str, Any],
) -> PruningPlan:
    fields: dict[str, Any] = {**vars(base)}
    notes = [*base.notes, *_candidate_notes(candidates, agreement)]
    return PruningPlan(
        **fields
        | {
            "removed": tuple(sorted(removed, key=base.ranking.index)),
            "protected": tuple(sorted(protect)),
            "notes": tuple(notes),
            "selection": selection,
            "candidates": tuple(candidate.to_dict() for candidate in candidates),
            "choice_agreement": agreement,
            "options": options,
        }
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
        f"chosen among {_number(len(candidates), 'plan')} by perplexity on calibration text "
        f"(on {_number(num_windows, 'window')}, {losses})"
        + (f"; {out} were out, with NaN or Inf or a cut the model cannot express" if out else "")
    ]
    if len(candidates) - out < 2:
        return notes
    return [
        *notes,
        f"confidence of this choice: on {agreement:.0%} of {NUM_RESAMPLES} draws of the text that "
        "was read the same rules choose this plan among those",
    ]
